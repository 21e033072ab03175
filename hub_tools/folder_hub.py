"""A folder in the place of the Hub: repositories as plain folders `<folder>/<user>/<name>`, named by a `file://` URL.

For machines without a network and disks that several of them share. The checks are those of the Hub's way; revisions,
pull requests and private repositories a folder does not have, and it is never asked for the licence of a base model.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from hf_ext.artifact import CARD_NAME, safe_name
from hf_ext.errors import ArtifactError, HubError
from hf_ext.hub_tools.staging import check_listing, check_target, put_in_place


def folder_of(endpoint: str | None) -> Path | None:
    """The folder a `file://` endpoint names; `None` for every other endpoint.

    Raises:
        HubError: the URL names no absolute path on this machine.
    """
    if endpoint is None or not endpoint.lower().startswith("file:"):
        return None
    parts = urlsplit(endpoint)
    path = url2pathname(parts.path)
    plain = parts.netloc in ("", "localhost") and not (parts.query or parts.fragment) and "\0" not in path
    if not plain or not Path(path).is_absolute():
        raise HubError(
            f"endpoint={endpoint!r} names no folder of this machine; write what Path.as_uri() of an absolute path gives, "
            "such as 'file:///models'."
        )
    return Path(path)


def check_request(endpoint: str | None, repo_id: str, **options: object) -> None:
    """Raise `HubError` unless the id is `"user/name"` and none of `options`, which need a Hub, is set."""
    if "/" not in repo_id:
        raise HubError(f"{repo_id!r} names no owner, and a folder has none of its own; write 'user/{repo_id}'.")
    asked = [f"{name}={value!r}" for name, value in options.items() if value]
    if asked:
        raise HubError(
            f"{', '.join(asked)} with endpoint={endpoint!r}: a folder has no revisions, commits, pull requests or private "
            "repositories; leave it out."
        )


def _place_of(folder: Path, repo_id: str) -> Path:
    """Where a repository lies or will lie."""
    if not folder.is_dir():
        raise HubError(f"{folder} is not a folder, so it holds no repositories; make it, or mount it.")
    place = folder / repo_id
    for step in (place.parent, place):
        if step.is_symlink() or (os.path.lexists(step) and not step.is_dir()):
            raise HubError(f"{step} is a link or a file, and a repository is a folder; put the folder in its place.")
    return place


def push_to(folder: Path, repo_id: str, artifact: Path, files: dict[str, int], card: str, doing: str) -> Path:
    """Write files and card as a repository, in one step; one that is there is replaced as a whole.

    Args:
        folder (`Path`): The folder of all repositories; it has to exist.
        repo_id (`str`): `"user/name"`.
        artifact (`Path`): The folder that is pushed.
        files (`dict[str, int]`): Names and bytes of the repository's files, the card included.
        card (`str`): Its text.
        doing (`str`): Starts the messages.

    Returns:
        `Path`: the repository.

    Raises:
        HubError: no such folder, something else lies in the repository's place, or it could not be written. What was there
            is there still.
    """
    place = _place_of(folder, repo_id)
    check_target(place, force=True)
    had_owner = place.parent.is_dir()

    def fill(fresh: Path) -> None:
        _copy(artifact, fresh, [name for name in files if name != CARD_NAME])
        (fresh / CARD_NAME).write_bytes(card.encode())

    try:
        put_in_place(place, files, doing, fill)
    except BaseException:
        if not had_owner:
            with suppress(OSError):  # another push may have put something there
                place.parent.rmdir()
        raise
    return place


def source(folder: Path, repo_id: str) -> tuple[dict[str, int], Callable[[Path], None]]:
    """The files of a repository by name and size, and what copies them into a folder.

    Hidden files and folders stay where they are.

    Raises:
        HubError: no such folder or repository. ArtifactError: it holds links or files that are refused.
    """
    place = _place_of(folder, repo_id)
    if not place.is_dir():
        raise HubError(f"{folder} holds no repository {repo_id}; check the name.")
    sizes: dict[str, int] = {}
    before = _identity(place)
    for parent, folders, names in os.walk(place, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *(name for name in names if not name.startswith("."))]:
            path = Path(parent) / name
            relative = safe_name(path.relative_to(place).as_posix())
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ArtifactError(f"{relative} of {repo_id} is a link or no file; it is refused. Put a copy there.")
            if path.is_file():
                sizes[relative] = path.stat().st_size
    sizes = check_listing(sizes, repo_id)

    def fill(fresh: Path) -> None:
        _copy(place, fresh, list(sizes))
        # A push renames: files read before and after it belong to different artifacts.
        if _identity(place) != before:
            raise HubError(f"{repo_id} was changed while it was read; repeat it.")

    return sizes, fill


def _copy(folder: Path, fresh: Path, names: list[str]) -> None:
    for name in names:
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, fresh / name)


def _identity(place: Path) -> tuple[int, int, int]:
    found = place.stat()
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _unreadable(error: OSError) -> None:
    raise HubError(f"{error}; make the repository readable.") from error
