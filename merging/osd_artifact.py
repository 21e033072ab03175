"""`OSDArtifact`: a compressed fine-tune (OSD, arXiv 2511.02681) as an object and as a folder that PEFT opens.

The folder: `adapter_config.json` (`peft_type` OSD, base, digests of its weights), `adapter_model.safetensors` (one uint8
tensor, the blob of all deltas, and the error of each), `artifact.json` (what `hub_tools` reads), and, if asked for,
`lora/`, a plain LoRA that opens without this package. Every file is written under another name first.

Differs from the paper: in nothing here; it has no file format. The mathematics and its differences are in `osd.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from hf_ext.artifact import Artifact, Measured, manifest_bytes, read_artifact
from hf_ext.config import write_bytes_atomic
from hf_ext.errors import ArtifactError, BlobError, ConfigError, DeltaError
from hf_ext.merging.blob import FLOATS, MAX_TERMS, Delta, LowRankTerm, SignTerm, decode, encode, term_size
from hf_ext.merging.deltas import Checkpoint, matches
from hf_ext.merging.osd import truncated_svd
from hf_ext.merging.osd_config import PEFT_TYPE, OSDConfig, own_settings


WEIGHTS_NAME, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BLOB_KEY, ERROR_KEY = "osd_blob", "osd_error"
TRANSPOSED = ("c_attn", "c_fc", "c_proj")  # transformers' Conv1D
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")  # files of a checkpoint that hold no weights
NOTE = "signs keep the effect of a delta, not its distance: relative errors above 1 are expected"
ARTIFACT_FILES = (ADAPTER_CONFIG, WEIGHTS_NAME, "artifact.json")
SNIPPET = """import hf_ext
from peft import {auto}

