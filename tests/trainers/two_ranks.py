"""What each of two processes runs in `test_sgc_ranks.py`: ten steps, and the last five of them again from a checkpoint."""

import sys
from pathlib import Path

import torch

from tests.trainers.training import make_trainer, weights


def run(folder: Path, mode: str) -> dict:
    settings = {
        "mode": mode,
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 5,
        "ddp_backend": "gloo",
    }
    whole = make_trainer(output_dir=str(folder / mode), **settings)
    whole.train()
    optimizer = whole.optimizer.optimizer
    resumed = make_trainer(output_dir=str(folder / f"{mode}-resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(folder / mode / "checkpoint-5"))
    return {
        "ranks": whole.args.world_size,
        "mode": optimizer.param_groups[0]["mode"],
        "whole": weights(whole.accelerator.unwrap_model(whole.model)),
        "resumed": weights(resumed.accelerator.unwrap_model(resumed.model)),
        "state": [tensor for state in optimizer.state.values() for tensor in state.values()],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *modes = sys.argv[1:]
    found = {mode: run(Path(folder), mode) for mode in modes}
    torch.save(found, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
