"""Checkpoints: the weights of a model read one at a time, from a folder, a file, the Hub or memory.

No paper; `deltas` reads through this. Weights come from safetensors only: nothing is unpickled, and no code of a
repository is run. No file stays open between reads.

Names are those of the model's parameters. A file that uses others (no `transformer.` in front, `embed_out` for a head)
is translated by the rules `from_pretrained` uses. Buffers are not weights and are left out. Where transformers stacks or
transposes tensors while loading (experts of a mixture), a folder keeps the names and the layout of its file.

Plugs in: folders of `save_pretrained`, Hub ids, any `torch.nn.Module`.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_ext.errors import DeltaError
from hf_ext.log import get_logger


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_logger = get_logger(__name__)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Stored by older versions of transformers although they follow from the config.
_OLD_BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias)$")
_OLD_CAUSAL_MASK = re.compile(r"(^|\.)attn(\.attention)?\.bias$")
_HEAD = "lm_head.weight"
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONVERT = "convert it to safetensors first: load it with from_pretrained where you trust it, then save_pretrained."


@dataclass(frozen=True)
class _Stored:
    """Where one tensor lives: in a safetensors file under `key`, or in a live parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path | None = None
    key: str = ""
    parameter: Tensor | None = None

    def read(self) -> Tensor:
        if self.parameter is not None:
            return self.parameter.detach().cpu()
        # Opened for each read: a mapping that stays open keeps every page it was read through.
        with _safetensors(self.path) as file:
            return file.get_tensor(self.key)


class Checkpoint:
    """The weights of a model, read one at a time.

    Made by `Checkpoint.open`; may be used as a context manager.

    Example:
        ```python
        with Checkpoint.open("base") as base, Checkpoint.open("tuned") as tuned:
            for entry, change in iter_deltas(base, tuned):  # of hf_ext.merging.deltas
                ...
        ```

    Attributes:
        source (`str`): The folder or Hub id, or the live model's `name_or_path`.
        revision (`str`, *optional*): Commit hash, where the weights come from a snapshot of the Hub.
        names (`list[str]`): Names of the weights in the order of the model; a tied weight appears once.
        tied (`dict[str, str]`): Other names of tied weights, each with the name it stands for.
        quantised (`str`, *optional*): The method the config says its weights were quantised with.
        converted (`frozenset[str]`): Names whose tensors transformers reshapes while loading this folder.
    """

    def __init__(
        self,
        source: str,
        revision: str | None,
        stored: dict[str, _Stored],
        tied: dict[str, str],
        quantised: str | None = None,
        converted: frozenset[str] = frozenset(),
    ):
        if not stored:
            raise DeltaError(f"{source} holds no weights; expected the parameters of a model; give another source.")
        self.source = source
        self.revision = revision
        self.names = list(stored)
        self.tied = tied
        self.quantised = quantised
        self.converted = converted
        self._stored: dict[str, _Stored] | None = stored

    @classmethod
    def open(
        cls,
        source: str | os.PathLike | torch.nn.Module,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Checkpoint:
        """Open a checkpoint without reading its weights.

        Args:
            source (`str`, `PathLike` or `torch.nn.Module`):
                A folder of `save_pretrained` (one `model.safetensors`, or shards with their index), one
                `.safetensors` file, the id of a model on the Hub, or a live model.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*): Access token for the Hub.

        Returns:
            `Checkpoint`: Only headers were read (and two tied weights compared, where a file stores both).

        Raises:
            `DeltaError`: nothing is there, a file is damaged, or only pickled weights exist.
        """
        if isinstance(source, torch.nn.Module):
            return _open_model(cls, source)
        path = Path(source).expanduser()
        if path.exists():
            return _open_path(cls, path, os.fspath(source))
        if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
            raise DeltaError(
                f"{os.fspath(source)!r} does not exist; expected a folder of save_pretrained, a .safetensors file or "
                "the id of a model on the Hub; check the path."
            )
        return _open_path(cls, _download(source, revision, token), source)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type a tensor is stored in, without reading it."""
        return self._find(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored, without reading it."""
        found = self._find(name)
        return torch.Size(found.shape).numel() * found.dtype.itemsize

    def total_bytes(self) -> int:
        """Bytes of all weights as they are stored; tied ones count once."""
        return sum(self.nbytes(name) for name in self.names)

    def tensor(self, name: str) -> Tensor:
        """One weight on the CPU, in the type it is stored in.

        Args:
            name (`str`): One of `names`, or a tied name.

        Returns:
            `Tensor`: `shape(name)`. It may share memory with a live model: do not change it.
        """
        return self._find(name).read()

    def kind(self, name: str) -> str:
        """Layer kind for tables: `q_proj`, `down_proj`, `embed_tokens` ... for matrices, else `norm`, `bias`, `other`."""
        parts, dims = name.split("."), len(self.shape(name))
        if dims >= 2 and parts[-1] not in ("weight", "bias"):
            return parts[-1]
        if dims >= 2 and len(parts) > 1:
            return parts[-2]
        return {"weight": "norm", "bias": "bias"}.get(parts[-1], "other") if dims == 1 else "other"

    def places(self) -> dict[tuple[str, str], str]:
        """Name of each weight that lies in a file, by the file's name and its key there."""
        stored = (self._stored or {}).items()
        return {(item.path.name, item.key): name for name, item in stored if item.path}

    def same_bits(self, one: str, two: str) -> bool:
        """Whether two of the weights are stored with the same bits."""
        return _same_bits(self._find(one), self._find(two))

    def close(self) -> None:
        """Let go of a live model's weights; reading afterwards raises. No file stays open between reads."""
        self._stored = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self.names)} tensors)"

    def _find(self, name: str) -> _Stored:
        if self._stored is None:
            raise DeltaError(f"{self.source} was closed; expected an open checkpoint; open it again.")
        try:
            return self._stored[self.tied.get(name, name)]
        except KeyError:
            raise DeltaError(
                f"{self.source} has no tensor {name!r}; expected one of its {len(self.names)} names; see `names`."
            ) from None


