"""`SGCAdamW`: the optimizer around the mathematics of `sgc.py` and `factored.py`: groups, state, checkpoints.

It needs no trainer. What it keeps between steps is in `optimizer.state`, tensors and nothing else, so that checkpoints load
with `weights_only=True`; matrices that a seed describes are drawn again, and checked where a state depends on them.

Source: arXiv 2502.00311.

Differs from the paper: the default, `mode="factored"`, is not its method but measured better with
less state; `mode="paper"` works in chunks, decodes by least squares unless `recover="omp"`, and follows our reading where the
algorithm was not available, see `sgc.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_ext.errors import CheckpointError, ConfigError, NonFiniteGradientError
from hf_ext.log import get_logger, warn_once
from hf_ext.trainers.factored import (
    LARGEST_VECTOR_SCALE,
    SMALLEST_SCALE,
    USUAL_SCALE,
    cut_directions_,
    normalize_factored,
    sketch_matrix,
)
from hf_ext.trainers.measurements import Measurement
from hf_ext.trainers.sgc import (
    Moments,
    block_direction,
    decode_quality,
    hybrid_direction,
    measured_direction,
    project_basis,
)
from hf_ext.trainers.sgc_checks import STATE_DTYPES, check_parameter, check_settings, check_whole
from hf_ext.trainers.sgc_state import directions_cut, is_vector, keeps_adamw, matrix_shape, state_shapes


FORMAT_VERSION = 1
# Chunks are worked on in pieces of about this many entries, which bounds the temporary memory of their modes.
BUCKET_ENTRIES = 1 << 22
# And matrices of one shape in stacks of about this many, which a processor's cache holds.
STACK_ENTRIES = 1 << 20
# Sums of squares of this stay in float32. Larger entries count as this; they say no more than a sign.
LARGEST_GRADIENT = 1e15

# What a state is made of; a checkpoint with other values does not fit.
_STRUCTURE = (
    "format_version", "mode", "k", "chunk_size", "measurement", "seed", "rank", "moment_space", "min_numel",
    "state_dtype", "checksum",
)  # fmt: skip

_Kept = tuple[Tensor, dict[str, Tensor]]  # a parameter and its state

_logger = get_logger(__name__)


class SGCAdamW(Optimizer):
    """AdamW's place with a small share of its state.

    Args:
        params (iterable): Parameters or groups, as for any optimizer. A group may override every setting.
        lr (`float`, defaults to 0.001):
            As AdamW's; up to three times as high with `mode="paper"`, where `s` entries of a chunk move. With `relative_step` a
            tensor moves by `lr` times its root mean square over 0.1, which for weights of 0.02 is about AdamW's step.
        betas (`tuple[float, float]`, defaults to `(0.9, 0.999)`): Of both moving averages.
        eps (`float`, defaults to 1e-8): Added to the root of the second moment.
        weight_decay (`float`, defaults to 0.0): Decoupled; times `lr`.
        mode (`str`, defaults to `"factored"`):
            `"factored"` is the one that measured best, `"paper"` the published method in chunks (MESGC; CESGC with `rank`),
            `"hybrid"` measured momentum with one second moment a chunk, `"block"` one second moment a chunk alone.
        k (`int`, defaults to 128): Measurements a chunk.
        s (`int`, defaults to 48): Entries kept a chunk; of 16, `recover="omp"` finds all again in 128 measurements.
        chunk_size (`int`, *optional*, defaults to 1024): Entries a chunk. `None` takes a tensor whole, for tests.
        measurement (`str`, defaults to `"srht"`): `"gaussian"`, `"srht"` or `"countsketch"`, see `measurements.py`.
        recover (`str`, defaults to `"known"`): `"known"` or `"omp"`, see `sgc.measured_direction`.
        moment_space (`str`, defaults to `"decoded"`): `"decoded"` or `"compressed"`, see there.
        residual (`str`, defaults to `"none"`): `"none"` or `"chunk"`, see there.
        rank (`int`, *optional*): Of CESGC's projection of matrices; `None` measures the gradient itself.
        refresh (`int`, defaults to 200): Steps between two projections of CESGC.
        directions (`int`, *optional*):
            Leading directions that `"factored"` cuts, at most a quarter of a matrix's shorter side; 0 cuts none, `None` a
            sixteenth of that side, at most 16. More cost more of the step.
        relative_step (`bool`, *optional*):
            Whether steps are proportional to each tensor's root mean square (at least 0.02, for vectors at most 1); `None`
            means with `mode="factored"` alone.
        min_numel (`int`, defaults to 4096):
            In modes with chunks, smaller tensors get AdamW's update, with its state. `"factored"` does so for all that are
            no matrices.
        seed (`int`, defaults to 0): Of measurements and sketches.
        state_dtype (`str`, defaults to `"float32"`):
            Or `"bfloat16"`, rounded stochastically: to the nearest, a moving average of long memory would stand still.
        on_nonfinite (`str`, defaults to `"raise"`): With NaN or infinity in a gradient: `"raise"`, or `"skip"` the step.

    Raises:
        ConfigError: a setting that cannot work, or a complex or empty parameter.

    Source: arXiv 2502.00311; what differs stands at the top of the module.

    Example:
        ```python
        import torch

        from hf_ext import SGCAdamW

        model = torch.nn.Linear(256, 256)
        optimizer = SGCAdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        ```
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        mode: str = "factored",
        k: int = 128,
        s: int = 48,
        chunk_size: int | None = 1024,
        measurement: str = "srht",
        recover: str = "known",
        moment_space: str = "decoded",
        residual: str = "none",
        rank: int | None = None,
        refresh: int = 200,
        directions: int | None = None,
        relative_step: bool | None = None,
        min_numel: int = 4096,
        seed: int = 0,
        state_dtype: str = "float32",
        on_nonfinite: str = "raise",
    ) -> None:
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        self._measurements: dict[tuple, Measurement] = {}
        self._sketches: dict[tuple, Tensor] = {}  # of the step that is being made
        self._huge = False  # gradients of this step are too large to be squared
        self.monitor = False  # fill `seen` at the next step
        self.seen: dict[str, float] = {}
        super().__init__(params, {**settings, "format_version": FORMAT_VERSION, "checksum": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after a check of its settings and parameters.

        Raises:
            ConfigError: naming the setting or the parameter, and the fix.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_settings(group)
            if group["relative_step"] is None:
                group["relative_step"] = group["mode"] == "factored"
            for parameter in group["params"]:
                check_parameter(parameter)
                check_whole(group, parameter, not keeps_adamw(group, parameter))
            if group["mode"] in ("paper", "hybrid") and group["chunk_size"] is not None and group["params"]:
                made = Measurement(group["measurement"], group["k"], group["chunk_size"], group["seed"])
                group["checksum"] = made.checksum
        except ConfigError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient.

        Args:
            closure (`Callable`, *optional*): Computes the loss anew; its value is returned.

        Raises:
            ConfigError: a gradient is sparse.
            NonFiniteGradientError: with `on_nonfinite="raise"`. Nothing was changed.
        """
        self.seen, loss = {}, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if not self._finite(ready):
            return loss
        # Products in half precision would not go with float32 states; whoever steps inside autocast means the model.
        with torch.autocast(next((p.device.type for parameters in ready for p in parameters), "cpu"), enabled=False):
            self._update(ready)
        return loss

    def _update(self, ready: list[list[Tensor]]) -> None:
        self._tally: list[Tensor] = []
        # What rounding draws depends on the step alone, so that a resumed run draws the same.
        steps = [int(self.state[p]["step"]) for parameters in ready for p in parameters if self.state[p]]
        self._noise = torch.Generator().manual_seed(self.defaults["seed"] + max(steps, default=0))
        for group, parameters in zip(self.param_groups, ready, strict=True):
            large, matrices, small = [], [], []
            for parameter in parameters:
                if keeps_adamw(group, parameter):
                    small.append((parameter, self._advance(group, parameter)))
                elif group["mode"] == "factored":
                    matrices.append((parameter, self._advance(group, parameter)))
                elif group["rank"] is not None and parameter.ndim > 1:
                    self._update_projected(group, parameter)
                else:
                    state, scale = self._advance(group, parameter), _scale(group, parameter)
                    large.append(_Chunked(parameter, self._gradient(parameter), state, scale))
            self._update_small(group, small)
            for stack in _stacks(matrices):
                self._update_factored(group, stack)
            self._update_chunks(group, large)
        self._sketches.clear()
        if self._tally:
            kept, total, unexplained, measured = torch.stack(self._tally).sum(0).tolist()
            self.seen = {
                "sgc_energy_kept": kept / total if total else 1.0,
                "sgc_decode_residual": (unexplained / measured) ** 0.5 if measured else 0.0,
            }
        del self._noise, self._tally

    def state_bytes(self) -> int:
        """Bytes of all that stays alive between steps: the state of all parameters, and matrices kept for reuse."""
        tensors = [v for state in self.state.values() for v in state.values() if isinstance(v, Tensor)]
        measured = sum(measurement.nbytes for measurement in self._measurements.values())
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors) + measured

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its own type, and a state made with other settings is refused.

        torch casts a state to the type of its parameter, which rounds moments and counters where weights are bfloat16.

        Raises:
            CheckpointError: naming the setting that differs.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for name in _STRUCTURE:
                if name not in saved:
                    raise CheckpointError(
                        f"the checkpoint has no {name!r}: SGCAdamW did not write it. Resume with the optimizer that did, "
                        "or start anew."
                    )
                if name == "checksum" and saved[name] != group[name]:
                    raise CheckpointError(
                        f"measurement={group['measurement']!r} draws another matrix here than the checkpoint was written "
                        "with: another kind of processor or version of torch rounds normal numbers differently. Resume "
                        'where it was written; measurement="srht" is the same everywhere.'
                    )
                if saved[name] != group[name]:
                    raise CheckpointError(
                        f"the checkpoint was written with {name}={saved[name]!r}, this optimizer has {group[name]!r}; make "
                        "it with the same settings, or start anew."
                    )
            for number, parameter in zip(saved["params"], group["params"], strict=False):
                kept = state_dict["state"].get(number, {})
                for name, shape in state_shapes(group, parameter).items() if kept else ():
                    if name not in kept or tuple(kept[name].shape) != shape:
                        found = tuple(kept[name].shape) if name in kept else "nothing"
                        raise CheckpointError(
                            f"the checkpoint holds {found} as {name!r} of a parameter of shape {tuple(parameter.shape)}, "
                            f"expected {shape}: it belongs to another model, or its parameters are in another order."
                        )
        wanted = [group["on_nonfinite"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, choice in zip(self.param_groups, wanted, strict=True):
            # Who resumes after an error may have changed it as the error said.
            group["on_nonfinite"] = choice
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    # On an accelerator every look at the count would wait for it.
                    device = torch.device("cpu") if name == "step" else parameter.device
                    self.state[parameter][name] = value.detach().to(device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (
            ("_measurements", {}),
            ("_sketches", {}),
            ("_huge", False),
            ("monitor", False),
            ("seen", {}),
        ):
            self.__dict__.setdefault(name, value)

    def _finite(self, ready: list[list[Tensor]]) -> bool:
        """Whether this step can be made; notes whether squares of its gradients would overflow."""
        gradients = [p.grad for parameters in ready for p in parameters if p.grad is not None]
        for gradient in gradients:
            if gradient.layout is not torch.strided:
                raise ConfigError(
                    f"a gradient of shape {tuple(gradient.shape)} is sparse, SGCAdamW needs dense ones: make the embedding "
                    "with sparse=False."
                )
        # One norm for all is cheap; one that is not finite may also be an overflow of finite entries.
        self._huge = False
        if not gradients:
            return True
        norms = [norm.float().to(gradients[0].device) for norm in torch._foreach_norm(gradients)]
        if bool((torch.stack(norms) < LARGEST_GRADIENT).all()):  # false for NaN
            return True
        bad = []
        for group, parameters in zip(self.param_groups, ready, strict=True):
            spoilt = [p for p in parameters if p.grad is not None and not bool(p.grad.isfinite().all())]
            bad += [(group["on_nonfinite"], tuple(p.shape)) for p in spoilt]
        self._huge = not bad
        raising = [shape for wanted, shape in bad if wanted == "raise"]
        if raising:
            raise NonFiniteGradientError(
                f"the gradients of {len(raising)} parameters hold NaN or infinity, the first of shape {raising[0]}; nothing "
                'was changed. Lower the learning rate, or pass on_nonfinite="skip" to leave such steps out.'
            )
        if bad:
            warn_once(_logger, "SGCAdamW leaves out steps whose gradients hold NaN or infinity.")
        return not bad

    def _gradient(self, parameter: Tensor) -> Tensor:
        gradient: Any = parameter.grad
        gradient = gradient.float()
        return gradient.clamp(-LARGEST_GRADIENT, LARGEST_GRADIENT) if self._huge else gradient

    def _measurement(self, group: dict[str, Any], chunk_size: int, device: torch.device) -> Measurement:
        key = (group["measurement"], min(group["k"], chunk_size), chunk_size, group["seed"], device)
        if key not in self._measurements:
            self._measurements[key] = Measurement(*key)
        return self._measurements[key]

    def _sketch(self, rank: int, short: int, seed: int, device: torch.device) -> Tensor:
        """Shared by all matrices of a shorter side, and others at each step: what one sketch misses the next will see."""
        key = (rank, short, seed, device)
        if key not in self._sketches:
            self._sketches[key] = sketch_matrix(rank, short, seed).to(device)
        return self._sketches[key]

    def _advance(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's state, made at its first step, with this step counted."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            dtype = STATE_DTYPES[group["state_dtype"]]
            for name, shape in state_shapes(group, parameter).items():
                # A basis is a measurement of its own: rounded, it would not be orthonormal.
                kind = torch.float32 if name == "basis" else dtype
                state[name] = torch.zeros(shape, dtype=kind, device=parameter.device)
        state["step"] += 1
        return state

    def _store(self, state: dict[str, Tensor], **values: Tensor) -> None:
        for name, value in values.items():
            _round_into(state[name], value, self._noise)

    def _update_small(self, group: dict[str, Any], small: list[_Kept]) -> None:
        if not small:
            return
        at = [_moments(group, state) for _, state in small]
        gradients = [self._gradient(parameter) for parameter, _ in small]
        firsts, seconds = ([state[name].float() for _, state in small] for name in ("first", "second"))
        torch._foreach_lerp_(firsts, gradients, 1.0 - at[0].beta1)
        torch._foreach_lerp_(seconds, torch._foreach_mul(gradients, gradients), 1.0 - at[0].beta2)
        spreads = torch._foreach_div(seconds, [moments.correction2 for moments in at])
        torch._foreach_sqrt_(spreads)
        torch._foreach_add_(spreads, group["eps"])
        directions = torch._foreach_div(firsts, [moments.correction1 for moments in at])
        torch._foreach_div_(directions, spreads)
        for (parameter, state), direction, first, second in zip(small, directions, firsts, seconds, strict=True):
            _move(group, parameter, direction, _scale(group, parameter))
            self._store(state, first=first, second=second)

    def _update_factored(self, group: dict[str, Any], stack: list[_Kept]) -> None:
        parameters, states = zip(*stack, strict=True)
        at, shape = _moments(group, states[0]), matrix_shape(parameters[0])[1:]
        gradients = [self._gradient(p).reshape(-1, *shape) for p in parameters]
        rows = _joined([state["rows"].float().view(-1, shape[0]) for state in states])
        columns = _joined([state["columns"].float().view(-1, shape[1]) for state in states])
        update = normalize_factored(gradients, rows, columns, at.beta2, at.correction2, at.eps)
        norms = after = torch.linalg.vector_norm(update.flatten(1), dim=1)
        if rank := directions_cut(group, shape):
            sketch = self._sketch(rank, min(shape), group["seed"] + at.step, update.device)
            after = cut_directions_(update, norms, sketch, at.step)
        # What was cut off is given to the other directions. As in Adafactor, more than one unit is brought back to one.
        factors = norms.clamp_max((shape[0] * shape[1]) ** 0.5) / after.clamp_min(torch.finfo(torch.float32).tiny)
        counts = [len(gradient) for gradient in gradients]
        pieces = (tensor.split(counts) for tensor in (update, factors, rows, columns))
        for (parameter, state), matrices, factor, row, column in zip(stack, *pieces, strict=True):
            scale = _scale(group, parameter, len(matrices))
            factor = factor if scale is None else factor * scale
            _move(group, parameter, matrices.view(parameter.shape), factor)
            self._store(state, rows=row.view_as(state["rows"]), columns=column.view_as(state["columns"]))

    def _update_projected(self, group: dict[str, Any], parameter: Tensor) -> None:
        """CESGC: the chunks are those of the gradient in a basis of its leading singular vectors."""
        state = self._advance(group, parameter)
        gradient = self._gradient(parameter).flatten(1)
        wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
        if (int(state["step"]) - 1) % group["refresh"] == 0 or not bool(state["basis"].any()):
            state["basis"].copy_(project_basis(wide, state["basis"]))
        inner = state["basis"].T @ wide
        decoded = self._directions(group, [_Chunked(parameter, inner, state, None)]).flatten()[: inner.numel()]
        direction = state["basis"] @ decoded.view(inner.shape)
        turned = direction if wide is gradient else direction.T
        _move(group, parameter, turned.reshape(parameter.shape), _scale(group, parameter))

    def _update_chunks(self, group: dict[str, Any], parts: list[_Chunked]) -> None:
        for bucket in _buckets(parts, group["chunk_size"]):
            directions = self._directions(group, bucket)
            for part, direction in zip(bucket, directions.split([part.chunks for part in bucket]), strict=True):
                part.move(group, direction)

    def _directions(self, group: dict[str, Any], bucket: list[_Chunked]) -> Tensor:
        """`(C, N)` directions of the chunks of a bucket, whose states are updated."""
        chunk_size = group["chunk_size"] or bucket[0].gradient.numel()
        gradient = torch.cat([part.padded(chunk_size) for part in bucket])
        at = _moments(group, bucket[0].state)
        names = [name for name in ("first", "second") if name in bucket[0].state]
        states = {name: torch.cat([part.rows(name) for part in bucket]).float() for name in names}
        if group["mode"] == "block":
            directions = block_direction(gradient, states["second"], at)
        else:
            measurement = self._measurement(group, chunk_size, gradient.device)
            s = min(group["s"], measurement.k)
            if group["mode"] == "hybrid":
                directions = hybrid_direction(gradient, states["first"], states["second"], at, measurement, s)
            else:
                directions = measured_direction(
                    gradient,
                    states["first"],
                    states["second"],
                    at,
                    measurement,
                    s,
                    group["recover"],
                    group["moment_space"],
                    group["residual"],
                )
            if self.monitor:
                self._tally.append(decode_quality(gradient, states["first"], measurement, s, group["recover"]))
        for name, value in states.items():
            for part, piece in zip(bucket, value.split([part.chunks for part in bucket]), strict=True):
                _round_into(part.rows(name), piece, self._noise)
        return directions


@dataclass(frozen=True)
class _Chunked:
    """Chunks `start` to `stop` of one gradient, `stop=None` means all; `scale` multiplies their directions."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    scale: Tensor | None
    start: int = 0
    stop: int | None = None

    @property
    def chunks(self) -> int:
        return len(self.rows("second"))

    def rows(self, name: str) -> Tensor:
        """Their part of a state, `(C, K)` or `(C, 1)`, a view."""
        return self.state[name][self.start : self.stop]

    def padded(self, chunk_size: int) -> Tensor:
        """`(C, N)` entries in float32, zeros behind the last."""
        first, last = self.start * chunk_size, (self.start + self.chunks) * chunk_size
        flat = self.gradient.reshape(-1)[first:last]
        return torch.nn.functional.pad(flat, (0, last - first - len(flat))).view(-1, chunk_size)

    def move(self, group: dict[str, Any], direction: Tensor) -> None:
        """Decay and update the entries of the parameter under these chunks."""
        first = self.start * direction.shape[1]
        flat = self.parameter.detach().reshape(-1)  # a view, but of an unusual memory order a copy
        entries = flat[first : first + direction.numel()]
        _move(group, entries, direction.reshape(-1)[: len(entries)], self.scale)
        if flat.data_ptr() != self.parameter.data_ptr():
            self.parameter.copy_(flat.view(self.parameter.shape))


def _buckets(parts: list[_Chunked], chunk_size: int | None) -> Iterator[list[_Chunked]]:
    """Chunks of several tensors together, or of one in turns, about `BUCKET_ENTRIES` at a time and all at the same step."""
    if chunk_size is None:
        yield from ([part] for part in parts)
        return
    limit = max(1, BUCKET_ENTRIES // chunk_size)
    bucket: list[_Chunked] = []
    filled = 0
    for part in sorted(parts, key=lambda part: int(part.state["step"])):
        start, total = 0, part.chunks
        while start < total:
            if bucket and (filled == limit or not _together(bucket[0], part)):
                yield bucket
                bucket, filled = [], 0
            stop = min(total, start + limit - filled)
            bucket.append(replace(part, start=start, stop=stop))
            filled += stop - start
            start = stop
    if bucket:
        yield bucket


def _together(one: _Chunked, other: _Chunked) -> bool:
    """Whether one batch can hold the chunks of both."""
    return one.gradient.device == other.gradient.device and int(one.state["step"]) == int(other.state["step"])


def _stacks(matrices: list[_Kept]) -> Iterator[list[_Kept]]:
    """Parameters whose matrices have one shape, device and step, with their states, about `STACK_ENTRIES` at a time."""
    alike: dict[tuple, list[_Kept]] = {}
    for parameter, state in matrices:
        key = (matrix_shape(parameter)[1:], parameter.device, int(state["step"]))
        alike.setdefault(key, []).append((parameter, state))
    for found in alike.values():
        stack: list[_Kept] = []
        filled = 0
        for kept in found:
            if stack and filled + kept[0].numel() > STACK_ENTRIES:
                yield stack
                stack, filled = [], 0
            stack.append(kept)
            filled += kept[0].numel()
        yield stack


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _moments(group: dict[str, Any], state: dict[str, Tensor]) -> Moments:
    beta1, beta2 = group["betas"]
    return Moments(beta1, beta2, group["eps"], int(state["step"]))


def _scale(group: dict[str, Any], parameter: Tensor, stack: int = 1) -> Tensor | None:
    """`(B)` units of relative steps, of a parameter as so many matrices, on its device; `None` where steps are not relative."""
    if not group["relative_step"]:
        return None
    weights = parameter.detach().reshape(stack, -1)
    wide = torch.promote_types(weights.dtype, torch.float32)
    scale = torch.linalg.vector_norm(weights, dim=1, dtype=wide).float() / weights.shape[1] ** 0.5
    return scale.clamp(SMALLEST_SCALE, LARGEST_VECTOR_SCALE if is_vector(parameter) else None) / USUAL_SCALE


def _move(group: dict[str, Any], parameter: Tensor, direction: Tensor, factor: Tensor | None) -> None:
    """Decay, then step along `direction` times `factor`, `(B)` for a stack, in one pass where types agree."""
    rate = group["lr"]
    if factor is not None:
        factor = factor.view(-1, 1, 1) if len(factor) > 1 else factor[0]
    if group["weight_decay"]:
        parameter.mul_(1.0 - rate * group["weight_decay"])
    if factor is None:
        parameter.add_(direction.to(parameter.dtype), alpha=-rate)
    elif parameter.dtype == direction.dtype:
        parameter.addcmul_(direction, factor, value=-rate)
    else:
        parameter.add_((direction * factor).to(parameter.dtype), alpha=-rate)


def _round_into(kept: Tensor, value: Tensor, noise: torch.Generator) -> None:
    """Copy a float32 tensor into one that may be bfloat16, up or down with the chances that make the mean right."""
    if kept.dtype == torch.float32:
        if kept.data_ptr() != value.data_ptr():
            kept.copy_(value)
        return
    drawn = torch.randint(0, 1 << 16, value.shape, generator=noise, dtype=torch.int32)
    bits = value.contiguous().view(torch.int32) + drawn.to(value.device)
    kept.copy_((bits & -(1 << 16)).view(torch.float32))