hf_ext.register()
model = {auto}.from_pretrained(REPO)
"""


@dataclass(frozen=True)
class TensorReport:
    """What compression did to one tensor: its kind, `||dW||^2` and `||dW - decoded||^2`."""

    name: str
    kind: str
    energy: float
    error: float


@dataclass(frozen=True)
class OSDArtifact:
    """Compressed deltas of one fine-tune, and where they belong.

    Args:
        deltas (`dict[str, Delta]`): by name of the weight in the base.
        config (`OSDConfig`): settings, base model, modules, digests.
        form (`str`): what the deltas are: signs, factors, or both.
        choice (`str`): what was decided about norms, biases and embeddings, and why.
        bytes_before (`int`): of the fine-tuned checkpoint; 0 if unknown.
        reports (`tuple[TensorReport, ...]`): measured errors; those of tensors left out are included.
        recovery (`float`, *optional*): share of the divergence on the calibration data that is gone.
        stored (`tuple[Measured, ...]`): the numbers of the folder it was read from; they stay the card's.
    """

    deltas: dict[str, Delta]
    config: OSDConfig
    form: str = ""
    choice: str = ""
    bytes_before: int = 0
    reports: tuple[TensorReport, ...] = ()
    recovery: float | None = None
    stored: tuple[Measured, ...] = ()

    def nbytes(self) -> int:
        """Bytes of all files `save_pretrained` writes."""
        return sum(len(content) for content in self._files().values())

    def measured(self, after: int | None = None) -> tuple[Measured, ...]:
        """The numbers of the card: bytes before and after, error by kind of layer, recovery."""
        if self.stored:
            return self.stored
        rows = [Measured("bytes before", self.bytes_before, "bytes")] if self.bytes_before else []
        rows.append(Measured("bytes after", self.nbytes() if after is None else after, "bytes"))
        kinds: dict[str, list[float]] = {}
        for report in self.reports:
            total = kinds.setdefault(report.kind, [0.0, 0.0])
            total[0] += report.energy
            total[1] += report.error
        rows += [
            Measured(f"relative error, {kind}", float(f"{(error / energy) ** 0.5:.3g}"))
            for kind, (energy, error) in kinds.items()
        ]
        if self.recovery is not None:
            rows.append(Measured("recovery of predictions, calibration data", round(self.recovery, 4)))
        return tuple(rows)

    def table(self) -> list[dict[str, Any]]:
        """A line per tensor: name, shape, form, rank, density of what is kept, bits a value, bytes, relative error."""
        errors = {report.name: (report.error / report.energy) ** 0.5 for report in self.reports if report.energy}
        lines = []
        for name, delta in self.deltas.items():
            size = int(np.prod(delta.shape))
            low_rank = [term for term in delta.terms if isinstance(term, LowRankTerm)]
            kept = sum(
                int(side.values.size if side.mask is None else side.mask.sum())
                for term in low_rank
                for side in (term.left, term.right)
            )
            full = sum(side.values.size for term in low_rank for side in (term.left, term.right))
            signs = sum(len(term.negative) for term in delta.terms if isinstance(term, SignTerm))
            bits = sorted({term.left.bits for term in low_rank} | ({1} if signs else set()), reverse=True)
            lines.append(
                {
                    "tensor": name,
                    "shape": "x".join(map(str, delta.shape)),
                    "form": " + ".join(["factors"] * bool(low_rank) + ["signs"] * bool(signs)),
                    "rank": sum(len(term.left.values) for term in low_rank),
                    "density": signs / size if signs else kept / max(full, 1),
                    "bits": "/".join(map(str, bits)),
                    "bytes": sum(term_size(term) for term in delta.terms),
                    "error": errors.get(name),
                }
            )
        return lines

    def save_pretrained(self, save_directory: str | os.PathLike, lora_rank: int | None = None) -> None:
        """Write the folder.

        Args:
            save_directory (`str` or `os.PathLike`): made if it does not exist.
            lora_rank (`int`, *optional*): also write `lora/`, the deltas as a plain LoRA of that rank; it needs only
                PEFT to open, is larger, and holds the matrices alone.

        Raises:
            `ConfigError`: `lora_rank` is not positive, or a layer stores its weight transposed.
        """
        if lora_rank is not None and lora_rank < 1:
            raise ConfigError(f"lora_rank={lora_rank} must be at least 1; leave it out for no LoRA.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files().items():
            write_bytes_atomic(folder / name, content)
        shutil.rmtree(folder / "lora", ignore_errors=True)  # of an earlier delta
        if lora_rank is not None:
            self._save_lora(folder / "lora", lora_rank)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, revision: str | None = None, token: str | None = None
    ) -> OSDArtifact:
        """Read an artifact from a folder or a Hub repository; nothing in it is executed.

        Raises:
            `ArtifactError`: no such artifact. `BlobError`: its weights are damaged or of a later format.
        """
        folder = local_folder(source, revision, token)
        config = OSDConfig.from_dict(_read_config(folder))
        deltas, errors = read_weights(folder / WEIGHTS_NAME)
        manifest = read_artifact(folder) if (folder / "artifact.json").is_file() else None
        reports = tuple(
            TensorReport(name, name.split(".")[-2] if "." in name else name, 1.0, float(error) ** 2)
            for name, error in zip(deltas, () if errors is None else errors)
        )
        numbers = {row.what: row.value for row in manifest.measured} if manifest else {}
        said = {key: str(manifest.config.get(key, "")) if manifest else "" for key in ("form", "other tensors")}
        return cls(
            deltas,
            config,
            form=said["form"],
            choice=said["other tensors"],
            bytes_before=int(numbers.get("bytes before", 0)),
            reports=reports,
            recovery=numbers.get("recovery of predictions, calibration data"),
            stored=manifest.measured if manifest else (),
        )

    def check_base(self, base: Checkpoint, force: bool = False) -> None:
        """Raise `DeltaError` unless `base` is the checkpoint the deltas were taken from."""
        missing = [name for name in self.deltas if name not in base.names and name not in base.tied]
        if missing:
            raise DeltaError(f"{base.source} has no tensor {missing[0]!r}; the delta belongs to another architecture.")
        for name, delta in self.deltas.items():
            if tuple(base.shape(name)) != delta.shape:
                raise DeltaError(
                    f"{name} of {base.source} has shape {tuple(base.shape(name))} and its delta {delta.shape}; give the "
                    f"base this delta was taken from ({self.config.base_model_name_or_path})."
                )
        stored = self.config.base_fingerprint
        if stored and self.deltas and not force:
            if not matches(stored, ((name, base.tensor(name)) for name in self.deltas)):
                raise DeltaError(
                    f"{base.source} is not the base this delta was taken from ({self.config.base_model_name_or_path}, "
                    f"revision {self.config.revision}): its weights differ. Load that base, or pass force=True."
                )

    def _files(self) -> dict[str, bytes]:
        """The files by name. The manifest names the bytes of all of them, itself included."""
        settings = self.config.to_dict()
        defaults = OSDConfig().to_dict()
        kept = {key: value for key, value in settings.items() if key == "peft_type" or value != defaults[key]}
        errors = {report.name: (report.error / report.energy) ** 0.5 for report in self.reports if report.energy}
        tensors = {BLOB_KEY: torch.frombuffer(bytearray(encode(self.deltas)), dtype=torch.uint8)}
        if all(name in errors for name in self.deltas):
            tensors[ERROR_KEY] = torch.tensor([errors[name] for name in self.deltas]).half()
        files = {
            ADAPTER_CONFIG: json.dumps(kept, separators=(",", ":"), sort_keys=True).encode(),
            WEIGHTS_NAME: save(tensors, metadata={"format": "pt"}),
        }
        others, size = sum(map(len, files.values())), 0
        for _ in range(4):  # the number settles once its digits do
            size = others + len(self._manifest(size))
        return {**files, "artifact.json": self._manifest(size)}

    def _manifest(self, after: int) -> bytes:
        base = self.config.base_model_name_or_path
        on_hub = isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/", "~"))
        causal = self.config.task_type == "CAUSAL_LM" or self.config.auto_mapping is None
        artifact = Artifact(
            method="osd",
            library_name="peft",
            base_model=base if base and on_hub and not Path(base).exists() else None,
            base_revision=self.config.revision,
            config={key: value for key, value in own_settings(self.config).items() if value is not None}
            | {"form": self.form, "other tensors": self.choice}
            | ({"note": NOTE} if "signs" in self.form else {}),
            measured=self.measured(after),
            snippet=SNIPPET.format(auto="AutoPeftModelForCausalLM" if causal else "AutoPeftModel"),
        )
        return manifest_bytes(artifact)

    def _save_lora(self, folder: Path, rank: int) -> None:
        from peft import LoraConfig

        tensors, modules, ranks = {}, [], {}
        for name, delta in self.deltas.items():
            module = name.rpartition(".")[0]
            ends = self.config.extra_modules or ()
            if module.rpartition(".")[2] in TRANSPOSED:
                raise ConfigError(
                    f"lora_rank={rank} cannot be written: {module} is a layer of GPT-2 that stores its weight transposed; "
                    "leave it out and use peft.convert_to_lora on the opened adapter."
                )
            if len(delta.shape) != 2 or any(module == end or module.endswith("." + end) for end in ends):
                continue  # embeddings have another form in a LoRA
            left, sigma, right = truncated_svd(torch.from_numpy(delta.dense()), rank)
            modules.append(module)
            if len(sigma) != rank:
                ranks[module] = len(sigma)
            tensors[f"base_model.model.{module}.lora_A.weight"] = (right * sigma.sqrt()).T.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = (left * sigma.sqrt()).contiguous()
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            rank_pattern=ranks,
            alpha_pattern=dict(ranks),
            target_modules=modules,
            task_type=self.config.task_type,
            base_model_name_or_path=self.config.base_model_name_or_path,
            revision=self.config.revision,
            inference_mode=True,
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".lora.", dir=folder.parent))
        try:
            config.save_pretrained(str(partial))
            save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def combine(artifacts: Sequence[OSDArtifact], weights: Sequence[float]) -> OSDArtifact:
    """The weighted sum of compressed fine-tunes of one base: their terms side by side, nothing fitted again.

    Integers and signs are kept as they are; a weight changes the float16 steps and the magnitudes.

    Raises:
        `ConfigError`: no artifact, another number of weights, or artifacts of different bases.
    """
    if not artifacts or len(artifacts) != len(weights):
        raise ConfigError(f"{len(artifacts)} artifacts and {len(weights)} weights; give one weight for each artifact.")
    if not np.isfinite(weights).all():
        raise ConfigError(f"a weight of {list(weights)} is not finite; give plain numbers.")
    bases = {artifact.config.base_model_name_or_path for artifact in artifacts}
    if len(bases) > 1:
        raise ConfigError(f"the artifacts belong to different bases, {sorted(map(str, bases))}; combine those of one.")
    deltas: dict[str, Delta] = {}
    for artifact, weight in zip(artifacts, weights):
        for name, delta in artifact.deltas.items():
            if name in deltas and deltas[name].shape != delta.shape:
                raise ConfigError(
                    f"{name} has shape {deltas[name].shape} and {delta.shape}; combine deltas of one base."
                )
            before = deltas[name].terms if name in deltas else ()
            with np.errstate(over="ignore"):
                scaled = tuple(term.scaled(weight) for term in delta.terms)
            if not all(map(_is_finite, scaled)):
                raise ConfigError(f"the weight {weight} takes {name} beyond what a file can hold; use a smaller one.")
            if len(before) + len(scaled) > MAX_TERMS:
                raise ConfigError(
                    f"{name} would have {len(before) + len(scaled)} terms, and a file holds {MAX_TERMS}; combine fewer."
                )
            deltas[name] = Delta(delta.shape, before + scaled)
    # A fingerprint covers the tensors of its own delta; it stays where all have the same ones.
    same = all(list(artifact.deltas) == list(deltas) for artifact in artifacts)
    first = artifacts[0].config
    config = replace(
        first,
        target_modules=sorted({name for item in artifacts for name in item.config.target_modules or ()}),
        extra_modules=sorted({name for item in artifacts for name in item.config.extra_modules or ()}) or None,
        base_fingerprint=first.base_fingerprint if same else None,
        tied={k: v for artifact in artifacts for k, v in (artifact.config.tied or {}).items()} or None,
    )
    return OSDArtifact(deltas, config, "combined")


def _is_finite(term: LowRankTerm | SignTerm) -> bool:
    if isinstance(term, SignTerm):
        return bool(np.isfinite(term.magnitude))
    left = term.left
    return bool(np.isfinite(left.decode() if left.bits in FLOATS else left.steps).all())


def restore(
    source: str | os.PathLike | OSDArtifact,
    save_directory: str | os.PathLike,
    base: str | os.PathLike | None = None,
    force: bool = False,
) -> Path:
    """Write a plain checkpoint: the base with the deltas added, file by file, in the base's own types.

    Args:
        source (`str`, `os.PathLike` or `OSDArtifact`): folder, Hub id or object.
        save_directory (`str` or `os.PathLike`): must not exist or be empty; complete or not made at all.
        base (`str` or `os.PathLike`, *optional*): folder or Hub id; the one the artifact names if not given.
        force (`bool`): skip the check that the base is the right one.

    Returns:
        `Path`: the folder.

    Raises:
        `DeltaError`: the base is another one, or has no safetensors. `ArtifactError`: the folder is not empty, or
            no base is known.
    """
    artifact = source if isinstance(source, OSDArtifact) else OSDArtifact.from_pretrained(source)
    name = os.fspath(base or artifact.config.base_model_name_or_path or "")
    if not name:
        raise ArtifactError("the artifact names no base model; give the folder or Hub id of it as base.")
    target = Path(save_directory)
    if target.exists() and any(target.iterdir()):
        raise ArtifactError(f"{target} is not empty; restore writes a new folder: give another one.")
    with Checkpoint.open(name, revision=None if base else artifact.config.revision) as opened:
        artifact.check_base(opened, force)
        places = opened.places()
        aliases = {name: name for name in opened.names} | opened.tied
    patterns = ["*.safetensors", *("*" + ending for ending in BESIDE)]
    folder = local_folder(name, None if base else artifact.config.revision, None, patterns)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        used = set()
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            if file.suffix in BESIDE:
                shutil.copyfile(file, partial / file.name)
            if file.suffix != ".safetensors":
                continue  # the base's weights in another format
            tensors, metadata, found = _with_deltas(file, artifact.deltas, places, aliases)
            used |= found
            save_file(tensors, partial / file.name, metadata=metadata)
        if missing := set(artifact.deltas) - used:
            raise DeltaError(f"{name} stores no tensor {sorted(missing)[0]!r}; give the base as it was compressed.")
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _with_deltas(
    file: Path, deltas: dict[str, Delta], places: dict[tuple[str, str], str], aliases: dict[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str], set[str]]:
    """The tensors of a file with the deltas added, its metadata, and which deltas were.

    `places` gives the name of the weight a file holds under a key. What is not there may be a copy of a tied weight, or a
    second file of the same weights: `aliases` has every name and the weight it stands for.
    """
    tensors, used = {}, set()
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {"format": "pt"}
        for key in opened.keys():  # noqa: SIM118 - not a dict
            tensors[key] = opened.get_tensor(key)
            name = places.get((file.name, key), aliases.get(key))
            if name in deltas:
                wide = tensors[key].float() + torch.from_numpy(deltas[name].dense())
                tensors[key] = wide.to(tensors[key].dtype)
                used.add(name)
    return tensors, metadata, used


def read_weights(file: Path) -> tuple[dict[str, Delta], np.ndarray | None]:
    """Deltas and the relative error of each, if it was stored.

    Raises:
        `ArtifactError`: no such file. `BlobError`: it is not one of ours.
    """
    if not file.is_file():
        raise ArtifactError(f"{file} does not exist; an OSD folder holds {ADAPTER_CONFIG} and {WEIGHTS_NAME}.")
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            key = next((key for key in keys if key.split(".")[-1] == BLOB_KEY), None)
            if key is None:
                raise BlobError(f"{file} holds no tensor {BLOB_KEY!r}: it is not an OSD delta.")
            blob = opened.get_tensor(key)
            errors = opened.get_tensor(ERROR_KEY) if ERROR_KEY in keys else None
    except SafetensorError as error:
        raise BlobError(f"{file} cannot be read ({error}): it is truncated or damaged; download it again.") from None
    deltas = decode_tensor(blob)
    if errors is None or errors.shape != (len(deltas),) or not errors.is_floating_point():
        return deltas, None
    return deltas, errors.float().nan_to_num(0.0, 0.0, 0.0).numpy()


def decode_tensor(blob: torch.Tensor) -> dict[str, Delta]:
    """The deltas of a uint8 tensor."""
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise BlobError(f"the blob is a {blob.dtype} tensor of shape {tuple(blob.shape)}; expected uint8 of one axis.")
    return decode(blob.cpu().numpy().tobytes())


def local_folder(
    source: str | os.PathLike, revision: str | None, token: str | None, patterns: Sequence[str] = ARTIFACT_FILES
) -> Path:
    """A folder as it is, a Hub id as its snapshot of the files that match."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(os.fspath(source), revision=revision, token=token, allow_patterns=list(patterns))
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            f"{os.fspath(source)!r} is no folder and could not be fetched from the Hub: {reason} Check the name, the "
            "revision, the token and HF_HUB_OFFLINE."
        ) from error


def replace_folder(partial: Path, target: Path) -> None:
    """Put a finished folder in the place of `target`; the old one goes only when the new one is there."""
    os.chmod(partial, 0o755)
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, target)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; an OSD folder holds it; check the path.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from None
    if not isinstance(data, dict) or data.get("peft_type") != PEFT_TYPE:
        found = data.get("peft_type") if isinstance(data, dict) else type(data).__name__
        raise ArtifactError(f"{path} has peft_type {found!r}, not {PEFT_TYPE!r}: it is another kind of adapter.")
    return data
