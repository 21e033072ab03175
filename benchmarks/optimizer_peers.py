"""Optimizers to compare with `SGCAdamW`: a table of names and how each is made for a model, with a rate to begin from.

    optimizer = PEERS["GaLore r8"].make(model, 3e-3)
    true_state_bytes(optimizer)  # after a step

Peers of other packages are left out, with a reason, where the package is missing:

    pip install peft
    pip install --no-deps galore-torch==1.0 apollo-torch==1.0.3 bitsandbytes torchao

`--no-deps`, because the first two declare packages that their optimizers for plain AdamW do not need, and one of those does
not go with the CPU build of torch. galore-torch imports bitsandbytes even where nothing of it is used. torchao compiles its
step, which takes a C++ compiler and at the first step half a minute; where it fails bitsandbytes takes its place.

All get the decay of Trainer's two groups. GaLore and APOLLO project the linear layers of the blocks and give AdamW to the
rest, as Trainer does for `optim_target_modules="all-linear"`. LoRA freezes the model, puts its adapters into it in place, and
needs their weights on top of the state that is counted here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Adafactor, Trainer

from hf_ext.trainers.sgc_budget import budget_settings
from hf_ext.trainers.sgc_optimizer import SGCAdamW


DECAY, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8
RANK, GAP = 8, 200  # of GaLore, APOLLO and LoRA; steps between two projections
OURS = "sgc"
# Rates of all grids.
LADDER = tuple(float(f"{digit}e{power}") for power in range(-7, 3) for digit in (1, 2, 5))

Make = Callable[[nn.Module, float], Optimizer]


@dataclass(frozen=True)
class Peer:
    """How an optimizer is made, and the middle of its grid of rates.

    Args:
        make: a model and a rate to an optimizer; the model may be changed in place.
        scratch: middle rate for a model with random weights.
        finetune: middle rate for a trained model.
        needs: packages, any one of which is enough; none for an empty tuple.
        regimes: where it makes sense.
        slow: left out where it is not asked for by name.
    """

    make: Make
    scratch: float
    finetune: float
    needs: tuple[str, ...] = ()
    regimes: tuple[str, ...] = ("scratch", "finetune")
    slow: bool = False

    def grid(self, regime: str) -> tuple[float, ...]:
        """Three rates of `LADDER`; who searches goes on where the best is at an edge."""
        at = LADDER.index(getattr(self, regime))
        return LADDER[at - 1 : at + 2]

    def missing(self) -> str | None:
        """Why it cannot be made, `None` where it can."""
        reasons = []
        for package in self.needs:
            try:
                importlib.import_module(package)
                return None
            except Exception as error:  # packages with compiled parts fail in many ways
                reasons.append(f"{package}: {type(error).__name__}: {error}")
        return "; ".join(reasons) or None


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainer's two groups of the parameters that are trained."""
    # The method reads nothing of the trainer it belongs to.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return [
        {"params": [weight for name, weight in named if name in decayed], "weight_decay": DECAY},
        {"params": [weight for name, weight in named if name not in decayed], "weight_decay": 0.0},
    ]


