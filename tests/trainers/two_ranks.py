"""What each of two processes runs in `test_sgc_ranks.py`: ten steps, and the last five of them again from a checkpoint."""

import sys
from pathlib import Path

import torch

from tests.trainers.training import make_trainer, weights


CASES = {
    "factored": {"mode": "factored"},
    "factored, bfloat16 state": {"mode": "factored", "state_dtype": "bfloat16"},
    "factored, bfloat16 weights": {"mode": "factored", "dtype": torch.bfloat16},
    "factored, two batches a step": {"mode": "factored", "gradient_accumulation_steps": 2},
    "hybrid": {"mode": "hybrid"},
    "block": {"mode": "block"},
    "paper": {"mode": "paper"},
    "paper, omp": {"mode": "paper", "recover": "omp"},
    "paper, rank": {"mode": "paper", "rank": 4, "refresh": 3},
    "paper, bfloat16 weights": {"mode": "paper", "dtype": torch.bfloat16},
}


def run(folder: Path, case: str) -> dict:
    settings = {
        **CASES[case],
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 5,
        "ddp_backend": "gloo",
    }
    whole = make_trainer(output_dir=str(folder / case), **settings)
    whole.train()
    optimizer = whole.optimizer.optimizer
    resumed = make_trainer(output_dir=str(folder / f"{case}, resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(folder / case / "checkpoint-5"))
    return {
        "ranks": whole.args.world_size,
        "mode": optimizer.param_groups[0]["mode"],
        "whole": weights(whole.accelerator.unwrap_model(whole.model)),
        "resumed": weights(resumed.accelerator.unwrap_model(resumed.model)),
        "state": [tensor for state in optimizer.state.values() for tensor in state.values()],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {case: run(folder, case) for case in CASES}
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
