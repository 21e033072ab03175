"""Push and pull over real HTTP against `tests.hub_server`, without faults in the way. Those are in `test_client.py`."""

import json
import logging
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants, snapshot_download

import hf_ext
from hf_ext.artifact import MANIFEST_NAME, Artifact, read_artifact
from hf_ext.errors import ArtifactError, HubError
from hf_ext.hub_tools import push
from hf_ext.hub_tools.push import push_artifact
from tests.hub_server import OWNER, READER
from tests.hub_tools.helpers import WEIGHTS, MakesArtifact, contents, make_artifact


def test_a_pushed_artifact_comes_back_bit_by_bit(hub, folder, send, fetch, tmp_path):
    report = send()
    assert fetch() == tmp_path / "pulled"
    got = contents(tmp_path / "pulled")
    assert got.pop("README.md") == report.card.encode()
    assert got == contents(folder)
    assert read_artifact(tmp_path / "pulled") == Artifact(
        **{**vars(read_artifact(folder)), "folder": tmp_path / "pulled"}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "pulled"]


def test_the_report_says_what_the_repository_now_holds(hub, send):
    report = send()
    stored = hub.server.files("user/delta")
    del stored[".gitattributes"]
    assert report.files == {name: len(data) for name, data in sorted(stored.items())}
    assert report.nbytes == sum(map(len, stored.values()))
    assert report.commit == hub.server.repos["user/delta"].branches["main"]
    assert report.url.endswith(f"user/delta/commit/{report.commit}")
    assert (report.dry_run, report.pull_request, report.left_over) == (False, None, ())


def test_everything_arrives_in_one_commit(hub, send):
    send(commit_message="the message")
    assert len(hub.server.repos["user/delta"].commits) == 2
    assert hub.server.head("user/delta").message == "the message"


