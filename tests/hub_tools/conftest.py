"""A Hub on this machine, an artifact, and push and pull bound to both."""

import pytest

from hf_ext.hub_tools.push import pull_artifact, push_artifact
from tests.hub_server import hub  # noqa: F401
from tests.hub_tools.helpers import make_artifact


@pytest.fixture
def folder(tmp_path):
    return make_artifact(tmp_path / "artifact")


@pytest.fixture
def send(hub, folder):  # noqa: F811
    def send(repo_id="user/delta", artifact=folder, **options):
        return push_artifact(artifact, repo_id, **{"token": hub.token, "endpoint": hub.endpoint, **options})

    return send


@pytest.fixture
def fetch(hub, tmp_path):  # noqa: F811
    def fetch(repo_id="user/delta", local_dir=tmp_path / "pulled", **options):
        return pull_artifact(repo_id, local_dir, **{"token": hub.token, "endpoint": hub.endpoint, **options})

    return fetch
