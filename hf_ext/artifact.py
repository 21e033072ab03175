"""What a stored result looks like on disk: any folder that holds `artifact.json` beside its other files.

The manifest says which method made the folder, for which base model, with which settings and which measured numbers,
and how to load it. It is compact JSON, because for a small artifact its bytes count. Whoever writes artifacts and
whoever publishes them share this file and know nothing of each other.

    {"format_version":1,"method":"osd","library_name":"peft","base_model":"org/name","base_revision":null,
     "license":null,"tags":[],"config":{...},"measured":[["bytes after",5000000,"bytes"],...],"snippet":"..."}
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ext.config import write_bytes_atomic
from hf_ext.errors import ArtifactError
from hf_ext.log import get_logger, warn_once


MANIFEST_NAME = "artifact.json"
CARD_NAME = "README.md"
LORA_FOLDER = "lora"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1_000_000

_METHOD = re.compile(r"[a-z][a-z0-9_]*")
_REPO = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[\w-][\w./-]*", re.ASCII)

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Measured:
    """One number that was measured when the artifact was made.

    Args:
        what (`str`): What the number is, for example `"bytes after"` or `"relative error, q_proj"`.
        value (`float`): The number; finite.
        unit (`str`, defaults to `""`): Its unit, empty for a pure number.
    """

    what: str
    value: float
    unit: str = ""

    def __post_init__(self) -> None:
        _need(_is_line(self.what) and self.what, "measured", [self.what], "needs a name of one line")
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        # A comparison, because isfinite overflows on a long integer.
        _need(
            number and abs(self.value) <= sys.float_info.max,
            f"measured {self.what!r}",
            self.value,
            "must be a finite number",
        )
        _need(_is_line(self.unit), f"measured {self.what!r}", self.unit, "needs a unit of one line")


@dataclass(frozen=True)
class Artifact:
    """The manifest of an artifact, and the folder it was read from.

    Args:
        method (`str`): Id of the method, for example `"osd"`.
        library_name (`str`, defaults to `"hf-ext"`): Library the files open in, as the Hub names it.
        base_model (`str`, *optional*): Hub id of the model the artifact belongs to.
        base_revision (`str`, *optional*): Commit of the base model.
        license (`str`, *optional*): Licence id, where it is known.
        tags (`tuple[str, ...]`): Tags besides those every card carries.
        config (`dict`): The exact settings, plain JSON types.
        measured (`tuple[Measured, ...]`): Numbers for the card.
        snippet (`str`, *optional*): Python source that loads the artifact from `REPO`, a folder or a repository id.
        folder (`Path`, *optional*): Where it lies; `None` for one that is not written yet.

    Raises:
        ArtifactError: a field holds what the manifest cannot.
    """

    method: str
    library_name: str = "hf-ext"
    base_model: str | None = None
    base_revision: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    snippet: str | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        _need(_matches(_METHOD, self.method), "method", self.method, "must be a method id: a-z, 0-9 and _")
        _need(_is_line(self.library_name) and self.library_name, "library_name", self.library_name, "must be a word")
        _need(
            self.base_model is None or _matches(_REPO, self.base_model),
            "base_model",
            self.base_model,
            "is not a Hub id such as 'org/name'; use None for a model that is not on the Hub",
        )
        _need(
            self.base_revision is None or _matches(_REVISION, self.base_revision),
            "base_revision",
            self.base_revision,
            "must be a commit or None",
        )
        _need(self.license is None or _is_line(self.license), "license", self.license, "must be one line or None")
        tags = isinstance(self.tags, list | tuple) and all(_is_line(tag) and tag for tag in self.tags)
        _need(tags, "tags", self.tags, "must be a list of words")
        _need(isinstance(self.config, dict), "config", self.config, "must be a dict of settings")
        rows = isinstance(self.measured, list | tuple) and all(isinstance(row, Measured) for row in self.measured)
        _need(rows, "measured", self.measured, "must be a list of Measured")
        _need(self.snippet is None or _is_text(self.snippet), "snippet", self.snippet, "must be source text")
        object.__setattr__(self, "tags", tuple(self.tags))
        object.__setattr__(self, "measured", tuple(self.measured))
        if self.folder is not None:
            object.__setattr__(self, "folder", Path(self.folder))

    def files(self) -> dict[str, int]:
        """Every file of the folder, by its name relative to it with forward slashes, and its size in bytes.

        Raises:
            ArtifactError: there is no folder, or it holds a hidden file or a link that leads out of it.
        """
        if self.folder is None:
            raise ArtifactError("this artifact has no folder yet; write_manifest and read_artifact give it one.")
        return _list_files(self.folder)

    def nbytes(self) -> int:
        """Bytes of the files without the card and without the `lora` subfolder, which repeats the same weights."""
        return sum(
            size for name, size in self.files().items() if name != CARD_NAME and name.split("/")[0] != LORA_FOLDER
        )


def manifest_bytes(artifact: Artifact) -> bytes:
    """What `artifact.json` holds.

    Args:
        artifact (`Artifact`): What to write; its own `folder` is not stored.

    Raises:
        ArtifactError: the config is not plain JSON, a number is not finite, or the manifest exceeds its limit.
    """
    data = {
        "format_version": FORMAT_VERSION,
        "method": artifact.method,
        "library_name": artifact.library_name,
        "base_model": artifact.base_model,
        "base_revision": artifact.base_revision,
        "license": artifact.license,
        "tags": list(artifact.tags),
        "config": artifact.config,
        "measured": [[row.what, row.value, row.unit] for row in artifact.measured],
        "snippet": artifact.snippet,
    }
    try:
        found = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST_NAME} cannot hold what JSON cannot say: {error}.") from None
    if len(found) > MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"{MANIFEST_NAME}: {len(found)} bytes exceed the limit of {MAX_MANIFEST_BYTES}; store tables elsewhere."
        )
    return found


def write_manifest(folder: str | os.PathLike, artifact: Artifact) -> Path:
    """Write `artifact.json` into `folder`, in one step.

    Args:
        folder (`str` or `os.PathLike`): Made if it does not exist. The other files are the caller's business.
        artifact (`Artifact`): What to write; its own `folder` is not stored.

    Returns:
        `Path`: the manifest.

    Raises:
        ArtifactError: as `manifest_bytes`.
    """
    return write_bytes_atomic(Path(folder) / MANIFEST_NAME, manifest_bytes(artifact))


def read_artifact(folder: str | os.PathLike) -> Artifact:
    """Read and check the manifest of a folder.

    Args:
        folder (`str` or `os.PathLike`): A local folder with `artifact.json` in it.

    Raises:
        ArtifactError: there is no manifest, it is not what this version can read, or one of its fields is wrong.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder} is not an artifact: it holds no {MANIFEST_NAME}.") from None
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; it is not read.")
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}.") from None
    try:
        return _from_json(data, Path(folder))
    except (ArtifactError, RecursionError) as error:
        raise ArtifactError(f"{path}: {error}") from None


