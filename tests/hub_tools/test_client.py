"""What goes wrong between here and the Hub: each fault, its message, and that neither end holds half of anything."""

import email.utils
import errno
import time

import pytest
from huggingface_hub import constants, file_download

from hf_ext.errors import HfExtError, HubError
from hf_ext.hub_tools import client
from hf_ext.hub_tools.client import ATTEMPTS, LONGEST_WAIT, attempt
from tests.hub_server import READER
from tests.hub_tools.helpers import WEIGHTS, contents


ALWAYS = 1000
# Where a push can fail: the request, and which of its tries the client makes itself.
STEPS = ["/api/repos/create", "/validate-yaml", "/preupload/", "/commit/", "/revision/"]


@pytest.fixture
def published(hub, send):
    """A repository with one pushed artifact; gives its files."""
    send(revision="main")
    hub.waits.clear()
    hub.server.requests.clear()
    return hub.server.files("user/delta")


def count(hub, part):
    return sum(part in path for _, path in hub.server.requests)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept the token.*hf auth login"),
        (403, "no right to do this.*write access"),
        (404, "no such repository"),
        (409, "someone changed the repository in between; nothing was written. Pull"),
        (412, "someone changed the repository in between"),
        (422, "the Hub refuses the request: .*injected"),
    ],
)
def test_a_refused_commit_says_what_to_do_and_is_not_repeated(hub, send, published, folder, status, message):
    (folder / WEIGHTS).write_bytes(b"new")
    hub.server.fail("/commit/", status=status, times=ALWAYS)
    with pytest.raises(HubError, match=message) as caught:
        send()
    assert caught.value.status == status
    assert str(caught.value).startswith("pushing to user/delta: ")
    assert count(hub, "/commit/") == 1
    assert hub.waits == []
    assert hub.server.files("user/delta") == published


def test_a_token_that_is_wrong_or_weak_or_missing(hub, send, published):
    for token, status in (("hf_wrong", 401), (False, 401), (READER, 403)):
        with pytest.raises(HubError) as caught:
            send(token=token, license="mit")
        assert caught.value.status == status
    assert hub.server.files("user/delta") == published


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_that_passes_is_waited_for(hub, send, folder, step, status):
    hub.server.fail(step, status=status, times=2)
    assert send(revision="main").commit == hub.server.repos["user/delta"].branches["main"]
    assert len(hub.waits) == 2
    assert hub.waits[1] == 2 * hub.waits[0]
    assert hub.server.files("user/delta")[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert len(hub.server.repos["user/delta"].commits) == 2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("status", "message"), [(429, "too many requests. Wait some minutes and repeat"), (500, "status.huggingface.co")]
)
def test_a_fault_that_stays_is_given_up(hub, send, published, folder, step, status, message):
    (folder / WEIGHTS).write_bytes(b"new")
    hub.server.fail(step, status=status, times=ALWAYS)
    with pytest.raises(HubError, match=message) as caught:
        send(revision="main")
    assert caught.value.status == status
    # Six are the client's own; they are not multiplied by ours.
    assert count(hub, step) == (6 if step == "/preupload/" else ATTEMPTS)
    assert hub.server.files("user/delta") == published


def test_the_wait_is_the_one_the_server_asks_for(hub, send):
    hub.server.fail("/commit/", status=429, headers={"Retry-After": "7"})
    hub.server.fail("/commit/", status=503, headers={"Retry-After": "0"})
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    hub.server.fail("/commit/", status=429, headers={"Retry-After": date})
    hub.server.fail("/commit/", status=429, headers={"RateLimit": '"api";r=0;t=42'})
    send()
    assert hub.waits[:2] == [7.0, 0.0]
    assert 95 < hub.waits[2] <= 100
    assert hub.waits[3] == 42.0


def test_too_long_a_wait_is_told_and_not_sat_out(hub, send, published):
    hub.server.fail("/commit/", status=429, times=ALWAYS, headers={"Retry-After": str(int(LONGEST_WAIT) + 1)})
    with pytest.raises(HubError, match="too many requests. Wait 301 s and repeat"):
        send(license="mit")
    assert hub.waits == []


def test_a_connection_that_breaks_in_the_middle_of_the_upload(hub, send, published, folder):
    (folder / WEIGHTS).write_bytes(b"new" * 1000)
    hub.server.fail("/commit/", drop=True)
    send()
    assert hub.server.files("user/delta")[WEIGHTS] == b"new" * 1000
    (folder / WEIGHTS).write_bytes(b"newer" * 1000)
    hub.server.fail("/commit/", drop=True, times=ALWAYS)
    with pytest.raises(HubError, match="the connection failed, also after repeats. Check the network") as caught:
        send()
    assert caught.value.status is None
    assert hub.server.files("user/delta")[WEIGHTS] == b"new" * 1000


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, send, published, folder):
    (folder / WEIGHTS).write_bytes(b"new")
    hub.server.fail("/commit/", drop="after")
    report = send()
    assert report.commit == hub.server.repos["user/delta"].branches["main"]
    assert len(hub.server.repos["user/delta"].commits) == 3
    assert len(hub.waits) == 1


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, send, published, folder):
    (folder / WEIGHTS).write_bytes(b"new")
    hub.server.fail("/commit/", drop="after")
    with pytest.raises(HubError, match="the outcome is unknown. Look at the repository before you repeat"):
        send(create_pr=True)
    assert set(hub.server.repos["user/delta"].branches) == {"main", "refs/pr/1"}