def test_a_plain_snapshot_equals_the_folder(hub, folder, send):
    send()
    got = contents(Path(snapshot_download("user/delta", token=hub.token)))
    assert got[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert {*got} == {*contents(folder), "README.md", ".gitattributes"}


def test_the_client_says_who_asks(hub, send, fetch):
    send()
    fetch()
    assert all(agent.startswith(f"hf-ext/{hf_ext.__version__};") for agent in hub.server.agents)


def test_the_folder_is_left_as_it_was(folder, send):
    (folder / "README.md").write_text("a card of another tool")
    before = contents(folder)
    report = send()
    assert contents(folder) == before
    assert report.card.startswith("---\n")


def test_a_second_push_changes_only_what_changed_and_names_what_stays(hub, folder, send, caplog):
    first = send()
    assert send().commit == first.commit
    assert len(hub.server.repos["user/delta"].commits) == 2
    (folder / "extra.json").unlink()
    (folder / WEIGHTS).write_bytes(b"new")
    report = send()
    assert report.left_over == ("extra.json",)
    assert "still holds files that are not in the artifact: extra.json" in caplog.text
    assert hub.server.files("user/delta")[WEIGHTS] == b"new"
    assert "extra.json" in hub.server.files("user/delta")


def test_a_name_without_owner_goes_to_the_owner_of_the_token(hub, send):
    report = send("delta")
    assert report.repo_id == "user/delta"
    assert "# delta" in report.card
    assert "hf-ext restore user/delta" in report.card


def test_a_private_repository_is_for_its_owner(hub, send, fetch, tmp_path):
    send(private=True)
    assert hub.server.repos["user/delta"].private
    for token in (False, READER):
        with pytest.raises(HubError, match="token"):
            fetch(token=token)
    assert not (tmp_path / "pulled").exists()
    assert (fetch() / WEIGHTS).exists()


def test_private_is_not_quietly_public(hub, send):
    send()
    before = hub.server.head("user/delta")
    with pytest.raises(HubError, match="exists and is public, although private=True"):
        send(private=True, commit_message="secret")
    assert hub.server.head("user/delta") is before


def test_a_branch_keeps_its_own_artifact(hub, folder, send, fetch, tmp_path):
    send()
    HfApi(endpoint=hub.endpoint, token=hub.token).create_branch("user/delta", branch="v2")
    main = hub.server.files("user/delta")
    (folder / WEIGHTS).write_bytes(b"v2")
    report = send(revision="v2")
    assert report.revision == "v2"
    assert hub.server.files("user/delta") == main
    assert (fetch(revision="v2") / WEIGHTS).read_bytes() == b"v2"
    assert (fetch(local_dir=tmp_path / "main") / WEIGHTS).read_bytes() == main[WEIGHTS]
    assert (fetch(local_dir=tmp_path / "sha", revision=report.commit) / WEIGHTS).read_bytes() == b"v2"


def test_a_missing_revision_is_named(send, fetch):
    send()
    for call in (send, fetch):
        with pytest.raises(HubError, match="no such revision.*create the branch") as caught:
            call(revision="absent")
        assert caught.value.status == 404


def test_a_pull_request_leaves_main_alone(hub, send, fetch):
    hub.server.put("user/delta", {"note.txt": b"1"})
    report = send(create_pr=True)
    assert report.pull_request.endswith("user/delta/discussions/1")
    assert set(hub.server.files("user/delta")) == {"note.txt"}
    assert (fetch(revision="refs/pr/1") / WEIGHTS).exists()


def test_a_pull_request_against_a_branch_is_refused(hub, send):
    with pytest.raises(HubError, match="pull requests go to the default branch"):
        send(create_pr=True, revision="v2")
    assert hub.server.requests == []


def test_a_dry_run_asks_nobody(folder, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a dry run went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(push, "hub_api", refuse)
    monkeypatch.setattr(push, "execute_snippet", refuse)
    report = push_artifact(folder, "user/delta", revision="v2", license="mit", dry_run=True)
    assert (report.repo_id, report.revision, report.dry_run, report.commit) == ("user/delta", "v2", True, None)
    assert report.files == {
        **{name: len(data) for name, data in contents(folder).items()},
        "README.md": len(report.card.encode()),
    }
    assert yaml.safe_load(report.card.split("---\n")[1])["license"] == "mit"


def test_the_dry_run_shows_the_card_of_the_push(send):
    assert send(dry_run=True, license="mit").card == send(license="mit").card


def test_the_licence_is_that_of_the_base_model(hub, tmp_path, send):
    hub.server.put("org/base", {"README.md": b"---\nlicense: llama3.2\n---\n"})
    folder = make_artifact(tmp_path / "a", base_model="org/base")
    assert yaml.safe_load(send(artifact=folder).card.split("---\n")[1])["license"] == "llama3.2"
    assert yaml.safe_load(send(artifact=folder, license="mit").card.split("---\n")[1])["license"] == "mit"


@pytest.mark.parametrize("status", [None, 500, 404])
def test_an_unknown_licence_is_left_out_and_logged(hub, tmp_path, send, caplog, status):
    if status:
        hub.server.fail("models/org/base", status=status)
    else:
        hub.server.put("org/base", {"README.md": b"---\ntags: []\n---\n"})
    report = send(artifact=make_artifact(tmp_path / "a", base_model="org/base"))
    assert "license" not in yaml.safe_load(report.card.split("---\n")[1])
    assert "no licence for the card" in caplog.text
    assert report.commit


def test_an_object_is_saved_and_pushed(hub, send):
    saver = MakesArtifact()
    send(artifact=saver)
    assert WEIGHTS in hub.server.files("user/delta")
    assert not Path(saver.folder).exists()


def test_an_object_that_writes_no_artifact_is_refused(hub, send):
    class Writes:
        def save_pretrained(self, folder):
            Path(folder, "config.json").write_text("{}")

    with pytest.raises(ArtifactError, match="holds no artifact.json"):
        send(artifact=Writes())
    with pytest.raises(ArtifactError, match="int is neither a folder nor"):
        send(artifact=3)
    assert hub.server.repos == {}


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora/x.PT", "a.pth", "b.pkl", "c.ckpt", "d.pickle"])
def test_pickles_are_not_pushed(hub, folder, send, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=f"holds {name}: such files can run code.*safetensors"):
        send()
    assert hub.server.requests == []


def test_hidden_files_are_not_pushed(hub, folder, send):
    (folder / ".env").write_text("HF_TOKEN=secret")
    with pytest.raises(ArtifactError, match=".env is hidden"):
        send()
    assert hub.server.requests == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "", "user/..", "user/a b"])
def test_a_wrong_repository_id_is_refused_at_once(hub, send, fetch, repo_id):
    for call in (send, fetch):
        with pytest.raises(HubError, match="is not a repository id"):
            call(repo_id)
    assert hub.server.requests == []


