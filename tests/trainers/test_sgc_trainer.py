"""`SGCTrainer` through the front door: loss falls, what must move does, resuming is exact, settings arrive."""

import json

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

import hf_ext
from hf_ext.errors import ConfigError, NonFiniteGradientError
from hf_ext.tiny import tiny_model
from hf_ext.trainers.sgc_optimizer import SGCAdamW
from hf_ext.trainers.sgc_trainer import SGCConfig, SGCMixin, SGCTrainer, parse_optim_args
from tests.trainers.training import MODES, make_args, weights


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def inner(trainer):
    """The optimizer inside what Accelerate wraps around it."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_and_every_tensor_moves(trainer, arch, mode):
    one = trainer(arch, mode=mode, max_steps=20, logging_strategy="steps", logging_steps=1)
    before = weights(one.model)
    one.train()
    found = losses(one)
    assert sum(found[-5:]) / 5 < 0.95 * found[0], found
    still = [name for name, weight in weights(one.model).items() if torch.equal(weight, before[name])]
    assert not still


def test_in_gpt2_the_transposed_layers_and_embeddings_keep_no_dense_state(trainer):
    one = trainer("gpt2", mode="factored")
    one.train()
    names = {p: name for name, p in one.model.named_parameters()}
    dense = {names[p] for p, state in inner(one).state.items() if "first" in state}
    assert not [name for name in dense if "weight" in name and "ln_" not in name]
    assert "transformer.h.0.attn.c_attn.bias" in dense


def test_groups_are_those_of_trainer(trainer):
    ours = trainer("gpt2", weight_decay=0.3)
    theirs = trainer("gpt2", cls=Trainer, config=TrainingArguments, weight_decay=0.3)
    ours.create_optimizer()
    theirs.create_optimizer()
    assert type(ours.optimizer) is SGCAdamW

    def decays(one):
        names = {p: name for name, p in one.model.named_parameters()}
        return [(g["weight_decay"], [names[p] for p in g["params"]]) for g in one.optimizer.param_groups]

    assert decays(ours) == decays(theirs)
    assert [decay for decay, _ in decays(ours)] == [0.3, 0.0]


def test_settings_of_the_config_reach_the_optimizer(trainer):
    chosen = {
        "mode": "paper",
        "k": 17,
        "s": 5,
        "chunk_size": 64,
        "state_dtype": "bfloat16",
        "measurement": "gaussian",
        "recover": "omp",
        "moment_space": "compressed",
        "residual": "chunk",
        "rank": 4,
        "refresh": 3,
        "directions": 1,
        "relative_step": True,
        "min_numel": 99,
        "on_nonfinite": "skip",
    }
    one = trainer(**chosen, sketch_seed=5, learning_rate=0.125, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)
    one.create_optimizer()
    group = one.optimizer.param_groups[0]
    assert {name: group[name] for name in chosen} == chosen
    assert (group["seed"], group["lr"], group["betas"], group["eps"]) == (5, 0.125, (0.8, 0.95), 1e-5)


def test_optim_args_override_single_settings(trainer):
    one = trainer(mode="paper", optim_args="k=20, s=7,recover=omp,rank=2")
    one.create_optimizer()
    group = one.optimizer.param_groups[0]
    assert (group["mode"], group["k"], group["s"], group["recover"], group["rank"]) == ("paper", 20, 7, "omp", 2)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {}),
        ("", {}),
        ("k=64", {"k": 64}),
        ("mode=paper,rank=None", {"mode": "paper", "rank": None}),
        ("state_budget=0.01", {"state_budget": 0.01}),
        ("relative_step=True", {"relative_step": True}),
        ("relative_step=False", {"relative_step": False}),
        ("chunk_size=None", {"chunk_size": None}),
    ],
)
def test_optim_args_become_values_of_the_right_type(text, found):
    assert parse_optim_args(text) == found


@pytest.mark.parametrize("text", ["q=1", "k", "k=many", "k=1.5", "state_budget=low", "lr=0.1", "relative_step=maybe"])
def test_optim_args_that_make_no_sense_are_refused(text):
    with pytest.raises(ConfigError, match="optim_args"):
        parse_optim_args(text)


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_is_kept_to(trainer, mode):
    one = trainer(mode=mode, state_budget=0.06)
    one.train()
    limit = 0.06 * 8 * sum(p.numel() for p in one.model.parameters())
    assert 0 < inner(one).state_bytes() <= limit


def test_a_budget_may_come_from_optim_args(trainer):
    one = trainer(optim_args="state_budget=0.01,mode=factored", config=TrainingArguments)
    one.train()
    assert inner(one).state_bytes() <= 0.01 * 8 * sum(p.numel() for p in one.model.parameters())


def test_a_budget_nothing_fits_into_is_refused(trainer):
    with pytest.raises(ConfigError, match="smallest state"):
        trainer(state_budget=1e-9).create_optimizer()


def test_frozen_parameters_do_not_count_for_a_budget(trainer):
    model = tiny_model("llama")
    for p in list(model.parameters())[:-1]:
        p.requires_grad_(False)
    one = trainer(model=model, mode="hybrid", state_budget=0.1)
    one.train()
    assert inner(one).state_bytes() <= 0.1 * 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_command_line_sets_everything(tmp_path):
    words = f"--output_dir {tmp_path} --optim sgc_adamw --mode paper --k 64 --s 16 --recover omp --rank 4"
    words += " --learning_rate 0.003 --use_cpu --state_dtype bfloat16 --relative_step False --on_nonfinite skip"
    (args,) = HfArgumentParser(SGCConfig).parse_args_into_dataclasses(words.split())
    assert args.optim == "sgc_adamw"
    assert (args.mode, args.k, args.s, args.recover, args.rank) == ("paper", 64, 16, "omp", 4)
    assert (args.learning_rate, args.state_dtype, args.relative_step) == (0.003, "bfloat16", False)
    (args,) = HfArgumentParser(SGCConfig).parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --use_cpu --state_budget 0.005".split()
    )
    assert (args.optim, args.state_budget, args.mode, args.k) == ("sgc_adamw", 0.005, "factored", None)


@pytest.mark.parametrize("settings", [{}, {"mode": "paper", "k": 20, "rank": 2}, {"state_budget": 0.01}])
def test_a_config_survives_json_and_a_folder(tmp_path, settings):
    args = SGCConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **settings)
    text = json.dumps(args.to_dict())
    again = SGCConfig.from_dict(json.loads(text))
    assert again.to_dict() == args.to_dict()
    assert again.optim == "sgc_adamw"
    args.save_pretrained(tmp_path / "config")
    assert SGCConfig.from_pretrained(tmp_path / "config").to_dict() == args.to_dict()


WRONG = [
    ({"mode": "adam"}, "mode"),
    ({"k": 0}, "k"),
    ({"k": 1.5}, "k"),
    ({"s": 0}, "s"),
    ({"chunk_size": 0}, "chunk_size"),
    ({"rank": 0, "mode": "paper"}, "rank"),
    ({"rank": 2}, "rank"),
    ({"refresh": 0}, "refresh"),
    ({"directions": -1}, "directions"),
    ({"min_numel": 0}, "min_numel"),
    ({"sketch_seed": -1}, "sketch_seed"),
    ({"state_budget": 0.0}, "state_budget"),
    ({"state_budget": float("inf")}, "state_budget"),
    ({"state_budget": 0.01, "k": 8}, "k"),
    ({"state_budget": 0.01, "state_dtype": "float32"}, "state_dtype"),
    ({"state_dtype": "float16"}, "state_dtype"),
    ({"measurement": "x"}, "measurement"),
    ({"recover": "x"}, "recover"),
    ({"residual": "x"}, "residual"),
    ({"moment_space": "x"}, "moment_space"),
    ({"on_nonfinite": "x"}, "on_nonfinite"),
]


@pytest.mark.parametrize(("wrong", "name"), WRONG, ids=lambda value: str(value))
def test_a_setting_that_cannot_work_is_refused_by_name(tmp_path, wrong, name):
    with pytest.raises(ConfigError, match=rf"SGCConfig\.{name}="):
        SGCConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


@pytest.mark.parametrize(("optim", "expected"), [("adamw_torch", "AdamW"), ("sgd", "SGD"), ("adafactor", "Adafactor")])
def test_other_names_of_optimizers_still_work(trainer, optim, expected):
    one = trainer(optim=optim, learning_rate=1e-3)
    one.train()
    assert type(inner(one)).__name__ == expected


def test_an_unknown_name_of_an_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adamm"):
        SGCConfig(output_dir=str(tmp_path), optim="adamm", use_cpu=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("every", [1, 2])
def test_logs_hold_the_bytes_and_how_well_a_step_decodes(trainer, mode, every):
    one = trainer(mode=mode, logging_strategy="steps", logging_steps=every)
    one.train()
    entries = [entry for entry in one.state.log_history if "loss" in entry]
    assert len(entries) == 4 // every
    for entry in entries:
        assert entry["optim_state_bytes"] == inner(one).state_bytes()
        if mode in ("paper", "hybrid"):
            assert 0.0 < entry["sgc_energy_kept"] <= 1.0
            assert 0.0 <= entry["sgc_decode_residual"] <= 1.0
        else:
            assert "sgc_energy_kept" not in entry
    json.dumps(one.state.log_history)


@pytest.mark.parametrize(
    "logging",
    [{"logging_strategy": "epoch"}, {"logging_strategy": "steps", "logging_steps": 3, "logging_first_step": True}],
)
def test_other_rhythms_of_logging_hold_the_numbers_too(trainer, logging):
    one = trainer(mode="paper", max_steps=8, **logging)
    one.train()
    entries = [entry for entry in one.state.log_history if "loss" in entry]
    assert entries
    assert all("sgc_energy_kept" in entry for entry in entries), entries


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_resuming_half_way_equals_a_run_without_a_break(trainer, tmp_path, mode, dtype, accumulation):
    settings = {
        "mode": mode,
        "dtype": dtype,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 2,
        "state_dtype": "bfloat16" if accumulation == 2 else "float32",
    }
    whole = trainer(**settings, per_device_train_batch_size=2)
    whole.train()
    resumed = trainer(**settings, per_device_train_batch_size=2, folder="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert next(resumed.model.parameters()).dtype == dtype
    expected = weights(whole.model)
    differ = [name for name, weight in weights(resumed.model).items() if not torch.equal(weight, expected[name])]
    assert not differ


def test_resuming_with_other_settings_is_refused_by_name(trainer, tmp_path):
    trainer(mode="paper", save_strategy="steps", save_steps=2).train()
    with pytest.raises(hf_ext.CheckpointError, match="k="):
        trainer(mode="paper", k=20).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.parametrize("mode", ["factored", "paper"])
def test_accumulated_batches_step_as_one_large_batch(trainer, mode):
    one = trainer(mode=mode, per_device_train_batch_size=4)
    other = trainer(mode=mode, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    one.train()
    other.train()
    expected = weights(one.model)
    for name, weight in weights(other.model).items():
        moved = (expected[name] - weight).norm() / weight.norm()
        assert moved < 5e-3, name


def test_activation_checkpointing_changes_nothing(trainer):
    one, other = trainer(), trainer(activation_checkpointing=True)
    one.train()
    other.train()
    expected = weights(one.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(other.model).items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of transformers to PEFT
@pytest.mark.parametrize("mode", MODES)
def test_with_adapters_they_alone_move(trainer, mode):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = weights(model)
    one = trainer(model=model, mode=mode)
    one.train()
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]) is ("lora_" not in name), name
    kept = {id(p) for p in inner(one).state}
    assert kept == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["factored", "paper"])
def test_mixed_precision_on_the_processor_trains(trainer, mode):
    one = trainer(mode=mode, bf16=True, max_steps=12, logging_strategy="steps", logging_steps=1)
    one.train()
    assert all(p.dtype == torch.float32 for p in one.model.parameters())
    found = losses(one)
    assert found[-1] < found[0]


class CountingTrainer(Trainer):
    calls = 0

    def compute_loss(self, *args, **kwargs):
        type(self).calls += 1
        return super().compute_loss(*args, **kwargs)


class MixedTrainer(SGCMixin, CountingTrainer):
    pass


def test_the_mixin_works_with_a_subclass_and_plain_arguments(trainer):
    one = trainer(
        cls=MixedTrainer,
        config=TrainingArguments,
        learning_rate=0.02,
        optim_args="mode=hybrid,k=16,s=6,chunk_size=128",
        logging_strategy="steps",
        logging_steps=1,
    )
    before = weights(one.model)
    one.train()
    assert isinstance(inner(one), SGCAdamW)
    assert inner(one).param_groups[0]["mode"] == "hybrid"
    assert MixedTrainer.calls == 4
    assert "optim_state_bytes" in one.state.log_history[0]
    assert not any(torch.equal(weight, before[name]) for name, weight in weights(one.model).items())


def test_the_class_works_with_a_trainer_that_knows_nothing_of_it(trainer):
    one = trainer(
        cls=Trainer,
        config=TrainingArguments,
        optimizer_cls_and_kwargs=(SGCAdamW, {"lr": 0.02, "mode": "block"}),
        learning_rate=0.02,
    )
    before = weights(one.model)
    one.train()
    assert isinstance(inner(one), SGCAdamW)
    assert not any(torch.equal(weight, before[name]) for name, weight in weights(one.model).items())


def test_an_optimizer_that_is_passed_in_stays(trainer):
    model = tiny_model("llama")
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    one = trainer(model=model, optimizers=(mine, None), logging_strategy="steps", logging_steps=1)
    one.train()
    assert inner(one) is mine
    assert "optim_state_bytes" not in one.state.log_history[0]
    two = trainer(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    two.train()
    assert isinstance(inner(two), torch.optim.SGD)


@pytest.mark.parametrize(("flag", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_sharded_training_is_refused(trainer, flag, name):
    one = trainer()
    setattr(one, flag, True)
    with pytest.raises(ConfigError, match=name):
        one.create_optimizer()
    assert one.optimizer is None


class PoisonedTrainer(SGCTrainer):
    """The third batch has a loss of NaN."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 2:
            self.kept = weights(self.model)
            return loss * float("nan")
        if self.state.global_step == 3:
            self.after = weights(self.model)
        return loss


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_of_nan_stops_training_or_costs_one_step(trainer, mode):
    with pytest.raises(NonFiniteGradientError, match="nothing was changed"):
        trainer(mode=mode, cls=PoisonedTrainer).train()
    one = trainer(mode=mode, cls=PoisonedTrainer, on_nonfinite="skip")
    one.train()
    assert all(torch.equal(weight, one.kept[name]) for name, weight in one.after.items())
    final = weights(one.model)
    assert all(weight.isfinite().all() for weight in final.values())
    assert not torch.equal(final["lm_head.weight"], one.after["lm_head.weight"])


def test_the_rate_is_transformers_own_unless_it_is_given(trainer):
    assert trainer().create_optimizer().param_groups[0]["lr"] == TrainingArguments(output_dir="out").learning_rate
    assert trainer(learning_rate=0.25).create_optimizer().param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_target_modules_change_nothing_and_are_warned_of(trainer, monkeypatch, caplog, targets):
    monkeypatch.setattr("hf_ext.log._seen", set())
    optimizer = trainer(optim_target_modules=targets).create_optimizer()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(tiny_model("llama").parameters()))
    assert any("covers every tensor" in message for message in caplog.messages) is (targets is not None)


def test_create_optimizer_takes_a_model_and_does_its_work_once(trainer):
    one = trainer()
    made = one.create_optimizer(one.model)
    assert one.create_optimizer() is made


def test_arguments_keep_their_own_meaning_when_copied(tmp_path):
    import copy
    import pickle

    args = make_args(output_dir=str(tmp_path), mode="paper")
    for twin in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert (twin.optim, twin.mode, twin.k) == ("sgc_adamw", "paper", args.k)