def test_a_change_in_between_is_not_overwritten(hub, send, published, folder, monkeypatch):
    (folder / WEIGHTS).write_bytes(b"new")
    from hf_ext.hub_tools import push

    look = push._state

    def then_someone_pushes(*args):
        state = look(*args)
        hub.server.put("user/delta", {WEIGHTS: b"theirs"})
        return state

    monkeypatch.setattr(push, "_state", then_someone_pushes)
    with pytest.raises(HubError, match="someone changed the repository in between; nothing was written"):
        send()
    assert hub.server.files("user/delta")[WEIGHTS] == b"theirs"


def test_a_card_the_hub_refuses_stops_the_push(hub, send, published, monkeypatch):
    from hf_ext.hub_tools import push

    monkeypatch.setattr(push, "render_card", lambda *args: "---\na: [\n---\n")
    with pytest.raises(HubError, match="the Hub refuses the request: Invalid metadata in README.md"):
        send()
    assert hub.server.files("user/delta") == published


def test_an_answer_that_is_not_of_a_hub(hub, send, monkeypatch):
    def page(self, path, body):
        from tests.hub_server import _Answer

        raise _Answer(200, b"<html>log in to the hotel network</html>")

    monkeypatch.setattr("tests.hub_server._Handler._route", page)
    with pytest.raises(HubError, match="the answer is not what a Hub sends. Check HF_ENDPOINT"):
        send()


def test_no_server_at_all(hub, send, fetch, tmp_path):
    hub.server.stop()
    for call in (send, fetch):
        with pytest.raises(HubError, match="the connection failed"):
            call()
    assert len(hub.waits) == 2 * (ATTEMPTS - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_offline_mode_is_named_and_not_waited_for(hub, send, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (send, fetch):
        with pytest.raises(HubError, match="offline mode is on; unset HF_HUB_OFFLINE"):
            call()
    assert (hub.waits, hub.server.requests) == ([], [])
    assert send(dry_run=True).dry_run
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, "does not accept the token"),
        (403, {"X-Error-Code": "GatedRepo"}, "the repository is gated; ask for access"),
        (403, {}, "no right to do this"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no such repository"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision"),
        (429, {}, "too many requests"),
        (500, {}, "the Hub has a fault of its own"),
    ],
)
@pytest.mark.parametrize("step", ["/revision/", "/tree/", "/resolve/"])
def test_a_pull_that_fails_leaves_no_trace(hub, fetch, published, tmp_path, step, status, headers, message):
    hub.server.fail(step, status=status, times=ALWAYS, headers=headers)
    with pytest.raises(HubError, match=message) as caught:
        fetch(revision="main")
    assert caught.value.status == status
    assert str(caught.value).startswith("pulling user/delta: ")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_pull_that_fails_leaves_the_old_folder(hub, fetch, published, tmp_path):
    fetch()
    before = contents(tmp_path)
    hub.server.put("user/delta", {WEIGHTS: b"new"})
    hub.server.fail(f"/resolve/{hub.server.repos['user/delta'].branches['main']}/{WEIGHTS}", status=500, times=ALWAYS)
    with pytest.raises(HubError, match="fault of its own"):
        fetch(force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", ["/revision/", "/tree/", "/resolve/"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_pull_waits_for_a_fault_that_passes(hub, fetch, published, step, status):
    # Four files are asked for side by side, and a first refusal is repeated without a pause.
    hub.server.fail(step, status=status, times=6 if step == "/resolve/" else 2)
    assert (fetch(revision="main") / WEIGHTS).read_bytes() == published[WEIGHTS]
    assert hub.waits


def test_a_connection_that_breaks_in_the_middle_of_the_download(hub, fetch, published, tmp_path):
    hub.server.fail(WEIGHTS, drop=True, times=2, method="GET")
    assert (fetch() / WEIGHTS).read_bytes() == published[WEIGHTS]
    hub.server.fail(WEIGHTS, drop=True, times=ALWAYS, method="GET")
    hub.server.repos["user/delta"].commits[hub.server.repos["user/delta"].branches["main"]].files[WEIGHTS] = b""
    hub.server.put("user/delta", {WEIGHTS: b"x"})
    with pytest.raises(HubError, match="the connection failed, also after repeats"):
        fetch(local_dir=tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "pulled"]


def test_a_full_disk_leaves_nothing(hub, fetch, published, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        kwargs.get("temp_file", args[1] if len(args) > 1 else None).write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(HubError, match="the disk is full; nothing was kept. Free some space"):
        fetch()
    assert hub.waits == []
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_rename_that_fails_brings_the_old_folder_back(hub, fetch, published, tmp_path, monkeypatch):
    from hf_ext.hub_tools import push

    fetch()
    before = contents(tmp_path)
    replace = push.os.replace

    def fail_on_new(source, target):
        if str(source).endswith("new"):
            raise OSError(errno.EIO, "input/output error")
        replace(source, target)

    monkeypatch.setattr(push.os, "replace", fail_on_new)
    with pytest.raises(OSError, match="input/output error"):
        fetch(force=True)
    assert contents(tmp_path) == before


def test_errors_that_are_not_the_hubs_pass_through():
    class Mine(Exception):
        pass

    for error in (Mine("x"), PermissionError(errno.EACCES, "no"), ValueError("x")):
        with pytest.raises(type(error)) as caught:
            attempt("x", lambda error=error: (_ for _ in ()).throw(error))
        assert caught.value is error


def test_errors_can_be_caught_as_the_builtin():
    assert issubclass(HubError, HfExtError)
    assert issubclass(HubError, OSError)
    assert HubError("x").status is None


def test_waits_double(hub, send):
    hub.server.fail("/repos/create", status=502, times=ALWAYS)
    with pytest.raises(HubError):
        send()
    assert hub.waits == [client.FIRST_WAIT * 2**n for n in range(ATTEMPTS - 1)]