def safe_name(name: str) -> str:
    """Check the name of a file in a repository before anything is written under it.

    Args:
        name (`str`): Relative, with forward slashes.

    Returns:
        `str`: the same name.

    Raises:
        ArtifactError: written below a folder, the name could lead out of it or mean another file on some system.
    """
    parts = name.split("/") if isinstance(name, str) else []
    reason = None
    if not parts or not name:
        reason = "is empty"
    elif not name.isprintable():
        reason = "holds control characters"
    elif "\\" in name or ":" in name:
        reason = "holds a backslash or a colon"
    elif name.startswith(("/", "~")):
        reason = "is absolute"
    elif any(part in ("", ".", "..") for part in parts):
        reason = "holds an empty part, '.' or '..'"
    elif any(part[-1] in ". " for part in parts):
        reason = "has a part that ends in a dot or a space"
    if reason:
        raise ArtifactError(f"file name {name!r} {reason}; it is refused. Ask the owner to rename the file.")
    return name


def _from_json(data: Any, folder: Path) -> Artifact:
    _need(isinstance(data, dict), "the manifest", data, "must be a JSON object")
    version = data.get("format_version")
    _need(isinstance(version, int) and not isinstance(version, bool), "format_version", version, "must be an integer")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"format_version {version} is newer than {FORMAT_VERSION}, the newest this hf-ext reads; "
            "upgrade it with `pip install -U hf-ext`."
        )
    _need(version >= 1, "format_version", version, "must be at least 1")
    known = ("method", "library_name", "base_model", "base_revision", "license", "tags", "config", "snippet")
    unknown = sorted(set(data) - {*known, "format_version", "measured"})
    if unknown:
        warn_once(_logger, f"{MANIFEST_NAME} in {folder}: unknown keys {', '.join(unknown)} are ignored.")
    _need("method" in data, "method", None, "is missing")
    rows = data.get("measured", [])
    _need(isinstance(rows, list), "measured", rows, "must be a list of [what, value, unit]")
    for row in rows:
        _need(isinstance(row, list) and len(row) == 3, "measured", row, "must be [what, value, unit]")
    _need(_is_finite(data.get("config")), "config", "...", "holds a number that is not finite")
    fields = {key: data[key] for key in known if key in data}
    return Artifact(**fields, measured=tuple(Measured(*row) for row in rows), folder=folder)


def _list_files(folder: Path) -> dict[str, int]:
    root = folder.resolve()
    found = {}
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in sorted([*folders, *names]):
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            if name.startswith("."):
                raise ArtifactError(
                    f"{relative} is hidden; an artifact holds no hidden files, remove it from {folder}."
                )
            if path.is_symlink() and (name in folders or not path.resolve().is_relative_to(root)):
                raise ArtifactError(f"{relative} is a link out of the folder or to a folder; put a copy in its place.")
            if name in names:
                if not path.is_file():
                    raise ArtifactError(f"{relative} is neither a file nor a folder; remove it from {folder}.")
                found[safe_name(relative)] = path.stat().st_size
    return dict(sorted(found.items()))


def _need(condition: object, name: str, value: Any, expectation: str) -> None:
    if not condition:
        shown = repr(value)
        raise ArtifactError(f"{name} {expectation}; found {shown if len(shown) <= 200 else shown[:200] + '...'}.")


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and (value == "" or value.isprintable())


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _matches(pattern: re.Pattern, value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200 and pattern.fullmatch(value) is not None


def _is_finite(value: Any) -> bool:
    # 1e999 is valid JSON and becomes infinity without a word.
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_is_finite(item) for item in value.values())
    return not isinstance(value, list) or all(_is_finite(item) for item in value)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _raise(error: OSError) -> None:
    raise error
