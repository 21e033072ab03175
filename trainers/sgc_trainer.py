"""`SGCAdamW` behind the interfaces of transformers: `SGCConfig`, `SGCTrainer`, `SGCMixin` for other trainers.

Trainer builds the groups (decay and no decay), the schedule, accumulation, clipping and checkpoints; what is added here is
the choice of the optimizer, its settings, the dial, and three numbers in the logs.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ext.config import MethodConfig
from hf_ext.errors import ConfigError
from hf_ext.log import get_logger, warn_once
from hf_ext.trainers.sgc_budget import budget_settings
from hf_ext.trainers.sgc_optimizer import SGCAdamW


OPTIM = "sgc_adamw"

ConfigT = TypeVar("ConfigT", bound="SGCConfigMixin")
_logger = get_logger(__name__)


@dataclass
class SGCConfigMixin(MethodConfig):
    """Puts the settings of `SGCAdamW` into any `TrainingArguments`: write it first, as in `MyConfig(SGCConfigMixin, SFTConfig)`.

    Fields are those of `SGCConfig`. No default of the other class changes but that of `optim`.
    """

    optim: str = field(default=OPTIM, metadata={"help": "The optimizer."})
    mode: Literal["factored", "paper", "hybrid", "block"] = field(
        default="factored", metadata={"help": "Which method."}
    )
    state_budget: float | None = field(default=None, metadata={"help": "Share of AdamW's state (up to 1), or bytes."})
    k: int | None = field(default=None, metadata={"help": "Measurements a chunk."})
    s: int | None = field(default=None, metadata={"help": "Entries kept a chunk."})
    chunk_size: int | None = field(default=None, metadata={"help": "Entries a chunk."})
    state_dtype: Literal["float32", "bfloat16"] | None = field(default=None, metadata={"help": "Of the state."})
    measurement: Literal["gaussian", "srht", "countsketch"] = field(default="srht", metadata={"help": "The matrix."})
    recover: Literal["known", "omp"] = field(default="known", metadata={"help": "How moments are decoded."})
    moment_space: Literal["decoded", "compressed"] = field(default="decoded", metadata={"help": "Where squares are."})
    residual: Literal["none", "chunk"] = field(default="none", metadata={"help": "What moves the other entries."})
    rank: int | None = field(default=None, metadata={"help": "Of CESGC's projection."})
    refresh: int = field(default=200, metadata={"help": "Steps between two projections."})
    relative_step: bool | None = field(default=None, metadata={"help": "Steps in proportion to the weights' scale."})
    directions: int | None = field(default=None, metadata={"help": "Leading directions that are cut."})
    min_numel: int = field(default=4096, metadata={"help": "Smaller tensors keep AdamW's state."})
    sketch_seed: int = field(default=0, metadata={"help": "Of measurements and sketches."})
    on_nonfinite: Literal["raise", "skip"] = field(default="raise", metadata={"help": "At NaN in a gradient."})

    def __post_init__(self) -> None:
        self._check_types()
        optim = self.optim
        names = [OPTIM, *(name.value for name in OptimizerNames)]
        self.check(optim in names, "optim", f"must be one of {', '.join(names)}")
        if optim == OPTIM:
            # The host's enumeration of names is closed.
            self.optim = "adamw_torch"
        super(MethodConfig, self).__post_init__()  # type: ignore[misc]  # the host's
        self.optim = optim if optim == OPTIM else self.optim
        self.validate()

    def validate(self) -> None:
        """Rules between settings."""
        self.check(getattr(self, "learning_rate", 0) >= 0, "learning_rate", "must be at least 0")
        self.check(self.state_budget is None or self.state_budget > 0, "state_budget", "must be above 0")
        for name, least in (("k", 1), ("s", 1), ("chunk_size", 1), ("rank", 1), ("directions", 0)):
            value = getattr(self, name)
            self.check(value is None or value >= least, name, f"must be at least {least}")
        for name, least in (("refresh", 1), ("min_numel", 1), ("sketch_seed", 0)):
            self.check(getattr(self, name) >= least, name, f"must be at least {least}")
        self.check(self.rank is None or self.mode == "paper", "rank", 'needs mode="paper"')
        if self.state_budget is not None:
            for name in ("k", "s", "chunk_size", "state_dtype"):
                self.check(getattr(self, name) is None, name, "must be left out: state_budget chooses it")

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments`: plain JSON types, tokens hidden."""
        return super(MethodConfig, self).to_dict()  # type: ignore[misc]

    @classmethod
    def from_dict(cls: type[ConfigT], data: dict[str, Any], strict: bool = False) -> ConfigT:
        """Build from `to_dict()`; the tokens it hides are left out."""
        return super().from_dict({k: v for k, v in data.items() if v != f"<{k.upper()}>"}, strict)

    def optimizer_settings(self) -> dict[str, Any]:
        """Keyword arguments of `SGCAdamW` that were set here, without rate and decay."""
        names = inspect.signature(SGCAdamW).parameters
        found = {name: getattr(self, name) for name in names if hasattr(self, name)}
        found = {name: value for name, value in found.items() if value is not None}
        del found["weight_decay"]
        return {**found, "seed": self.sketch_seed}


