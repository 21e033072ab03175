"""A folder in the place of the Hub: what was pushed comes back, nothing is ever there by halves, the rest is refused."""

import errno
import os
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from hf_ext.artifact import MANIFEST_NAME, read_artifact
from hf_ext.errors import ArtifactError, HubError
from hf_ext.hub_tools import folder_hub, push
from hf_ext.hub_tools.push import pull_artifact, push_artifact
from tests.hub_tools.helpers import WEIGHTS, MakesArtifact, contents, make_artifact


@pytest.fixture
def shelf(tmp_path):
    """The folder of all repositories; its name needs quoting in a URL."""
    made = tmp_path / "a shelf#1"
    made.mkdir()
    return made


@pytest.fixture
def send(shelf, folder):
    def send(repo_id="user/delta", artifact=folder, **options):
        return push_artifact(artifact, repo_id, **{"endpoint": shelf.as_uri(), **options})

    return send


@pytest.fixture
def fetch(shelf, tmp_path):
    def fetch(repo_id="user/delta", local_dir=tmp_path / "pulled", **options):
        return pull_artifact(repo_id, local_dir, **{"endpoint": shelf.as_uri(), **options})

    return fetch


@pytest.fixture
def breaks(monkeypatch):
    """Copying stops in the middle of the second file."""

    def breaks(error):
        calls, copy = [], shutil.copyfile

        def copyfile(source, target):
            calls.append(target)
            if len(calls) == 1:
                return copy(source, target)
            Path(target).write_bytes(Path(source).read_bytes()[:10])
            raise error

        monkeypatch.setattr(folder_hub.shutil, "copyfile", copyfile)
        return calls

    return breaks


def test_what_was_pushed_comes_back_bit_by_bit(shelf, folder, send, fetch, tmp_path):
    (folder / "lora").mkdir()
    (folder / "lora" / "x.safetensors").write_bytes(b"lora")
    report = send(license="mit")
    expected = {**contents(folder), "README.md": report.card.encode()}
    assert contents(shelf / "user" / "delta") == expected
    assert fetch() == tmp_path / "pulled"
    assert contents(tmp_path / "pulled") == expected
    assert read_artifact(tmp_path / "pulled").method == "osd"
    assert sorted(path.name for path in tmp_path.iterdir()) == [shelf.name, "artifact", "pulled"]
    assert [path.name for path in (shelf / "user").iterdir()] == ["delta"]


def test_the_report_names_files_and_place(shelf, send):
    report = send()
    assert report.files == {name: len(data) for name, data in sorted(contents(shelf / "user" / "delta").items())}
    assert report.url == (shelf / "user" / "delta").as_uri()
    assert (report.repo_id, report.revision, report.dry_run) == ("user/delta", None, False)
    assert (report.commit, report.pull_request, report.left_over) == (None, None, ())


def test_the_folder_that_is_pushed_stays_as_it_was(folder, send):
    (folder / "README.md").write_text("mine")
    before = contents(folder)
    send()
    assert contents(folder) == before


def test_nobody_is_asked(tmp_path, send, fetch, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(push, "hub_api", refuse)
    report = send(artifact=make_artifact(tmp_path / "based", base_model="org/base"))
    assert "license" not in yaml.safe_load(report.card.split("---\n")[1])
    fetch()


def test_a_dry_run_writes_nothing(shelf, send):
    report = send(dry_run=True)
    assert report.dry_run
    assert report.files["README.md"] == len(report.card.encode())
    assert list(shelf.iterdir()) == []


def test_an_object_is_saved_and_pushed(shelf, send):
    send(artifact=MakesArtifact())
    assert WEIGHTS in contents(shelf / "user" / "delta")


def test_the_snippet_runs_with_the_real_hub_as_its_hub(tmp_path, shelf, send):
    snippet = "import os\nassert not os.environ.get('HF_ENDPOINT', '').startswith('file:')\nos.listdir(REPO)"
    send(artifact=make_artifact(tmp_path / "a", snippet=snippet))
    with pytest.raises(ArtifactError, match="the loading snippet fails"):
        send("user/other", make_artifact(tmp_path / "b", snippet="1 / 0"))
    assert [path.name for path in (shelf / "user").iterdir()] == ["delta"]
    send("user/other", tmp_path / "b", run_snippet=False)


def test_a_second_push_replaces_the_first_whole(shelf, folder, send):
    send()
    (folder / "extra.json").unlink()
    (folder / WEIGHTS).write_bytes(b"new")
    report = send()
    assert contents(shelf / "user" / "delta") == {**contents(folder), "README.md": report.card.encode()}
    assert report.left_over == ()
    assert [path.name for path in (shelf / "user").iterdir()] == ["delta"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()])
