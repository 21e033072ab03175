"""`OSDConfig`: how a delta is compressed, and, as a PEFT config, how the adapter made of it is opened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig

from hf_ext.config import MethodConfig


PEFT_TYPE = "OSD"
# What the published form fixes.
PAPER = {"codec": "sparse", "values": "fp32", "scope": "per_layer", "refit_steps": 0, "other_tensors": "drop"}
VALUES = Literal["auto", "fp32", "bf16", "int8", "int4", "int3", "int2", "int1"]


@dataclass
class OSDConfig(MethodConfig, PeftConfig):
    """Budget and codec of a compressed fine-tune (OSD, arXiv 2511.02681).

    Args:
        mode (`str`, defaults to `"default"`):
            `"paper"` is the published form: float32 values, flat indices, one budget for each matrix, no refit, matrices
            alone. It needs `rank` and sets `codec="sparse"`, `values="fp32"`, `scope="per_layer"`, `refit_steps=0` and
            `other_tensors="drop"`. Where one of these has another value it is an error, except the default: a default
            that was typed cannot be told from one that was left alone, and is replaced.
        budget (`int`, *optional*):
            Bytes of everything `save_pretrained` writes: weights, headers, configs. Without it and `rank`, a 2,000th of
            the fine-tuned checkpoint, and 20,000 at least.
        rank (`int`, *optional*):
            The budget as a rank: the bytes of dense float32 factors of that rank in every matrix.
        codec (`str`, defaults to `"auto"`):
            `"factors"`: low-rank factors with a few bits a value; `"sparse"`: sparse factors of a higher rank;
            `"signs"`: signs at seeded places. `"auto"` takes factors for the kinds of layers whose deltas are of low
            rank and signs for all others; with calibration data another
            form, if it leaves less than half of the divergence.
        values (`str`, defaults to `"auto"`):
            Type of the values of factors: `"fp32"`, `"bf16"`, `"int8"` to `"int1"`. `"auto"` gives each column 1 to 4
            bits by what they save, and sparse factors 4.
        relaxation (`int`, *optional*):
            Ranks beyond the budget's before sparsification (the paper's c). None tries 0, r/2, r, 2r and 4r for each
            matrix.
        importance (`str`, defaults to `"auto"`):
            Which entries of sparse factors survive: `"magnitude"`, `"energy"`, `"taylor1"`, `"taylor"` or `"fisher"`, the
            last three from gradients on calibration data. `"auto"` is `"taylor"` with data and `"magnitude"` without.
        selection (`str`, defaults to `"joint"`):
            `"joint"` ranks the entries of both factors together, `"separate"` gives each its share.
        scope (`str`, defaults to `"global"`):
            `"global"`: one budget over all matrices; `"per_layer"`: the same share of its size for each.
        refit_steps (`int`, defaults to 3):
            Rounds of least squares on fixed masks or rounded values; 0 for none.
        svd (`str`, defaults to `"randomized"`):
            `"exact"` takes the Gram matrix instead.
        power_iterations (`int`, defaults to 4):
            Of the randomised decomposition.
        noise_limit (`float`, defaults to 0.5):
            Signs are made smaller where their noise would exceed this share of the base weight, both as root mean
            squares.
        strength (`float`, defaults to 0.9):
            How much of its effect a delta of few signs keeps; the more of the delta is coded, the closer it comes to all.
            1 keeps it whole from the start; a little less makes less noise, and a fine-tune that overshoots loses nothing.
        other_tensors (`str`, defaults to `"auto"`):
            Norms, biases and embeddings: `"code"`, `"drop"`, or `"auto"`: beside signs by measured importance with data,
            and without data embeddings always, norms and biases where they take little of the budget; beside factors by
            energy a byte.
        calibration_samples (`int`, defaults to 128):
            Examples of the calibration data that are used, one at a time for gradients.
        seed (`int`, defaults to 0):
            Of seeded places and the randomised decomposition.
        target_modules (`list[str]`, *optional*):
            Modules whose weights are compressed, by the end of their names; None for all. In a saved adapter: the modules
            whose matrices it changes.
        extra_modules (`list[str]`, *optional*):
            The embeddings, output layers and norms it changes besides; written by `compress_delta`. They are named apart
            because PEFT saves the whole base weight of an embedding it finds in `target_modules`.
        base_fingerprint (`dict`, *optional*):
            Digests of the base weights the delta belongs to; written by `compress_delta`, checked when opened.
        tied (`dict`, *optional*):
            Modules that share the delta of another one, as a tied output layer does; written by `compress_delta`.
    """

    mode: Literal["default", "paper"] = "default"
    budget: int | None = None
    rank: int | None = None
    codec: Literal["auto", "factors", "sparse", "signs"] = "auto"
    values: VALUES = "auto"
    relaxation: int | None = None
    importance: Literal["auto", "magnitude", "energy", "taylor1", "taylor", "fisher"] = "auto"
    selection: Literal["joint", "separate"] = "joint"
    scope: Literal["global", "per_layer"] = "global"
    refit_steps: int = 3
    svd: Literal["randomized", "exact"] = "randomized"
    power_iterations: int = 4
    noise_limit: float = 0.5
    strength: float = 0.9
    other_tensors: Literal["auto", "code", "drop"] = "auto"
    calibration_samples: int = 128
    seed: int = 0
    target_modules: list[str] | None = None
    extra_modules: list[str] | None = None
    base_fingerprint: dict[str, str] | None = None
    tied: dict[str, str] | None = field(default=None)

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = _peft_type()
        MethodConfig.__post_init__(self)

    def validate(self) -> None:
        for name in ("budget", "rank", "calibration_samples"):
            self.check(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("relaxation", "refit_steps", "power_iterations", "noise_limit"):
            self.check(getattr(self, name) is None or getattr(self, name) >= 0, name, "must not be negative")
        self.check(self.strength > 0, "strength", "must be more than 0")
        self.check(0 <= self.seed < 2**32, "seed", "must be from 0 to 2**32 - 1")
        self.check(self.budget is None or self.rank is None, "rank", "must not be given beside a budget")
        if self.mode == "paper":
            self.check(self.rank is not None, "rank", 'must be given with mode="paper", whose budget it is')
            for item in fields(self):
                if item.name in PAPER:
                    fixed = PAPER[item.name]
                    allowed = getattr(self, item.name) in (item.default, fixed)
                    self.check(allowed, item.name, f'must be {fixed!r} with mode="paper"; leave it out')
                    setattr(self, item.name, fixed)

    @property
    def needs_gradients(self) -> bool:
        """Whether `importance` can only be computed with calibration data."""
        return self.importance in ("taylor1", "taylor", "fisher")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        found = asdict(self)
        found["peft_type"] = PEFT_TYPE
        found["task_type"] = None if self.task_type is None else str(getattr(self.task_type, "value", self.task_type))
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any], strict: bool = False) -> OSDConfig:
        """Build the config from a mapping; see `MethodConfig.from_dict`."""
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key != "runtime_config"}
        return super().from_dict(data, strict=strict)

    def _check_types(self) -> None:
        own = set(OSDConfig.__annotations__)
        for name in own:
            value = getattr(self, name)
            if isinstance(value, set | tuple):
                setattr(self, name, sorted(value))  # PEFT turns lists of modules into sets
        super()._check_types()

    save_pretrained = PeftConfig.save_pretrained  # type: ignore[assignment]
    from_pretrained = PeftConfig.from_pretrained  # type: ignore[assignment]


def own_settings(config: OSDConfig) -> dict[str, Any]:
    """The settings of the compression alone, in the order of the class."""
    names = [item.name for item in fields(config) if item.name in OSDConfig.__annotations__]
    return {
        name: getattr(config, name)
        for name in names
        if name not in ("base_fingerprint", "tied", "target_modules", "extra_modules")
    }


def _peft_type() -> Any:
    """The member of `PeftType` once `hf_ext.register()` has made it, else its name."""
    from peft.utils import PeftType

    return PeftType._value2member_map_.get(PEFT_TYPE, PEFT_TYPE)