@dataclass
class SGCConfig(SGCConfigMixin, TrainingArguments):
    """`TrainingArguments` with the settings of `SGCAdamW`; works with `HfArgumentParser`.

    Everything else of `TrainingArguments` keeps its meaning: `adam_beta1`, `adam_beta2`, `adam_epsilon`, `weight_decay` and
    `learning_rate` reach the optimizer, and `optim_args="k=64,s=16"` overrides single settings below.

    Args:
        optim (`str`, defaults to `"sgc_adamw"`): Any other value trains with the optimizer of that name.
        mode (`str`, defaults to `"factored"`): `"factored"`, `"paper"`, `"hybrid"` or `"block"`.
        state_budget (`float`, *optional*):
            The dial: up to 1 a share of AdamW's state in float32, above it bytes. Chooses `k`, `s`, `chunk_size` and
            `state_dtype`, which must be left out then; under what `"factored"` takes, each chunk keeps one number.
        k (`int`, *optional*): Measurements a chunk; 128 without a budget.
        s (`int`, *optional*): Entries kept a chunk; 48 without a budget.
        chunk_size (`int`, *optional*): Entries a chunk; 1024 without a budget.
        state_dtype (`str`, *optional*): `"float32"` or `"bfloat16"`; the former without a budget.
        measurement (`str`, defaults to `"srht"`): `"gaussian"`, `"srht"` or `"countsketch"`.
        recover (`str`, defaults to `"known"`): `"known"`, or `"omp"` as in the paper.
        moment_space (`str`, defaults to `"decoded"`): `"decoded"` or `"compressed"`.
        residual (`str`, defaults to `"none"`): `"none"` or `"chunk"`.
        rank (`int`, *optional*): Of CESGC's projection, with `mode="paper"`.
        refresh (`int`, defaults to 200): Steps between two projections.
        directions (`int`, *optional*):
            Leading directions that `"factored"` cuts; `None` a sixteenth of a matrix's shorter side, at most 16.
        relative_step (`bool`, *optional*): Whether steps follow the weights' scale; `None` means with `"factored"` alone.
        min_numel (`int`, defaults to 4096): With chunks, smaller tensors keep AdamW's state.
        sketch_seed (`int`, defaults to 0): Of measurements and sketches; independent of `seed`.
        on_nonfinite (`str`, defaults to `"raise"`): `"raise"` or `"skip"`, at NaN or infinity in a gradient.

    Raises:
        ConfigError: naming the setting.
    """


