"""Publishing an artifact folder on the Hub, and fetching one, so that neither end ever holds half of it.

A push is one commit on top of the state that was looked at first: a change in between is refused by the Hub, and a
commit whose answer got lost is found again instead of made twice. A pull downloads beside its target, checks, renames.
With a `file://` endpoint a folder takes the place of the Hub, see `folder_hub.py`.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm, validate_repo_id

import hf_ext
from hf_ext.artifact import CARD_NAME, MANIFEST_NAME, read_artifact, safe_name
from hf_ext.errors import ArtifactError, HubError
from hf_ext.hub_tools import folder_hub
from hf_ext.hub_tools.card import render_card, runnable
from hf_ext.hub_tools.client import attempt, hub_api
from hf_ext.hub_tools.staging import check_listing, check_target, put_in_place, refuse_pickles
from hf_ext.log import get_logger, warn_once


# Above this many bytes one request is too long to lose; upload_folder resumes, at the price of more than one commit.
LARGE_BYTES = 5_000_000_000
SNIPPET_SECONDS = 900
LICENSE_SECONDS = 10

_COMMIT = re.compile(r"[0-9a-f]{40}")
_logger = get_logger(__name__)


class SavesArtifact(Protocol):
    """Anything whose `save_pretrained(folder)` writes an artifact folder."""

    def save_pretrained(self, save_directory: str, /) -> object:
        """Write the files and the manifest into a folder."""


@dataclass(frozen=True)
class PushReport:
    """What a push did, or would do.

    Args:
        repo_id (`str`): The repository, with its namespace once it is known.
        revision (`str`, *optional*): The branch that was asked for; `None` is the default branch.
        files (`dict[str, int]`): Names in the repository and their bytes, the card included.
        card (`str`): The text of the card.
        dry_run (`bool`): `True` where nothing was sent.
        commit (`str`, *optional*): Commit that holds the artifact; a folder has none.
        url (`str`, *optional*): Page of that commit, or the repository's folder as a `file://` URL.
        pull_request (`str`, *optional*): Page of the pull request, if one was opened.
        left_over (`tuple[str, ...]`): Files the repository had before and the artifact does not have. They stay.
    """

    repo_id: str
    revision: str | None
    files: dict[str, int]
    card: str = field(repr=False)
    dry_run: bool
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None
    left_over: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())


def push_artifact(
    artifact: str | os.PathLike | SavesArtifact,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    license: str | None = None,
    dry_run: bool = False,
    run_snippet: bool = True,
    endpoint: str | None = None,
) -> PushReport:
    """Publish an artifact with a card made from its manifest.

    The card replaces the `README.md` of the repository; one that lies in the folder is neither sent nor changed.

    Args:
        artifact (`str`, `os.PathLike` or object):
            A folder with `artifact.json`, or an object whose `save_pretrained(folder)` writes one.
        repo_id (`str`): `"user/name"`, made if it does not exist; `"name"` goes to the owner of the token.
        private (`bool`, *optional*): For a new repository. `True` also refuses to push to one that is public.
        revision (`str`, *optional*): An existing branch.
        commit_message (`str`, *optional*): Defaults to one that names the method.
        create_pr (`bool`, defaults to `False`): Open a pull request against the default branch instead.
        token (`str` or `bool`, *optional*): Defaults to the stored one.
        license (`str`, *optional*): Defaults to the one in the manifest, then to that of the base model's card.
        dry_run (`bool`, defaults to `False`): Only report. Nothing is sent, asked or executed.
        run_snippet (`bool`, defaults to `True`):
            Run the manifest's loading snippet on the folder first, in another Python, and stop if it fails. It is code
            from the manifest: pass `False` for a folder you did not make.
        endpoint (`str`, *optional*):
            Another Hub, or the `file://` URL of a folder, such as `Path.as_uri()` gives: there a repository is the folder
            `user/name`, replaced as a whole, without revisions, pull requests or owners of tokens.

    Returns:
        `PushReport`

    Raises:
        ArtifactError: the folder is not an artifact, holds files that do not belong there, or its snippet fails.
        HubError: the Hub could not take it; the message says what to do. Nothing is published then, except that a push of
            more than `LARGE_BYTES`, which takes several commits, may have sent a part of the weights.

    Example:
        ```python
        from hf_ext import push_artifact

        print(push_artifact("my-delta", "user/my-delta", dry_run=True).card)
        ```
    """
    _check_repo_id(repo_id)
    shelf = folder_hub.folder_of(endpoint)
    if shelf is not None:
        options = {"revision": revision, "create_pr": create_pr, "private": private, "commit_message": commit_message}
        folder_hub.check_request(endpoint, repo_id, **options)
    if create_pr and revision not in (None, "main"):
        raise HubError(
            f"revision={revision!r} with create_pr=True: pull requests go to the default branch; leave it out."
        )
    with _folder_of(artifact) as folder:
        made = read_artifact(folder)
        files = made.files()
        refuse_pickles(files, f"{folder} holds")
        doing = f"pushing to {repo_id}"
        if dry_run:
            card = render_card(made, repo_id, license)
            return PushReport(repo_id, revision, _with_card(files, card), card, dry_run=True)
        if run_snippet and made.snippet:
            execute_snippet(folder, made.snippet, None if shelf else endpoint)
        if shelf is not None:
            card = render_card(made, repo_id, license)
            sent = _with_card(files, card)
            place = folder_hub.push_to(shelf, repo_id, folder, sent, card, doing)
            return PushReport(repo_id, None, sent, card, dry_run=False, url=place.as_uri())
        api = hub_api(token, endpoint)
        license = license or made.license or _base_license(api, made.base_model)
        repo_id = _create_repo(api, repo_id, private, doing)
        card = render_card(made, repo_id, license)
        message = commit_message or f"Upload {made.method} artifact with hf-ext"
        head, existing = _state(api, repo_id, revision, private, doing)
        info = _Upload(api, repo_id, folder, files, card, message, revision, create_pr, head, doing).run()
    left_over = tuple(sorted(existing - set(files) - {CARD_NAME}))
    if left_over:
        warn_once(_logger, f"{repo_id} still holds files that are not in the artifact: {', '.join(left_over)}.")
    return PushReport(
        repo_id,
        revision,
        _with_card(files, card),
        card,
        dry_run=False,
        commit=info.oid,
        url=info.commit_url,
        pull_request=info.pr_url,
        left_over=left_over,
    )


def pull_artifact(
    repo_id: str,
    local_dir: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    force: bool = False,
    endpoint: str | None = None,
) -> Path:
    """Fetch an artifact into a folder that appears when it is complete and checked.

    Names, kinds and sizes of all files are checked before the first byte is written. Hidden files of the repository
    (`.gitattributes`) are left there.

    Args:
        repo_id (`str`): `"user/name"`.
        local_dir (`str` or `os.PathLike`): The folder to make.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): Defaults to the stored one.
        force (`bool`, defaults to `False`): Replace `local_dir` if it holds an artifact already.
        endpoint (`str`, *optional*): Another Hub, or the `file://` URL of a folder that was pushed to.

    Returns:
        `Path`: `local_dir`.

    Raises:
        ArtifactError: the repository is not an artifact or holds files that are refused.
        HubError: the Hub, the network or the disk got in the way. `local_dir` is as it was before.
    """
    _check_repo_id(repo_id)
    target, doing = Path(local_dir), f"pulling {repo_id}"
    check_target(target, force)
    shelf = folder_hub.folder_of(endpoint)
    if shelf is not None:
        folder_hub.check_request(endpoint, repo_id, revision=revision)
        sizes, fetch = folder_hub.source(shelf, repo_id)
    else:
        sizes, fetch = _source(hub_api(token, endpoint), repo_id, revision, doing)
    put_in_place(target, sizes, doing, fetch)
    return target


def execute_snippet(folder: Path, snippet: str, endpoint: str | None = None) -> None:
    """Run a loading snippet on a local folder, in another Python.

    Args:
        folder (`Path`): What `REPO` stands for.
        snippet (`str`): Python source.
        endpoint (`str`, *optional*): Becomes `HF_ENDPOINT` of that Python.

    Raises:
        ArtifactError: it failed or ran longer than `SNIPPET_SECONDS`; the message ends with its last lines.
    """
    environment = {**os.environ, **({"HF_ENDPOINT": endpoint} if endpoint else {})}
    # So that it finds the hf_ext that runs now, installed or not.
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(hf_ext.__file__).resolve().parent.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "snippet.py"
        script.write_text(runnable(snippet, str(folder.resolve())), encoding="utf-8")
        try:
            ran = subprocess.run(
                [sys.executable, str(script)],
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=SNIPPET_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ArtifactError(
                f"the loading snippet ran longer than {SNIPPET_SECONDS} s; nothing was pushed. Shorten it, or pass "
                "run_snippet=False."
            ) from None
    if ran.returncode:
        last = "\n".join(ran.stderr.decode("utf-8", "replace").strip().splitlines()[-8:])
        raise ArtifactError(
            f"the loading snippet fails (exit code {ran.returncode}); nothing was pushed. Correct it in "
            f"{MANIFEST_NAME}, or pass run_snippet=False. Its last lines:\n{last}"
        )


@contextmanager
def _folder_of(artifact: str | os.PathLike | SavesArtifact) -> Iterator[Path]:
    if isinstance(artifact, str | os.PathLike):
        yield Path(artifact)
    elif hasattr(artifact, "save_pretrained"):
        with tempfile.TemporaryDirectory(prefix="hf-ext-") as folder:
            artifact.save_pretrained(folder)
            yield Path(folder)
    else:
        raise ArtifactError(f"{type(artifact).__name__} is neither a folder nor an object with save_pretrained.")


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise HubError(f"{repo_id!r} is not a repository id such as 'user/name': {error}") from None


def _with_card(files: dict[str, int], card: str) -> dict[str, int]:
    return dict(sorted({**files, CARD_NAME: len(card.encode())}.items()))


def _base_license(api: HfApi, base_model: str | None) -> str | None:
    if base_model is None:
        return None
    try:
        found = api.model_info(base_model, timeout=LICENSE_SECONDS).card_data
        license = found.get("license") if found else None
    except Exception as error:
        # A card without a licence is still a card; whatever went wrong must not stop the push.
        _logger.warning("no licence for the card: %s could not be read (%s).", base_model, type(error).__name__)
        return None
    if not isinstance(license, str):
        _logger.warning("no licence for the card: that of %s names none.", base_model)
        return None
    return license


def _create_repo(api: HfApi, repo_id: str, private: bool | None, doing: str) -> str:
    url = attempt(doing, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    return repo_id if "/" in repo_id else url.repo_id


def _state(
    api: HfApi, repo_id: str, revision: str | None, private: bool | None, doing: str
) -> tuple[str | None, set[str]]:
    info = attempt(doing, lambda: api.model_info(repo_id, revision=revision))
    if private and info.private is False:
        raise HubError(
            f"{doing}: the repository exists and is public, although private=True. Change it in its settings, or "
            "choose another name. Nothing was pushed."
        )
    names = {item.rfilename for item in info.siblings or []}
    return info.sha, {name for name in names if not name.startswith(".")}


@dataclass
class _Upload:
    """Everything one push sends, and where to."""

    api: HfApi
    repo_id: str
    folder: Path
    files: dict[str, int]
    card: str
    message: str
    revision: str | None
    create_pr: bool
    head: str | None
    doing: str

    def run(self) -> CommitInfo:
        if sum(self.files.values()) > LARGE_BYTES:
            return self.in_parts()
        return self.at_once(list(self.files), self.revision, self.create_pr, self.head)

    def at_once(self, names: list[str], revision: str | None, create_pr: bool, head: str | None) -> CommitInfo:
        """The named files and the card in one commit on top of `head`."""

        def call() -> CommitInfo:
            # Made anew for each try. Where an earlier one arrived after all, every file is found unchanged and the
            # client returns the commit that holds them.
            added = [CommitOperationAdd(CARD_NAME, self.card.encode())]
            added += [CommitOperationAdd(name, self.folder / name) for name in names if name != CARD_NAME]
            return self.api.create_commit(
                self.repo_id,
                added,
                commit_message=self.message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )

        return attempt(self.doing, call, repeat_when_unsure=not create_pr)

    def in_parts(self) -> CommitInfo:
        """The weights in as many commits as it takes, then the manifest, which makes it an artifact, with the card."""

        def call() -> CommitInfo:
            return self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=self.folder,
                commit_message=self.message,
                revision=self.revision,
                create_pr=self.create_pr,
                ignore_patterns=[CARD_NAME, MANIFEST_NAME],
            )

        weights = attempt(self.doing, call, repeat_when_unsure=not self.create_pr)
        if not self.create_pr:
            return self.at_once([MANIFEST_NAME], self.revision, False, weights.oid)
        if weights.pr_revision is None:
            # The weights were there already, so no pull request was needed for them.
            return self.at_once([MANIFEST_NAME], None, True, self.head)
        info = self.at_once([MANIFEST_NAME], weights.pr_revision, False, weights.oid)
        return replace(info, pr_url=weights.pr_url)


def _source(
    api: HfApi, repo_id: str, revision: str | None, doing: str
) -> tuple[dict[str, int], Callable[[Path], None]]:
    """The files of a repository at the newest commit of a revision, and what fetches them into a folder."""
    commit = attempt(doing, lambda: api.model_info(repo_id, revision=revision)).sha
    if not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
        raise HubError(f"{doing}: the Hub named no commit for revision {revision or 'main'!r}.")
    sizes = attempt(doing, lambda: _listed(api, repo_id, commit))

    def fetch(fresh: Path) -> None:
        api.snapshot_download(
            repo_id,
            revision=commit,
            local_dir=fresh,
            # The names that were checked, whatever the server lists the second time.
            allow_patterns=[glob.escape(name) for name in sizes],
            tqdm_class=_bounded_bar(2 * sum(sizes.values()) + 1_000_000, doing),
        )
        shutil.rmtree(fresh / ".cache", ignore_errors=True)

    return sizes, fetch


def _listed(api: HfApi, repo_id: str, commit: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in api.list_repo_tree(repo_id, recursive=True, revision=commit):
        if isinstance(item, RepoFile):
            name = safe_name(item.path)
            if any(part.startswith(".") for part in name.split("/")):
                continue
            if not isinstance(item.size, int) or item.size < 0:
                raise ArtifactError(f"{repo_id} declares {item.size!r} bytes for {name}; it is refused.")
            sizes[name] = item.size
    return check_listing(sizes, repo_id)


def _bounded_bar(limit: int, doing: str) -> type[tqdm]:
    """The client's progress bar, which also stops a server that sends more than it declared."""

    class Bar(tqdm):
        """Counts what passes through it, shown or not."""

        passed = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.passed += int(n or 0)
            if self.passed > limit:
                raise HubError(f"{doing}: the server sends more bytes than it declared; the download was stopped.")
            return super().update(n)

    return Bar
