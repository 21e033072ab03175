"""A small artifact: two tensors in a safetensors file, a settings file and the manifest."""

from pathlib import Path

import numpy
from safetensors.numpy import save

from hf_ext.artifact import Artifact, Measured, write_manifest


WEIGHTS = "adapter_model.safetensors"


def make_artifact(folder: Path, weights: bytes | None = None, extra: bool = True, **fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"a": numpy.arange(40_000, dtype=numpy.float32), "b": numpy.ones((3, 5), dtype=numpy.float32)}
    (folder / WEIGHTS).write_bytes(save(tensors) if weights is None else weights)
    if extra:
        (folder / "extra.json").write_text('{"x": 1}')
    settings = {"method": "osd", "library_name": "peft", "config": {"rank": 8}, **fields}
    write_manifest(folder, Artifact(**settings, measured=(Measured("bytes before", 538090408, "bytes"),)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class MakesArtifact:
    """What a method's result looks like to `push_artifact`."""

    folder = None

    def save_pretrained(self, folder):
        self.folder = make_artifact(Path(folder))