def low_rank_groups(model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The same decay; linear layers of the blocks in a group of their own with `settings`."""
    heads = {id(weight) for weight in model.get_input_embeddings().parameters()}
    if model.get_output_embeddings() is not None:
        heads |= {id(weight) for weight in model.get_output_embeddings().parameters()}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in heads}
    groups = []
    for group in decay_groups(model):
        inside = [weight for weight in group["params"] if id(weight) in linear]
        groups.append({**group, "params": [weight for weight in group["params"] if id(weight) not in linear]})
        if inside:
            groups.append({**group, "params": inside, **settings})
    return groups


def adamw(model: nn.Module, rate: float) -> Optimizer:
    return torch.optim.AdamW(decay_groups(model), lr=rate, betas=BETAS, eps=EPS, foreach=True)


def sgd(momentum: float) -> Make:
    return lambda model, rate: torch.optim.SGD(decay_groups(model), lr=rate, momentum=momentum, foreach=True)


def adafactor(relative: bool) -> Make:
    """As Trainer makes it, or with the step relative to the weights; never with a rate of its own."""
    return lambda model, rate: Adafactor(
        decay_groups(model), lr=rate, scale_parameter=relative, relative_step=False, warmup_init=False
    )


def galore(model: nn.Module, rate: float) -> Optimizer:
    from galore_torch import GaLoreAdamW

    groups = low_rank_groups(model, {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"})
    return GaLoreAdamW(groups, lr=rate, betas=BETAS, eps=EPS, no_deprecation_warning=True)


def apollo(rank: int, scale: float, scale_type: str) -> Make:
    def make(model: nn.Module, rate: float) -> Optimizer:
        from apollo_torch import APOLLOAdamW

        settings = {"proj": "random", "scale_type": scale_type, "update_proj_gap": GAP, "proj_type": "std"}
        groups = low_rank_groups(model, {"rank": rank, "scale": scale, **settings})
        return APOLLOAdamW(groups, lr=rate, betas=BETAS, eps=EPS)

    return make


def adamw_8bit(model: nn.Module, rate: float) -> Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except Exception:  # compiled parts fail in many ways
        from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(decay_groups(model), lr=rate, betas=BETAS, eps=EPS)


def lora(model: nn.Module, rate: float) -> Optimizer:
    from peft import LoraConfig, inject_adapter_in_model

    for weight in model.parameters():
        weight.requires_grad_(False)
    head = model.get_output_embeddings()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names), model)
    return adamw(model, rate)


def sgc(budget: float | None = None, **settings: Any) -> Make:
    """`SGCAdamW`, whose size a share of AdamW's state may choose."""

    def make(model: nn.Module, rate: float) -> Optimizer:
        groups, chosen = decay_groups(model), settings
        if budget is not None:
            weights = [weight for group in groups for weight in group["params"]]
            chosen = budget_settings(weights, budget, settings)
        return SGCAdamW(groups, lr=rate, betas=BETAS, eps=EPS, **chosen)

    return make


PEERS: dict[str, Peer] = {
    OURS: Peer(sgc(), 5e-3, 5e-3),
    "AdamW": Peer(adamw, 2e-3, 1e-3),
    "SGD": Peer(sgd(0.0), 0.5, 0.5),
    "SGD momentum": Peer(sgd(0.9), 0.1, 0.1),
    "Adafactor": Peer(adafactor(False), 5e-3, 1e-3),
    "Adafactor relative": Peer(adafactor(True), 5e-2, 5e-2),
    "GaLore r8": Peer(galore, 1e-2, 2e-3, needs=("galore_torch",)),
    "APOLLO r8": Peer(apollo(RANK, 1.0, "channel"), 1e-2, 2e-3, needs=("apollo_torch",)),
    "APOLLO-Mini": Peer(apollo(1, 128.0, "tensor"), 1e-2, 2e-3, needs=("apollo_torch",)),
    "AdamW 8-bit": Peer(adamw_8bit, 2e-3, 1e-3, needs=("torchao.optim", "bitsandbytes")),
    "block scalar": Peer(sgc(mode="block", chunk_size=1024), 2e-3, 1e-3),
    # A frozen model with random weights is no language model.
    "LoRA r8": Peer(lora, 2e-3, 2e-3, needs=("peft",), regimes=("finetune",)),
    "sgc, budget 0.5%": Peer(sgc(0.005), 5e-3, 5e-3),
    "sgc, budget 2%": Peer(sgc(0.02), 5e-3, 5e-3),
    "sgc, budget 7.5%": Peer(sgc(0.075), 5e-3, 5e-3),
    "sgc, hybrid": Peer(sgc(mode="hybrid", k=128, s=48), 2e-3, 1e-3),
    "sgc, paper known": Peer(sgc(mode="paper", k=128, s=48), 1e-2, 2e-3),
    "sgc, paper omp": Peer(sgc(mode="paper", k=128, s=16, recover="omp"), 1e-2, 2e-3, slow=True),
    "sgc, paper rank 8": Peer(sgc(mode="paper", k=128, s=48, rank=RANK, refresh=GAP), 1e-2, 2e-3),
}


def choose(names: list[str] | None, regime: str | None = None) -> dict[str, Peer]:
    """Peers by name, all but the slow ones by default; says which are left out and why.

    Raises:
        SystemExit: a name that is none.
    """
    for name in names or ():
        if name not in PEERS:
            raise SystemExit(f"{name!r} is no optimizer; choose from {', '.join(map(repr, PEERS))}.")
    found = {}
    for name in names or PEERS:
        peer = PEERS[name]
        if peer.slow and not names:
            print(f"{name}: left out, slow; ask for it with --methods", flush=True)
        elif regime is not None and regime not in peer.regimes:
            print(f"{name}: left out, makes no sense in {regime}", flush=True)
        elif reason := peer.missing():
            print(f"{name}: left out, {reason}", flush=True)
        else:
            found[name] = peer
    return found


def neighbour(rate: float, up: bool) -> float | None:
    """The next rate of `LADDER`, `None` at its end."""
    at = next(i for i, value in enumerate(LADDER) if math.isclose(value, rate)) + (1 if up else -1)
    return LADDER[at] if 0 <= at < len(LADDER) else None


_PLAIN = (int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Generator, type(None))
_CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module)


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that something holds, inside containers, Python objects and tensors made of tensors."""
    if isinstance(thing, (*_PLAIN, *_CODE)) or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            for name in thing.__tensor_flatten__()[0]:
                yield from _tensors(getattr(thing, name), seen)
        else:
            yield thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            if not isinstance(key, Tensor):  # keys of a state are the parameters
                yield from _tensors(key, seen)
            yield from _tensors(value, seen)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for value in thing:
            yield from _tensors(value, seen)
    else:
        names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        for value in [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in names)]:
            yield from _tensors(value, seen)


def true_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of everything an optimizer keeps alive between steps, but parameters and gradients.

    Tensors wherever they are: in its state, inside Python objects there such as projectors, and in attributes of its own. A
    view is charged for all that it keeps alive, memory that several share once. Numbers outside tensors are not counted.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    foreign = {t.untyped_storage().data_ptr() for w in weights for t in (w.data, w.grad) if t is not None}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    held = {key: value for key, value in vars(optimizer).items() if key != "param_groups"}
    sizes = {}
    for tensor in _tensors([held, groups], set()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in foreign:
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
