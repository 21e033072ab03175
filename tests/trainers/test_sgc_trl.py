"""`SGCMixin` before trainers of TRL, with a config that mixes in `SGCConfigMixin` and with TRL's own."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_ext import SGCAdamW, SGCConfigMixin, SGCMixin
from hf_ext.tiny import VOCAB_SIZE, tiny_model
from tests.trainers.training import QUIET, rows, weights


# TRL reads settings by names that transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@dataclass
class MixedSFTConfig(SGCConfigMixin, SFTConfig):
    pass


@dataclass
class MixedDPOConfig(SGCConfigMixin, DPOConfig):
    pass


class MixedSFTTrainer(SGCMixin, SFTTrainer):
    pass


class MixedDPOTrainer(SGCMixin, DPOTrainer):
    pass


PAPER = {"optim_args": "mode=paper,k=16,s=6,chunk_size=128,min_numel=256"}


@pytest.fixture
def tokenizer():
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w1", eos_token="w2")


def make(trainer, config, folder, data, tokenizer, ref_model=None, **settings):
    defaults = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 2e-3}
    logs = {"logging_strategy": "steps", "logging_steps": 1}
    args = config(**{**QUIET, **logs, **defaults, **settings})
    extra = {} if ref_model is None else {"ref_model": ref_model}
    return trainer(model=tiny_model("llama"), args=args, train_dataset=data, processing_class=tokenizer, **extra)


@pytest.mark.parametrize(("mixed", "plain"), [(MixedSFTConfig, SFTConfig), (MixedDPOConfig, DPOConfig)])
def test_a_mixed_config_changes_no_default_but_the_optimizer(tmp_path, mixed, plain):
    one, other = (config(output_dir=str(tmp_path), use_cpu=True).to_dict() for config in (mixed, plain))
    assert {name for name, value in other.items() if one[name] != value} == {"optim"}
    assert one["optim"] == "sgc_adamw"


@pytest.mark.parametrize(
    ("config", "settings", "mode"),
    [
        (MixedSFTConfig, {}, "factored"),
        (MixedSFTConfig, {"state_budget": 0.05}, "factored"),
        (SFTConfig, PAPER, "paper"),
    ],
)
def test_sft_trains_and_resumes_exactly(tmp_path, tokenizer, config, settings, mode):
    def train(name, **more):
        one = make(MixedSFTTrainer, config, tmp_path / name, Dataset.from_list(rows()), tokenizer, **settings, **more)
        one.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if name == "resumed" else None)
        return one

    whole = train("whole", save_strategy="steps", save_steps=2)
    optimizer = whole.optimizer.optimizer
    assert isinstance(optimizer, SGCAdamW)
    assert optimizer.param_groups[0]["mode"] == mode
    assert whole.state.log_history[0]["optim_state_bytes"] == optimizer.state_bytes()
    assert "mean_token_accuracy" in whole.state.log_history[0]  # TRL's own loss is at work
    resumed = weights(train("resumed").model)
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights(whole.model).items())


def test_dpo_trains(tmp_path, tokenizer):
    pairs = Dataset.from_list([{"prompt": "w5 w6 w7", "chosen": "w8 w9", "rejected": "w3 w4"}] * 16)
    settings = {"ref_model": tiny_model("llama"), "learning_rate": 5e-3, "max_steps": 8}
    one = make(MixedDPOTrainer, MixedDPOConfig, tmp_path, pairs, tokenizer, **settings)
    one.train()
    assert isinstance(one.optimizer.optimizer, SGCAdamW)
    logs = [log for log in one.state.log_history if "rewards/margins" in log]
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 0.01
    assert logs[-1]["optim_state_bytes"] > 0