def test_a_push_that_breaks_leaves_nothing(shelf, send, breaks, error):
    breaks(error)
    with pytest.raises((HubError, KeyboardInterrupt)):
        send()
    assert list(shelf.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "input/output error"), "pushing to user/delta: .*input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), "pushing to user/delta: the disk is full"),
    ],
)
def test_a_push_that_breaks_leaves_the_repository_as_it_was(shelf, folder, send, breaks, error, message):
    send()
    before = contents(shelf)
    (folder / WEIGHTS).write_bytes(b"new")
    calls = breaks(error)
    with pytest.raises(HubError, match=message):
        send()
    assert len(calls) == 2
    assert contents(shelf) == before


def test_a_rename_that_fails_brings_the_repository_back(shelf, folder, send, monkeypatch):
    send()
    before, replace = contents(shelf), os.replace

    def fail_on_new(source, target):
        if str(source).endswith("new"):
            raise OSError(errno.EIO, "input/output error")
        replace(source, target)

    (folder / WEIGHTS).write_bytes(b"new")
    monkeypatch.setattr(os, "replace", fail_on_new)
    with pytest.raises(HubError, match="input/output error"):
        send()
    assert contents(shelf) == before


def test_a_pull_that_breaks_leaves_nothing(send, fetch, tmp_path, breaks):
    send()
    breaks(OSError(errno.EIO, "input/output error"))
    with pytest.raises(HubError, match="pulling user/delta: .*input/output error"):
        fetch()
    assert not [path for path in tmp_path.iterdir() if "pulled" in path.name]


