"""Quiet logs, and a place for what a trainer writes."""

import pytest

from tests.trainers.training import make_trainer


@pytest.fixture
def trainer(tmp_path):
    """`make_trainer` that writes below this test's folder."""

    def make(*args, folder="out", **kwargs):
        return make_trainer(*args, output_dir=str(tmp_path / folder), **kwargs)

    return make
