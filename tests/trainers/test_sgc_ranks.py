"""Two processes that exchange gradients: the same parameters and state on both, and an exact resume."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers.two_ranks import CASES


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes ended with, a dictionary of cases each."""
    folder, port = tmp_path_factory.mktemp("ranks"), str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainers.two_ranks", str(folder)],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_stay_equal_and_resume_exactly(ranks, case):
    one, other = (found[case] for found in ranks)
    assert (one["ranks"], one["mode"]) == (2, CASES[case]["mode"])
    for name, weight in one["whole"].items():
        assert torch.equal(weight, other["whole"][name]), name
        assert torch.equal(weight, one["resumed"][name]), name
        assert torch.equal(weight, other["resumed"][name]), name
    assert len(one["state"]) == len(other["state"]) > 0
    assert all(torch.equal(left, right) for left, right in zip(one["state"], other["state"]))
