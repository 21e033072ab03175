"""TCCM, time-conditioned contraction matching: an anomaly score for rows of a table, learned from rows believed normal.

Paper: https://huggingface.co/papers/2510.18328. With `z` the row in standard deviations of the training rows, a network is
trained to point from every row to the origin, at every time `t` (algorithm 1, equation 4),

    minimise  mean over rows, features and t ~ U[0, 1)  of  (f(z, t) + z)^2 ,

and the score is what it misses by at t = 1 (algorithm 2, equation 5):

    r(z) = f(z, 1) + z ,   S(z) = ||r(z)|| .

The paper chooses the number of epochs per data set, from 1 to 5,000, which needs labels. At one fixed setting, S ties
with or loses to the distance to the nearest training rows (docs/methods/tccm.md has the numbers). The default score is
therefore

    S(z) = d(z)^(1 - w) r(z)^w ,     w = 0.15,

`d` the root mean square of the distances to the five nearest of at most 4,096 training rows, `r` the geometric mean
over five small networks of ||r||, each of its features divided by its root mean square over the training rows; both
are divided by their medians over the training rows, so that 1 is a usual row. `mode="paper"` is the paper's own form.

Differs from the paper, in the default: the above; steps are counted, not epochs; networks are 128 wide, not 256, and trained
together as batched products. In both: the time embedding of t = 1 is a constant and is folded into the first bias when
scoring, which changes nothing but the time it takes.

Shapes: n rows, d features, m members (networks), h hidden units, e numbers of the time embedding, k neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_ext.config import MethodConfig
from hf_ext.errors import ConfigError, DataError
from hf_ext.pipelines.neighbors import mean_distances


MODEL_TYPE = "hf_ext_tccm"

# What a setting is when it is not given, by mode.
DEFAULTS: dict[str, dict[str, Any]] = {
    "default": {"members": 5, "hidden_size": 128, "steps": 200, "neighbors": 5, "residual_weight": 0.15},
    "paper": {"members": 1, "hidden_size": 256, "steps": None, "neighbors": 0, "residual_weight": 1.0},
}
# Rows scored at a time: their distances to the references stay in the cache of one core.
CHUNK_ROWS = 256
BLOCK_ROWS = 64
# Added to both parts of the score, in their medians: rows that repeat training rows are still ordered by the other part.
FLOOR = 0.05
# Standard deviations at which a row is cut off, so that squares stay finite in float32.
LARGEST = 1e9


class TCCMConfig(PreTrainedConfig, MethodConfig):  # type: ignore[misc]
    """Settings of a `TCCMModel`.

    Args:
        feature_size (`int`, defaults to 1): d; `fit` sets it.
        mode (`str`, defaults to `"default"`): `"paper"` for the paper's single network, score and loss alone.
        members (`int`, *optional*): Networks, each from its own start; 5, in the paper 1.
        hidden_size (`int`, *optional*): h; 128, in the paper 256.
        time_embedding (`str`, defaults to `"sinusoidal"`): `"none"` leaves the time out, which changes little.
        time_embedding_size (`int`, defaults to 128): e, even.
        steps (`int`, *optional*): Optimizer steps; 200. The paper's mode takes `epochs` or `steps`, and has no default:
            its own were chosen per data set.
        epochs (`int`, *optional*): Passes over the rows in place of `steps`.
        learning_rate (`float`, defaults to 5e-3): Of Adam.
        batch_size (`int`, defaults to 512): Rows a step.
        neighbors (`int`, *optional*): k; 5, in the paper 0.
        max_references (`int`, defaults to 4096): Training rows kept to measure distances to.
        residual_weight (`float`, *optional*): w, the share of the networks in the score; 0.15, in the paper 1.
        trim (`float`, defaults to 0.0): Share of rows taken for contamination: left out of each step's loss and of the
            references, those with the largest values.
        contamination (`float`, defaults to 0.1): Share of the training rows beyond the threshold.
        seed (`int`, defaults to 0): Of starts, batches, times and references.
        num_references (`int`, defaults to 0): Training rows the model keeps; `fit` sets it.
        num_calibration (`int`, defaults to 0): Scores it keeps for threshold and p-values; `fit` and `calibrate` set it.
        held_out (`bool`, defaults to `False`): Whether those are of rows kept out of the fit; set likewise.

    Raises:
        ConfigError: a setting that cannot work.
    """

    model_type = MODEL_TYPE

    # Those that are None here depend on the mode, and are set before anyone sees them.
    feature_size: int = 1
    mode: Literal["default", "paper"] = "default"
    members: int = None  # type: ignore[assignment]
    hidden_size: int = None  # type: ignore[assignment]
    time_embedding: Literal["sinusoidal", "none"] = "sinusoidal"
    time_embedding_size: int = 128
    steps: int | None = None
    epochs: int | None = None
    learning_rate: float = 5e-3
    batch_size: int = 512
    neighbors: int = None  # type: ignore[assignment]
    max_references: int = 4096
    residual_weight: float = None  # type: ignore[assignment]
    trim: float = 0.0
    contamination: float = 0.1
    seed: int = 0
    num_references: int = 0
    num_calibration: int = 0
    held_out: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in (DEFAULTS.get(self.mode, {}) if isinstance(self.mode, str) else {}).items():
            if getattr(self, name) is None and not (name == "steps" and self.epochs is not None):
                setattr(self, name, value)
        self._check_types()
        self._check_values()
        super().__post_init__(**kwargs)

    def _check_values(self) -> None:
        for name in ("feature_size", "members", "hidden_size", "batch_size", "max_references"):
            self.check(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("steps", "epochs", "neighbors", "seed", "num_references", "num_calibration"):
            value = getattr(self, name)
            self.check(value is None or value >= 0, name, "must be at least 0")
        self.check(self.steps is None or self.epochs is None, "epochs", f"and steps={self.steps} exclude each other")
        size = self.time_embedding_size
        self.check(size >= 2 and size % 2 == 0, "time_embedding_size", "must be even and at least 2")
        self.check(self.learning_rate > 0, "learning_rate", "must be above 0")
        self.check(0 <= self.residual_weight <= 1, "residual_weight", "must be between 0 and 1")
        needs = self.neighbors > 0 or self.residual_weight == 1
        self.check(needs, "neighbors", f"needs residual_weight=1, not {self.residual_weight}: nothing else is scored")
        self.check(0 <= self.trim < 0.5, "trim", "must be at least 0 and below 0.5")
        self.check(0 < self.contamination <= 0.5, "contamination", "must be above 0 and at most 0.5")

    @property
    def embedding_size(self) -> int:
        """e, 0 without time."""
        return self.time_embedding_size if self.time_embedding == "sinusoidal" else 0


@dataclass
class TCCMOutput(ModelOutput):
    """Output of `TCCMModel`.

    Args:
        loss (`Tensor`, *optional*): Equation 4, summed over the members.
        scores (`Tensor`, *optional*): `(n,)`, higher is more abnormal; not in train mode.
    """

    loss: Tensor | None = None
    scores: Tensor | None = None


class ContractionNet(nn.Module):
    """The members' networks, `[z, Embed(t)] -> h -> h -> d` with ReLU between, as one stack of matrices."""

    def __init__(self, config: TCCMConfig) -> None:
        super().__init__()
        self.seed, self.embedding_size = config.seed, config.embedding_size
        sizes = (
            config.feature_size + config.embedding_size,
            config.hidden_size,
            config.hidden_size,
            config.feature_size,
        )
        shapes = list(zip(sizes[:-1], sizes[1:]))
        # In float32 whatever dtype `from_pretrained` is asked for: the scores are those of the model that was saved.
        like: dict[str, Any] = {"dtype": torch.float32}
        self.weights = nn.ParameterList(
            [torch.empty(config.members, fan_in, fan_out, **like) for fan_in, fan_out in shapes]
        )
        self.biases = nn.ParameterList([torch.empty(config.members, 1, fan_out, **like) for _, fan_out in shapes])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start of `nn.Linear`, from a generator of its own: the same whatever was drawn before."""
        generator = torch.Generator().manual_seed(self.seed)
        for weight, bias in zip(self.weights, self.biases):
            bound = weight.shape[1] ** -0.5
            for tensor in (weight, bias):
                tensor.copy_((torch.rand(tensor.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """f of all members, `(m, n, d)`, at rows `z`, `(m, n, d)`, and times `t`, `(m, n, 1)`."""
        if self.embedding_size:
            z = torch.cat([z, embed_time(t, self.embedding_size)], dim=-1)
        hidden = torch.baddbmm(self.biases[0], z, self.weights[0]).relu()
        return self._rest(hidden)

    def at_one(self, z: Tensor) -> Tensor:
        """`forward` at t = 1 of rows `(n, d)`, with the constant embedding in the first bias."""
        weight, bias, d = self.weights[0], self.biases[0], z.shape[-1]
        if self.embedding_size:
            bias = bias + embed_time(z.new_ones(1, 1), self.embedding_size) @ weight[:, d:]
        return self._rest(torch.baddbmm(bias, z.expand(len(weight), *z.shape), weight[:, :d]).relu_())

    def _rest(self, hidden: Tensor) -> Tensor:
        hidden = torch.baddbmm(self.biases[1], hidden, self.weights[1]).relu()
        return torch.baddbmm(self.biases[2], hidden, self.weights[2])


def embed_time(t: Tensor, size: int) -> Tensor:
    """`[sin(t w), cos(t w)]` of times `(..., 1)`, with `w_i = 10000^(-2 i / size)`: `(..., size)`."""
    frequencies = torch.exp(
        -math.log(10_000.0) / (size // 2) * torch.arange(size // 2, device=t.device, dtype=t.dtype)
    )
    return torch.cat([torch.sin(t * frequencies), torch.cos(t * frequencies)], dim=-1)


class TCCMModel(PreTrainedModel):
    """The score and all it needs: networks, means, scales, training rows to measure distances to, calibration.

    `fit` does the whole of it. `Trainer` trains the networks as well: the loss needs only a column `features`.

    Args:
        config (`TCCMConfig`): Settings.
    """

    config_class = TCCMConfig
    config: TCCMConfig
    base_model_prefix = "tccm"
    main_input_name = "features"
    _no_split_modules = ["ContractionNet"]

    mean: Tensor
    scale: Tensor
    references: Tensor
    residual_scale: Tensor
    medians: Tensor
    calibration: Tensor
    threshold: Tensor
    rows_seen: Tensor
    deviation: Tensor

    def __init__(self, config: TCCMConfig) -> None:
        super().__init__(config)
        d, m = config.feature_size, config.members
        self.net = ContractionNet(config)
        self.register_buffer("mean", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(d, dtype=torch.float64))
        # What `scale` was made of: it differs for constant features and for categories.
        self.register_buffer("deviation", torch.ones(d, dtype=torch.float64))
        self.register_buffer("references", torch.zeros(config.num_references, d, dtype=torch.float32))
        self.register_buffer("residual_scale", torch.ones(m, 1, d, dtype=torch.float32))
        # Medians of distance and residual over the training rows.
        self.register_buffer("medians", torch.ones(2, dtype=torch.float32))
        self.register_buffer("calibration", torch.zeros(config.num_calibration, dtype=torch.float32))
        self.register_buffer("threshold", torch.tensor(math.inf, dtype=torch.float32))
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Not `ContractionNet`: transformers passes over modules that hold no parameters of their own.
        if isinstance(module, nn.ParameterList):
            self.net.reset_parameters()

    def forward(self, features: Tensor, t: Tensor | None = None, return_loss: bool = True) -> TCCMOutput:
        """Loss of some rows and, in eval mode, their scores.

        Args:
            features (`Tensor`): `(n, d)`, in the units of the table.
            t (`Tensor`, *optional*): Times, `(n, 1)`; drawn in train mode, evenly spread in eval mode.
            return_loss (`bool`, defaults to `True`): Whether to compute the loss.

        Raises:
            DataError: another width than d, or values that are not finite.
        """
        z = self.standardize(features)
        loss = None
        if return_loss:
            if t is None:
                even = (torch.arange(len(z), device=z.device, dtype=z.dtype)[:, None] + 0.5) / len(z)
                t = torch.rand(self.config.members, len(z), 1, device=z.device) if self.training else even
            loss = self._loss(z.expand(self.config.members, *z.shape), t.expand(self.config.members, len(z), 1))
        return TCCMOutput(loss=loss, scores=None if self.training else self._scores(z))

    def standardize(self, features: Tensor) -> Tensor:
        """`z`, float32: differences to the training mean in standard deviations, taken in float64.

        Raises:
            DataError: another width than d, or values that are not finite.
        """
        d = self.config.feature_size
        if features.ndim != 2 or features.shape[1] != d:
            raise DataError(
                f"features has shape {tuple(features.shape)}; this model was fitted on {d} features, expected (rows, {d})."
            )
        if not torch.isfinite(features).all():
            row = int((~torch.isfinite(features).all(dim=1)).nonzero()[0])
            raise DataError(f"features holds NaN or infinity, first in row {row}; drop or fill such rows.")
        z = (features.to(self.mean.device, self.mean.dtype) - self.mean) / self.scale
        return z.clamp(-LARGEST, LARGEST).float()

    def score(self, features: Tensor) -> Tensor:
        """Anomaly scores `(n,)`, float32, of rows `(n, d)`: higher is more abnormal, 1 is the median training row.

        In `mode="paper"`, S of equation 5. A training row is not its own neighbour: a reference equal to the row is left out.

        Raises:
            DataError: another width than d, or values that are not finite.
        """
        return self._scores(self.standardize(features))

    def residuals(self, features: Tensor) -> Tensor:
        """r at t = 1 of every member, `(m, n, d)`, divided by their scales in the default."""
        return self._residuals(self.standardize(features))

    @torch.no_grad()
    def _scores(self, z: Tensor) -> Tensor:
        if not len(z):
            return z.new_zeros(0)
        # Products round differently for one row than for many: whole blocks give a row the same score in any company.
        blocks = F.pad(z, (0, 0, 0, -len(z) % BLOCK_ROWS)).split(CHUNK_ROWS)
        return torch.cat([self._combine(*self._parts(block)) for block in blocks])[: len(z)]

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """d and r of a few rows, before their medians; d is 1 without references."""
        logs = self._residuals(z).square().sum(-1).clamp_min(1e-30).log()
        residual = (logs.mean(0) / 2).exp() if self.config.members > 1 else (logs[0] / 2).exp()
        k = self._neighbors
        return mean_distances(z, self.references, k) if k else torch.ones_like(residual), residual

    def _combine(self, distance: Tensor, residual: Tensor) -> Tensor:
        if self.config.mode == "paper" and not self._neighbors:
            return residual
        weight = self.config.residual_weight
        parts = [
            (part / median).square().add(FLOOR**2).log() / 2
            for part, median in zip((distance, residual), self.medians.unbind())
        ]
        return ((1 - weight) * parts[0] + weight * parts[1]).exp()

    @torch.no_grad()
    def _residuals(self, z: Tensor) -> Tensor:
        return (self.net.at_one(z) + z) / self.residual_scale

    @property
    def _neighbors(self) -> int:
        """k, less where there are fewer references; one of them may be the row itself."""
        return min(self.config.neighbors, len(self.references) - 1) if len(self.references) > 1 else 0

    def _loss(self, z: Tensor, t: Tensor) -> Tensor:
        """Equation 4 of rows `(m, n, d)` at times `(m, n, 1)`, summed over the members, whose weights do not meet."""
        rows = (self.net(z, t) + z).square().mean(-1)
        keep = rows.shape[1] - int(self.config.trim * rows.shape[1])
        if keep < rows.shape[1]:
            rows = rows.topk(keep, dim=1, largest=False, sorted=False).values
        return rows.mean(1).sum()

    # Fitting

    def fit(
        self,
        features: Tensor,
        scale_floors: Tensor | None = None,
        moments: tuple[Tensor, Tensor] | None = None,
        progress: bool = False,
    ) -> TCCMModel:
        """Learn from rows believed normal, from the start: what was learned before is forgotten.

        Args:
            features (`Tensor`): `(n, d)`, n >= 2.
            scale_floors (`Tensor`, *optional*): `(d,)`, least standard deviation to divide by.
            moments (`tuple[Tensor, Tensor]`, *optional*): Means and deviations, `(d,)` each, where the rows are a sample of more.
            progress (`bool`, defaults to `False`): Whether to show a bar.

        Raises:
            ConfigError: `mode="paper"` without `epochs` or `steps`.
            DataError: fewer than two rows, another width than d, or values that are not finite.
        """
        if self.config.steps is None and self.config.epochs is None:
            raise ConfigError(
                'TCCMConfig.epochs=None: mode="paper" needs epochs or steps, the paper chose 1 to 5000 epochs per data set. '
                "The default mode needs neither."
            )
        features = features.to(self.device)
        self._check_rows(features, 2)
        self.rows_seen.zero_()
        mean, deviation = moments if moments is not None else _moments(features)
        self.set_scales(mean.to(self.device), deviation.to(self.device), floors=scale_floors)
        self.net.reset_parameters()
        z = self.standardize(features)
        generator = torch.Generator().manual_seed(self.config.seed)
        self._train(z, generator, progress)
        self._set_references(z, generator)
        self.rows_seen += len(z)
        return self

    def set_scales(self, mean: Tensor, deviation: Tensor, floors: Tensor | None = None) -> None:
        """Set means and scales, `(d,)`; a constant feature gets the scale 1, a category at least its floor."""
        constant = deviation <= 1e-12 * mean.abs()
        scale = torch.where(constant, torch.ones_like(deviation), deviation)
        if floors is not None:
            floors = floors.to(scale)
            scale = torch.where(floors > 0, deviation.maximum(floors), scale)
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.deviation.copy_(deviation)

    def partial_fit(self, features: Tensor, scale_floors: Tensor | None = None) -> TCCMModel:
        """Learn from more rows. Means and scales become those of all rows seen, the references stay a uniform sample of
        them, and the networks are trained for `steps` more, on references and new rows.

        Raises:
            DataError: as `fit`; the first call needs two rows, later ones one.
        """
        seen = int(self.rows_seen)
        if not seen:
            return self.fit(features, scale_floors=scale_floors)
        features = features.to(self.device)
        self._check_rows(features, 1)
        old = self.references.double() * self.scale + self.mean
        new_mean, new_deviation = _moments(features)
        n, total = len(features), seen + len(features)
        shift = new_mean - self.mean
        mean = self.mean + shift * (n / total)
        variance = (
            self.deviation.square() * seen + new_deviation.square() * n + shift.square() * (seen * n / total)
        ) / total
        self.set_scales(mean, variance.sqrt(), floors=scale_floors)
        # Another stream of numbers at each call, the same ones for the same calls.
        generator = torch.Generator().manual_seed(self.config.seed + total)
        z = torch.cat([self.standardize(old), self.standardize(features)])
        self._train(z, generator, progress=False)
        # Each row seen so far is kept with the same probability: the old references stand for `seen` rows.
        size = min(len(z), self.config.max_references)
        draw = np.random.default_rng(self.config.seed + total)
        new = int(draw.hypergeometric(n, seen, min(size, total))) if len(old) else size
        new = max(new, size - len(old))
        kept = [torch.randperm(len(old), generator=generator)[: size - new]]
        kept.append(len(old) + torch.randperm(n, generator=generator)[:new])
        self._set_references(z[torch.cat(kept).to(z.device)], generator)
        self.rows_seen += n
        return self

    def set_references(self, features: Tensor) -> TCCMModel:
        """Take references, medians and threshold from rows, and leave networks and scales as they are: the end of `fit`, for
        networks that `Trainer` has trained.

        Raises:
            DataError: fewer than two rows, another width than d, or values that are not finite.
        """
        features = features.to(self.device)
        self._check_rows(features, 2)
        self._set_references(self.standardize(features), torch.Generator().manual_seed(self.config.seed))
        self.rows_seen.fill_(len(features))
        return self

    def calibrate(self, features: Tensor) -> TCCMModel:
        """Take the threshold, and what p-values are counted in, from rows that are normal and were not fitted on.

        Raises:
            DataError: no rows, another width than d, or values that are not finite.
        """
        self._check_rows(features, 1)
        self._set_calibration(self.score(features), held_out=True)
        return self

    def p_values(self, scores: Tensor) -> Tensor:
        """Conformal p-values `(n,)` of scores: the share of calibration rows, and the row itself, that score as high.

        Valid for rows exchangeable with those of `calibrate`, in finite samples; at least `1 / (c + 1)`.

        Raises:
            DataError: the model was not calibrated on rows kept out of the fit.
        """
        if not self.config.held_out:
            raise DataError(
                "p-values need rows that the model was not fitted on; call calibrate(rows), or fit with calibration_fraction."
            )
        below = torch.searchsorted(self.calibration, scores.to(self.calibration), side="left")
        return (len(self.calibration) - below + 1.0) / (len(self.calibration) + 1.0)

    def _check_rows(self, features: Tensor, least: int) -> None:
        if features.ndim != 2 or len(features) < least:
            raise DataError(
                f"features has shape {tuple(features.shape)}; expected at least {least} row{'s' * (least > 1)} of "
                f"{self.config.feature_size} features."
            )
        self.standardize(features[:0])
        if not torch.isfinite(features).all():
            self.standardize(features)

    def _train(self, z: Tensor, generator: torch.Generator, progress: bool) -> None:
        config, n = self.config, len(z)
        batch = min(config.batch_size, n)
        steps = config.steps if config.steps is not None else (config.epochs or 0) * math.ceil(n / batch)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=config.learning_rate)
        orders = [torch.empty(config.members, 0, dtype=torch.long)]
        with torch.enable_grad():
            for _ in tqdm(range(steps), desc="fitting", disable=not progress, leave=False):
                if not orders[0].shape[1]:
                    # An epoch: each member meets every row once, in its own order; the last batch may be short.
                    shuffled = torch.rand(config.members, n, generator=generator).argsort(1)
                    orders = [shuffled]
                rows, orders[0] = orders[0][:, :batch], orders[0][:, batch:]
                t = torch.rand(*rows.shape, 1, generator=generator).to(z.device)
                loss = self._loss(z[rows.to(z.device)], t)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def _set_references(self, z: Tensor, generator: torch.Generator) -> None:
        """Keep a sample of the rows, and take residual scales, medians, threshold from it."""
        config = self.config
        sample = z[torch.randperm(len(z), generator=generator)[: config.max_references].to(z.device)]
        self.residual_scale.fill_(1.0)
        if config.mode == "default":
            square = self._residuals(sample).square().mean(1, keepdim=True)
            # A feature the networks reproduce exactly would otherwise decide alone.
            self.residual_scale.copy_((square + 0.01 * square.mean(2, keepdim=True) + 1e-12).sqrt())
        self.references = sample if config.neighbors else sample[:0]
        parts = [torch.cat(part) for part in zip(*(self._parts(chunk) for chunk in sample.split(CHUNK_ROWS)))]
        keep = len(sample) - int(config.trim * len(sample))
        if config.neighbors and keep < len(sample):
            self.references = sample[parts[0].argsort()[:keep]]
            parts = [torch.cat(part) for part in zip(*(self._parts(chunk) for chunk in sample.split(CHUNK_ROWS)))]
        for place, part in enumerate(parts):
            typical = part.median()
            # More than half of the rows repeat others: the mean is the next best measure of what is usual.
            typical = typical if typical > 0 else part.mean()
            self.medians[place] = typical if typical > 0 else 1.0
        config.num_references = len(self.references)
        self._set_calibration(self._combine(*parts), held_out=False)

    def _set_calibration(self, scores: Tensor, held_out: bool) -> None:
        self.calibration = scores.sort().values
        self.config.num_calibration, self.config.held_out = len(scores), held_out
        self.set_contamination(self.config.contamination)

    def set_contamination(self, contamination: float) -> None:
        """Move the threshold to where this share of the calibration rows lies beyond it."""
        self.threshold.copy_(torch.quantile(self.calibration.double(), 1 - contamination).float())


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of every feature, float64."""
    values = features.double()
    return values.mean(0), values.std(0, correction=0)