def test_the_snippet_is_run_on_the_folder_before_the_push(hub, tmp_path, send, monkeypatch):
    snippet = (
        "import os, json, hf_ext\n"
        f"assert sorted(os.listdir(REPO)) == {sorted(['artifact.json', 'extra.json', WEIGHTS])!r}\n"
        "assert os.environ['HF_ENDPOINT']\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').write(REPO)"
    )
    folder = make_artifact(tmp_path / "a", snippet=snippet)
    monkeypatch.chdir(tmp_path)
    send(artifact=Path("a"))
    assert (tmp_path / "ran").read_text() == str(folder)
    assert "import os, json, hf_ext" in hub.server.files("user/delta")["README.md"].decode()


def test_a_snippet_that_fails_stops_the_push(hub, tmp_path, send):
    folder = make_artifact(tmp_path / "a", snippet="import os\nraise ValueError('no such layer in ' + REPO)")
    with pytest.raises(ArtifactError) as caught:
        send(artifact=folder)
    assert "the loading snippet fails (exit code 1); nothing was pushed" in str(caught.value)
    assert str(caught.value).endswith(f"ValueError: no such layer in {folder}")
    assert hub.server.requests == []
    assert send(artifact=folder, run_snippet=False).commit


def test_a_snippet_that_hangs_stops_the_push(hub, tmp_path, send, monkeypatch):
    monkeypatch.setattr(push, "SNIPPET_SECONDS", 0.3)
    with pytest.raises(ArtifactError, match="ran longer than 0.3 s; nothing was pushed"):
        send(artifact=make_artifact(tmp_path / "a", snippet="import time\ntime.sleep(60)"))
    assert hub.server.requests == []


@pytest.fixture(params=["one request", "hf_xet"])
def large(request, monkeypatch):
    """Makes every artifact a large one, for both ways the client uploads a folder."""
    monkeypatch.setattr(push, "LARGE_BYTES", 10)
    if request.param == "hf_xet":
        pytest.importorskip("hf_xet")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)


@pytest.mark.usefixtures("large")
def test_a_large_artifact_gets_its_manifest_last(hub, send, fetch):
    report = send()
    commits = list(hub.server.repos["user/delta"].commits.values())
    assert len(commits) == 3
    assert WEIGHTS in commits[1].files
    assert {MANIFEST_NAME, "README.md"}.isdisjoint(commits[1].files)
    assert {MANIFEST_NAME, "README.md"} <= set(commits[2].files)
    assert report.commit == hub.server.repos["user/delta"].branches["main"]
    assert (fetch() / WEIGHTS).exists()


@pytest.mark.usefixtures("large")
def test_a_large_pull_request_is_one_pull_request(hub, send, fetch, folder):
    hub.server.put("user/delta", {"note.txt": b"1"})
    report = send(create_pr=True)
    assert report.pull_request.endswith("/discussions/1")
    assert set(hub.server.repos["user/delta"].branches) == {"main", "refs/pr/1"}
    assert set(hub.server.files("user/delta")) == {"note.txt"}
    assert (fetch(revision="refs/pr/1") / WEIGHTS).exists()


@pytest.mark.usefixtures("large")
def test_a_large_pull_request_with_weights_that_are_there_leaves_main_alone(hub, send):
    send()
    before = hub.server.head("user/delta")
    report = send(create_pr=True, license="mit")
    assert hub.server.head("user/delta") is before
    assert "license: mit" in hub.server.files("user/delta", report.commit)["README.md"].decode()
    assert report.pull_request