class SGCCallback(TrainerCallback):
    """Adds to every log `optim_state_bytes` and, in modes that measure moments, how good the last step's were.

    `sgc_energy_kept` is the share of the gradient's square sum in the kept entries, `sgc_decode_residual` the share of the
    measured first moment that the decoded one does not explain. Both are computed in steps that are logged alone.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks the optimizer to look at the step that will be logged."""
        optimizer = _inner(kwargs.get("optimizer"))
        if optimizer is None:
            return
        step, every = state.global_step + 1, max(1, int(state.logging_steps or 1))
        if args.logging_strategy == "epoch":
            every = max(1, math.ceil(state.max_steps / max(state.num_train_epochs, 1)))
        first = step == 1 and args.logging_first_step
        optimizer.monitor = first or step % every == 0 or step == state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the numbers into the log and the history."""
        optimizer = _inner(kwargs.get("optimizer"))
        if optimizer is None or logs is None or "loss" not in logs:
            return
        found = {"optim_state_bytes": optimizer.state_bytes(), **optimizer.seen}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)


class SGCMixin:
    """Puts `SGCAdamW` into any `Trainer`: write it first, as in `class MyTrainer(SGCMixin, SFTTrainer)`.

    With an `SGCConfig`, or another that mixes in `SGCConfigMixin`, its settings are used; with any other `TrainingArguments` those of
    `optim_args`, and `SGCAdamW`'s defaults. An optimizer that is passed in (`optimizers`, `optimizer_cls_and_kwargs`) stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # First, so that callbacks that print or send logs see the numbers.
        self.callback_handler.callbacks.insert(0, SGCCallback())  # type: ignore[attr-defined]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's own, groups included, with `SGCAdamW` as the class.

        Args:
            model (`torch.nn.Module`, *optional*): `self.model` by default.

        Raises:
            ConfigError: settings that cannot work, a budget nothing fits into, FSDP or DeepSpeed.
        """
        trainer: Any = self
        if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None and _chosen(trainer.args):
            _refuse_sharding(trainer)
            if trainer.args.optim_target_modules:
                warn_once(_logger, "optim_target_modules is not used: SGCAdamW covers every tensor that is trained.")
            target = trainer.model if model is None else model
            trainer.optimizer_cls_and_kwargs = (SGCAdamW, _keywords(trainer.args, target))
            try:
                return super().create_optimizer(model)  # type: ignore[misc]
            finally:
                # A search over settings makes the next optimizer from other ones.
                trainer.optimizer_cls_and_kwargs = None
        return super().create_optimizer(model)  # type: ignore[misc]


class SGCTrainer(SGCMixin, Trainer):
    """`Trainer` with `SGCAdamW`: full fine-tuning with a fraction of a percent of AdamW's state.

    Weights, gradients and activations take what they always take.

    Example:
        ```python
        from hf_ext import SGCConfig, SGCTrainer

        args = SGCConfig(output_dir="out", learning_rate=5e-5, max_steps=100)
        trainer = SGCTrainer(model=model, args=args, train_dataset=dataset)
        trainer.train()
        ```
    """


def _inner(optimizer: Any) -> SGCAdamW | None:
    """The optimizer inside what Accelerate wraps around it; `None` where it is another."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer if isinstance(optimizer, SGCAdamW) else None


def _chosen(args: TrainingArguments) -> bool:
    return not isinstance(args, SGCConfigMixin) or args.optim == OPTIM


def _refuse_sharding(trainer: Any) -> None:
    for name, flag in (("FSDP", "is_fsdp_enabled"), ("DeepSpeed", "is_deepspeed_enabled")):
        if getattr(trainer, flag, False):
            raise ConfigError(
                f"SGCAdamW does not run under {name}: it cuts parameters across ranks, and a state by rows, columns or chunks "
                "does not follow such a cut. Use data parallelism (accelerate launch --multi_gpu), or another optim."
            )


def _keywords(args: TrainingArguments, model: torch.nn.Module) -> dict[str, Any]:
    """All keyword arguments of the optimizer: those of the config, of `optim_args`, and what a budget chooses."""
    settings = args.optimizer_settings() if isinstance(args, SGCConfigMixin) else {}
    overrides = parse_optim_args(args.optim_args)
    budget = overrides.pop("state_budget", getattr(args, "state_budget", None))
    settings = {**settings, **overrides}
    settings.update(lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
    if budget is not None:
        for name in ("k", "s", "chunk_size", "state_dtype"):
            if settings.get(name) is not None:
                raise ConfigError(
                    f"{name}={settings[name]!r} with state_budget={budget!r}, which chooses it; leave one out."
                )
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = budget_settings(parameters, budget, settings)
    return settings


def parse_optim_args(text: str | None) -> dict[str, Any]:
    """Settings out of `optim_args`, for example `"mode=paper,k=64,s=16"`.

    Args:
        text (`str`, *optional*): Names and values as transformers writes them.

    Raises:
        ConfigError: a name `SGCAdamW` does not have, or a value of the wrong kind.
    """
    defaults = {
        name: p.default for name, p in inspect.signature(SGCAdamW).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    known = {**defaults, "state_budget": 1.0, "rank": 1, "directions": 1, "relative_step": True}
    found: dict[str, Any] = {}
    for pair in (text or "").replace(" ", "").split(","):
        if not pair:
            continue
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ConfigError(
                f"optim_args has {pair!r}; expected name=value with a name of {', '.join(sorted(known))}."
            )
        try:
            found[name] = None if value == "None" else _parsed(value, type(known[name]))
        except (KeyError, ValueError):
            raise ConfigError(f"optim_args has {pair!r}; expected a value like {known[name]!r} for {name}.") from None
    return found


def _parsed(text: str, kind: type) -> Any:
    return {"true": True, "false": False, "1": True, "0": False}[text.lower()] if kind is bool else kind(text)