def test_a_file_that_changes_on_the_way_is_noticed(shelf, folder, send, fetch, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def shortened(source, target):
        copy(source, target)
        if Path(source).name == WEIGHTS:
            Path(target).write_bytes(b"short")

    send()
    monkeypatch.setattr(folder_hub.shutil, "copyfile", shortened)
    for call in (send, fetch):
        with pytest.raises(HubError, match=f"{WEIGHTS} did not arrive as declared"):
            call()
    assert not (tmp_path / "pulled").exists()
    assert (shelf / "user" / "delta" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_push_during_a_pull_does_not_mix_two_artifacts(send, fetch, folder, tmp_path, monkeypatch):
    """The other artifact has files of the same sizes, so that only the folder tells them apart."""
    send()
    copy, pushed = shutil.copyfile, []

    def then_push(source, target):
        copy(source, target)
        if not pushed and Path(target).is_relative_to(tmp_path) and "pulled" in str(target):
            pushed.append(target)
            (folder / WEIGHTS).write_bytes(bytes((folder / WEIGHTS).stat().st_size))
            send()

    monkeypatch.setattr(folder_hub.shutil, "copyfile", then_push)
    with pytest.raises(HubError, match="changed while it was read; repeat it"):
        fetch()
    assert not (tmp_path / "pulled").exists()
    monkeypatch.undo()
    assert (fetch() / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_an_existing_target_is_kept_unless_told_otherwise(send, fetch, tmp_path):
    send()
    make_artifact(tmp_path / "pulled", weights=b"old")
    with pytest.raises(HubError, match="pass force=True"):
        fetch()
    assert (tmp_path / "pulled" / WEIGHTS).read_bytes() == b"old"
    assert (fetch(force=True) / WEIGHTS).read_bytes() != b"old"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"revision": "main"}, "revision='main'"),
        ({"create_pr": True}, "create_pr=True"),
        ({"private": True}, "private=True"),
        ({"commit_message": "x"}, "commit_message='x'"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_a_folder_does_not_have_is_refused(shelf, send, options, named, dry_run):
    with pytest.raises(HubError, match=f"{named} with endpoint=.*: a folder has no revisions, commits"):
        send(**options, dry_run=dry_run)
    assert list(shelf.iterdir()) == []


def test_a_pull_of_a_revision_is_refused(send, fetch, tmp_path):
    send()
    with pytest.raises(HubError, match="revision='v2' with endpoint=.*: a folder has no revisions"):
        fetch(revision="v2")
    assert not (tmp_path / "pulled").exists()


def test_an_id_needs_an_owner_and_cannot_lead_out(shelf, send, fetch):
    for call in (send, fetch):
        with pytest.raises(HubError, match="'delta' names no owner.*write 'user/delta'"):
            call("delta")
        for repo_id in ("../delta", "user/..", "..", "a/b/c", "/etc/x", "user/.hidden"):
            with pytest.raises(HubError, match="is not a repository id"):
                call(repo_id)
    assert list(shelf.iterdir()) == []


def test_a_missing_repository_or_folder_is_named(shelf, send, fetch, tmp_path):
    with pytest.raises(HubError, match="holds no repository user/delta; check the name"):
        fetch()
    for call in (send, fetch):
        with pytest.raises(HubError, match="absent is not a folder.*make it, or mount it"):
            call(endpoint=(tmp_path / "absent").as_uri())
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("endpoint", ["file://models/here", "file:models", "file://", "file:///a?b", "file:///a%00b"])
def test_a_url_that_names_no_folder_here_is_refused(send, fetch, endpoint):
    for call in (send, fetch):
        with pytest.raises(HubError, match="names no folder of this machine; write what Path.as_uri"):
            call(endpoint=endpoint)


def test_a_folder_that_is_no_artifact_is_not_replaced(shelf, send):
    (shelf / "user" / "delta").mkdir(parents=True)
    (shelf / "user" / "delta" / "thesis.txt").write_text("x")
    with pytest.raises(HubError, match="holds no artifact.json, so it is not replaced"):
        send()
    assert contents(shelf) == {"user/delta/thesis.txt": b"x"}
    with pytest.raises(ArtifactError, match="user/delta holds no artifact.json"):
        pull_artifact("user/delta", shelf / "x", endpoint=shelf.as_uri())


def test_pickles_are_refused_in_both_directions(shelf, folder, send, fetch, tmp_path):
    send()
    (shelf / "user" / "delta" / "model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="user/delta holds model.bin: such files can run code"):
        fetch()
    assert not (tmp_path / "pulled").exists()
    (folder / "x.pt").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="holds x.pt: such files can run code"):
        send("user/other")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["A.json", "a.json"], "differ only in upper and lower case"),
        (["a\\b.json"], "holds a backslash"),
        (["x\ny"], "holds control characters"),
    ],
)
def test_names_that_mean_another_file_elsewhere_are_refused(shelf, send, fetch, tmp_path, names, message):
    send()
    for name in names:
        (shelf / "user" / "delta" / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=message):
        fetch()
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("outside", [True, False])
def test_links_in_a_repository_are_refused(shelf, send, fetch, tmp_path, outside):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.json").write_text("secret")
    send()
    repository = shelf / "user" / "delta"
    for target in (tmp_path / "secret", tmp_path / "secret" / "x.json") if outside else (repository / "extra.json",):
        os.symlink(target, repository / "link.json")
        with pytest.raises(ArtifactError, match="link.json of user/delta is a link"):
            fetch()
        (repository / "link.json").unlink()
    assert not (tmp_path / "pulled").exists()


def test_a_repository_or_an_owner_that_is_a_link_is_refused(shelf, folder, send, fetch, tmp_path):
    (shelf / "user").mkdir()
    os.symlink(make_artifact(tmp_path / "elsewhere"), shelf / "user" / "delta")
    os.symlink(tmp_path, shelf / "other")
    before = contents(tmp_path / "elsewhere")
    for repo_id in ("user/delta", "other/elsewhere"):
        for call in (send, fetch):
            with pytest.raises(HubError, match="is a link or a file, and a repository is a folder"):
                call(repo_id)
    assert contents(tmp_path / "elsewhere") == before
    assert not (tmp_path / "pulled").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_refused_and_not_waited_for(shelf, send, fetch):
    send()
    os.mkfifo(shelf / "user" / "delta" / "pipe")
    with pytest.raises(ArtifactError, match="pipe of user/delta is a link or no file"):
        fetch()


def test_hidden_files_stay_in_the_repository(shelf, send, fetch):
    send()
    for name in (".gitattributes", ".git/config", "sub/.hidden"):
        path = shelf / "user" / "delta" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert not [name for name in contents(fetch()) if "/." in f"/{name}"]


def test_what_does_not_fit_on_the_disk_is_not_started(shelf, send, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(HubError, match="do not fit on the disk"):
        send()
    assert list(shelf.iterdir()) == []


def test_a_repository_is_readable_by_others(shelf, send):
    umask = os.umask(0o022)
    try:
        send()
    finally:
        os.umask(umask)
    repository = shelf / "user" / "delta"
    assert repository.stat().st_mode & 0o777 == 0o755
    assert (repository / MANIFEST_NAME).stat().st_mode & 0o777 == 0o644
