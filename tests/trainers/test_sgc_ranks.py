"""Two processes that exchange gradients: the same parameters and state on both, and an exact resume."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch


MODES = ("factored", "paper")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_ranks_stay_equal_and_resume_exactly(tmp_path):
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainers.two_ranks", str(tmp_path), *MODES],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for mode in MODES:
        one, other = first[mode], second[mode]
        assert (one["ranks"], one["mode"]) == (2, mode)
        for name, weight in one["whole"].items():
            assert torch.equal(weight, other["whole"][name]), name
            assert torch.equal(weight, one["resumed"][name]), name
            assert torch.equal(weight, other["resumed"][name]), name
        assert all(torch.equal(left, right) for left, right in zip(one["state"], other["state"]))