def _open_model(cls: type[Checkpoint], model: torch.nn.Module) -> Checkpoint:
    """The parameters of a live model; those that share storage are one weight with several names."""
    stored: dict[str, _Stored] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    config = getattr(model, "config", None)
    source = str(getattr(model, "name_or_path", "") or type(model).__name__)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            raise DeltaError(
                f"{name} of {source} is on the meta device, so its values are not in memory; expected a loaded model; "
                "load it without offloading (no device_map), or give its folder."
            )
        key: Any = (parameter.untyped_storage().data_ptr(), parameter.storage_offset(), parameter.shape)
        if (canonical := seen.setdefault(key if parameter.numel() else id(parameter), name)) != name:
            tied[name] = canonical
        else:
            stored[name] = _Stored(tuple(parameter.shape), parameter.dtype, parameter=parameter)
    return cls(source, getattr(config, "_commit_hash", None), stored, tied, _quantisation(config))


def _open_path(cls: type[Checkpoint], path: Path, source: str) -> Checkpoint:
    """Read the headers of a folder or a file and give the tensors the names of the model."""
    folder = path if path.is_dir() else path.parent
    raw: dict[str, _Stored] = {}
    for file, keys in _weight_files(path).items():
        raw |= _headers(file, keys)
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model = _skeleton(folder, config) if config else None
    stored, converted = _model_names(raw, model)
    tied = _tied_names(stored, model, config)
    absolute = folder.absolute()
    snapshot = absolute.parent.name == "snapshots" and _COMMIT.fullmatch(absolute.name)
    revision = absolute.name if snapshot else None
    return cls(source, revision, _in_order(stored, model), tied, _quantisation(config), converted)


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """Folder of the snapshot of a repository: its top-level safetensors and JSON files, and nothing that runs."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=["*.safetensors", "*.json"],
            # Subfolders hold other formats, and "consolidated" a second copy of the same weights.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        at = f" at revision {revision!r}" if revision else ""
        raise DeltaError(
            f"{repo_id!r}{at} is not a folder here and could not be fetched from the Hub: {reason} Expected a local "
            "folder or a reachable repository; check the name, the revision, the token and HF_HUB_OFFLINE."
        ) from error
    return Path(folder)


def _weight_files(path: Path) -> Mapping[Path, list[str] | None]:
    """The files of a checkpoint, each with the keys to read from it; `None` stands for all."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise DeltaError(
                f"{path} is a {path.suffix or 'bare'} file; expected .safetensors, because others may run code when "
                f"opened; {_CONVERT}"
            )
        return {path: None}
    if (path / WEIGHTS_NAME).is_file():
        return {path / WEIGHTS_NAME: None}
    if (path / INDEX_NAME).is_file():
        return _sharded(path, path / INDEX_NAME)
    if (path / "adapter_config.json").is_file():
        raise DeltaError(
            f"{path} holds a PEFT adapter; expected a full checkpoint; load it and save the result of "
            "merge_and_unload() with save_pretrained."
        )
    pickled = sorted(item.name for item in path.iterdir() if item.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise DeltaError(
            f"{path} holds only pickled weights ({listed(pickled)}); expected {WEIGHTS_NAME}, because a pickle may "
            f"run code when opened; {_CONVERT}"
        )
    found = sorted(item.name for item in path.glob("*.safetensors"))
    raise DeltaError(
        f"{path} holds {listed(found) if found else 'no weights'}; expected {WEIGHTS_NAME} or {INDEX_NAME}; "
        + ("give the path of that file." if found else "give a folder written by save_pretrained.")
    )


def _sharded(folder: Path, index: Path) -> dict[Path, list[str]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise DeltaError(
            f"{index} has no usable weight_map; expected tensor names with file names; download it again."
        )
    files: dict[Path, list[str]] = defaultdict(list)
    for key, name in weight_map.items():
        # Read as a Windows path, which knows both separators and drive letters.
        path = PureWindowsPath(name)
        if path.anchor or ".." in path.parts or path.suffix != ".safetensors":
            raise DeltaError(
                f"{index} sends {key!r} to {name!r}; expected a .safetensors file inside the folder; do not use this "
                "checkpoint unless you know who changed its index."
            )
        files[folder / name].append(key)
    return dict(files)


def _safetensors(path: Path | None):
    """`safe_open`, with an error that names the file."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise DeltaError(
            f"{path} does not exist; expected every file of the checkpoint; download or save it again."
        ) from None
    except (OSError, SafetensorError) as error:
        raise DeltaError(
            f"{path} cannot be read: {error}. Expected a complete safetensors file; it is probably truncated: download "
            "or save it again."
        ) from error


def _headers(path: Path, keys: list[str] | None) -> dict[str, _Stored]:
    with _safetensors(path) as file:
        present = set(file.keys())
        if missing := sorted(set(keys or ()) - present):
            raise DeltaError(
                f"{path} does not hold {listed(missing)}, which the index expects in it; the shards and the index "
                "are of two checkpoints: download or save them again."
            )
        found = {}
        for key in keys if keys is not None else sorted(present):
            part = file.get_slice(key)
            # A type this table does not know is some packed format; the quantisation check turns it away.
            dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
            found[key] = _Stored(tuple(part.get_shape()), dtype, path=path, key=key)
        return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeltaError(
            f"{path} is not valid JSON: {error}. Expected the file of save_pretrained; write it again."
        ) from None
    if not isinstance(data, dict):
        raise DeltaError(f"{path} holds a {type(data).__name__}; expected a JSON object; write it again.")
    return data


def _quantisation(config: Any) -> str | None:
    """What a config says its weights were quantised with."""
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    found = get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "an unnamed method")


def _skeleton(folder: Path, config: dict[str, Any]) -> torch.nn.Module | None:
    """The model of a folder on the meta device, for its names and ties; `None` if this transformers cannot build it."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return None
    import transformers

    named = getattr(transformers, str(architectures[0]), None)
    try:
        parsed = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return named(parsed)
            return transformers.AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
    except Exception as error:  # whatever a model's own code raises: names are then taken as they are stored
        _logger.info("cannot build %s of %s: %s", architectures[0], folder, error)
        return None


def _model_names(raw: dict[str, _Stored], model: torch.nn.Module | None) -> tuple[dict[str, _Stored], frozenset[str]]:
    """Stored tensors under the names of the model, without buffers; and the names it reshapes while loading."""
    if model is None:
        return {key: value for key, value in raw.items() if not _is_old_buffer(key, value)}, frozenset()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in model.named_buffers()}
    renamed, converted = _renamed(raw, model, parameters | buffers)
    names = {key: renamed.get(key, key) for key in raw}
    if len(set(names.values())) < len(names):
        names = {key: key for key in raw}
    dropped = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    stored = {}
    for key, name in names.items():
        ignored = name in buffers or _is_old_buffer(name, raw[key]) or any(rule.search(name) for rule in dropped)
        if name in parameters or key in converted or not ignored:
            stored[name] = raw[key]
    return stored, frozenset(names[key] for key in converted)


def _renamed(raw: Iterable[str], model: Any, known: set[str]) -> tuple[dict[str, str], set[str]]:
    """Stored name -> the model's name, where `from_pretrained` renames; and stored names it reshapes on the way."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, apply_converters, rename_source_key

        rules = get_model_conversion_mapping(model)
    except Exception as error:  # these are not promised to stay; without them names are taken as they are stored
        _logger.info("no renaming rules for %s: %s", type(model).__name__, error)
        return {}, set()
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    prefix, table = getattr(model, "base_model_prefix", None), dict.fromkeys(known, True)
    renamed, converted = {}, set()
    # In natural order, as the loader goes: some rules switch on at the first name they meet.
    for key in sorted(raw, key=_natural):
        name = rename_source_key(key, renamings, [], prefix, table)[0]
        if apply_converters(name, converters)[1] is not None:
            converted.add(key)
        elif name in known:
            renamed[key] = name
    return renamed, converted


def _is_old_buffer(name: str, stored: _Stored) -> bool:
    return bool(_OLD_BUFFERS.search(name) or (_OLD_CAUSAL_MASK.search(name) and len(stored.shape) == 4))


def _in_order(stored: dict[str, _Stored], model: torch.nn.Module | None) -> dict[str, _Stored]:
    """In the order of the model; by name, with numbers counted as such, where it does not know every tensor."""
    known = [name for name, _ in model.named_parameters(remove_duplicate=False)] if model is not None else []
    order = known if stored.keys() <= set(known) else sorted(stored, key=_natural)
    return {name: stored[name] for name in order if name in stored}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _tied_names(stored: dict[str, _Stored], model: torch.nn.Module | None, config: dict[str, Any]) -> dict[str, str]:
    """Tied names with what they stand for. Moves a weight stored under a tied name, drops one stored twice."""
    if model is not None:
        first: dict[int, str] = {}
        every = model.named_parameters(remove_duplicate=False)
        wanted = {name: first.setdefault(id(parameter), name) for name, parameter in every}
        wanted = {name: canonical for name, canonical in wanted.items() if name != canonical}
    else:
        heads = ("ForCausalLM", "LMHeadModel")
        is_language_model = any(str(item).endswith(heads) for item in config.get("architectures") or ())
        embeddings = [name for name in stored if _EMBEDDING.search(name)]
        ties = config.get("tie_word_embeddings", is_language_model and _HEAD not in stored)
        wanted = {_HEAD: embeddings[0]} if ties and len(embeddings) == 1 else {}
    tied = {}
    for name, canonical in wanted.items():
        if name not in stored and canonical in stored:
            tied[name] = canonical
        elif name in stored and canonical not in stored:
            stored[canonical] = stored.pop(name)
            tied[name] = canonical
        elif name in stored and _same_bits(stored[name], stored[canonical]):
            del stored[name]
            tied[name] = canonical
    return tied


def _same_bits(one: _Stored, two: _Stored) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    whole = _SAME_SIZE[one.dtype.itemsize]
    return torch.equal(one.read().view(whole), two.read().view(whole))


def listed(items: list[str], limit: int = 5) -> str:
    """The first few of many names, for messages."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
