"""Folders that appear when they are complete: what pushing into a folder and pulling into one have in common."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from hf_ext.artifact import MANIFEST_NAME, read_artifact
from hf_ext.errors import ArtifactError, HfExtError, HubError
from hf_ext.hub_tools.client import attempt


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def refuse_pickles(names: dict[str, int], subject: str) -> None:
    """Raise `ArtifactError` if a file can run code when it is opened; `subject` starts the message."""
    bad = [name for name in names if PurePosixPath(name).suffix.lower() in PICKLE_SUFFIXES]
    if bad:
        raise ArtifactError(
            f"{subject} {', '.join(bad)}: such files can run code when they are opened. Use safetensors instead."
        )


def check_listing(sizes: dict[str, int], repo_id: str) -> dict[str, int]:
    """The files of a repository by name, refused as a whole (`ArtifactError`) where one of them is unsound."""
    if len({name.casefold() for name in sizes}) != len(sizes):
        raise ArtifactError(f"{repo_id} holds file names that differ only in upper and lower case; it is refused.")
    refuse_pickles(sizes, f"{repo_id} holds")
    if MANIFEST_NAME not in sizes:
        raise ArtifactError(
            f"{repo_id} holds no {MANIFEST_NAME}: hf-ext did not push it; use snapshot_download for it."
        )
    return dict(sorted(sizes.items()))


def check_target(target: Path, force: bool) -> None:
    """Raise `HubError` unless `target` is free, an empty folder, or, with `force`, an artifact that may be replaced."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise HubError(f"{target} exists and is not a folder; choose another name.")
    empty = not any(target.iterdir())
    if not empty and not force:
        raise HubError(f"{target} exists already; pass force=True to replace it, or choose another local_dir.")
    if not empty and not (target / MANIFEST_NAME).is_file():
        raise HubError(f"{target} holds no {MANIFEST_NAME}, so it is not replaced; choose another name.")


def put_in_place(target: Path, sizes: dict[str, int], doing: str, fill: Callable[[Path], None]) -> None:
    """Make an artifact folder in one step: filled under another name beside `target`, read again, then renamed.

    Args:
        target (`Path`): What `check_target` let pass; replaced if it exists.
        sizes (`dict[str, int]`): The files it has to hold, by name.
        doing (`str`): Starts the message, for example `"pulling user/name"`.
        fill (`Callable[[Path], None]`): Makes the folder it is given and writes the files. It may be called again.

    Raises:
        HubError: they do not fit, could not be written, or did not arrive. `target` is as it was before.
    """
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if sum(sizes.values()) > shutil.disk_usage(parent).free:
            raise HubError(
                f"{doing}: {sum(sizes.values())} bytes do not fit on the disk of {parent}; free some space."
            )
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}.", ignore_cleanup_errors=True) as staging:
            fresh = Path(staging) / "new"
            attempt(doing, lambda: fill(fresh))
            found = read_artifact(fresh).files()
            if found != sizes:
                wrong = sorted(name for name in {*found, *sizes} if found.get(name) != sizes.get(name))
                raise HubError(f"{doing}: {', '.join(wrong)} did not arrive as declared; repeat it.")
            _replace(fresh, target, Path(staging) / "old")
    except HfExtError:
        raise
    except OSError as error:
        raise HubError(f"{doing}: {error}; see to that and repeat it.") from error


def _replace(fresh: Path, target: Path, old: Path) -> None:
    if os.path.lexists(target):
        os.replace(target, old)
    try:
        os.replace(fresh, target)
    except OSError:
        if os.path.lexists(old):
            os.replace(old, target)
        raise