def test_an_existing_folder_is_kept_unless_told_otherwise(hub, folder, send, fetch, tmp_path):
    send()
    target = make_artifact(tmp_path / "pulled", weights=b"old", extra=False)
    (target / "mine.txt").write_text("x")
    before = contents(target)
    with pytest.raises(HubError, match="exists already; pass force=True"):
        fetch()
    assert contents(target) == before
    fetch(force=True)
    assert contents(target) == {**contents(folder), "README.md": hub.server.files("user/delta")["README.md"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "pulled"]


def test_force_replaces_artifacts_and_nothing_else(send, fetch, tmp_path):
    send()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    os.symlink(tmp_path / "home", tmp_path / "link")
    for name, message in (("home", "holds no artifact.json"), ("file", "not a folder"), ("link", "not a folder")):
        with pytest.raises(HubError, match=message):
            fetch(local_dir=tmp_path / name, force=True)
    assert (tmp_path / "home" / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    assert (fetch(local_dir=tmp_path / "empty") / WEIGHTS).exists()


def test_hidden_files_of_the_repository_stay_there(hub, send, fetch):
    send()
    hub.server.put("user/delta", {".github/workflows/x.yml": b"x", "sub/.hidden": b"x"})
    assert not [name for name in contents(fetch()) if "/." in f"/{name}"]


@pytest.mark.parametrize(
    "name", ["../evil.json", "a/../../evil.json", "/evil.json", "..\\evil.json", "C:evil.json", "a/./b", "x\ny"]
)
def test_names_that_lead_out_of_the_folder_are_refused_before_anything_is_written(hub, send, fetch, tmp_path, name):
    send()
    hub.server.put("user/delta", {name: b"evil"})
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match="it is refused"):
        fetch()
    assert contents(tmp_path) == before
    assert not [path for _, path in hub.server.requests if "/resolve/" in path]


def test_a_listing_that_changes_on_the_way_brings_nothing_new(hub, send, fetch, monkeypatch, tmp_path):
    report = send()
    listed = push._listed

    def then_change(*args):
        sizes = listed(*args)
        hub.server.repos["user/delta"].commits[report.commit].files["../evil.json"] = b"evil"
        return sizes

    monkeypatch.setattr(push, "_listed", then_change)
    assert "../evil.json" not in contents(fetch())
    assert not list(tmp_path.rglob("evil.json"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.bin": b"x"}, "holds model.bin: such files can run code"),
        ({"A.json": b"x", "a.json": b"x"}, "differ only in upper and lower case"),
        ({MANIFEST_NAME: b"{}"}, "format_version must be an integer"),
        ({MANIFEST_NAME: b"\xff"}, "is not valid JSON"),
        ({MANIFEST_NAME: json.dumps({"format_version": 9}).encode()}, "upgrade it"),
    ],
)
def test_a_repository_that_is_no_sound_artifact_leaves_no_folder(hub, send, fetch, tmp_path, files, message):
    send()
    hub.server.put("user/delta", files)
    with pytest.raises(ArtifactError, match=message):
        fetch()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_repository_of_another_kind_is_named_as_such(hub, fetch, tmp_path):
    hub.server.put("user/delta", {"model.safetensors": b"x"})
    with pytest.raises(ArtifactError, match="holds no artifact.json: hf-ext did not push it"):
        fetch()
    assert list(tmp_path.iterdir()) == []


def test_more_bytes_than_declared_are_not_taken(hub, send, fetch, tmp_path):
    send()
    hub.server.repos["user/delta"].lies[WEIGHTS] = b"x" * 50_000_000
    with pytest.raises(HubError, match="more bytes than it declared"):
        fetch()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_what_does_not_fit_on_the_disk_is_not_started(hub, send, fetch, monkeypatch):
    send()
    monkeypatch.setattr(push.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(HubError, match="do not fit on the disk"):
        fetch()
    assert not [path for _, path in hub.server.requests if "/resolve/" in path]


def test_progress_bars_can_be_switched_off(send, fetch, tmp_path, monkeypatch, capfd):
    from huggingface_hub import utils

    monkeypatch.setenv("TQDM_POSITION", "-1")  # shows bars although stderr is no terminal
    send()
    fetch()
    assert "Fetching" in capfd.readouterr().err
    utils.disable_progress_bars()
    try:
        fetch(local_dir=tmp_path / "silent")
    finally:
        utils.enable_progress_bars()
    assert capfd.readouterr().err == ""


def test_another_python_reaches_the_same_hub(hub, send):
    import subprocess
    import sys

    send(private=True)
    code = "from huggingface_hub import hf_hub_download as get; print(open(get('user/delta', 'artifact.json')).read())"
    ran = subprocess.run([sys.executable, "-c", code], env=hub.environ, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["method"] == "osd"


def test_secrets_are_not_logged(hub, send, fetch, caplog):
    with caplog.at_level(logging.DEBUG):
        send(commit_message="x")
        hub.server.fail("/commit/", status=500)
        send(commit_message="y", license="mit")
        fetch()
    assert OWNER not in caplog.text
