"""OjaKV: a key/value cache whose middle tokens live in a low-rank basis that follows the text.

Paper: https://huggingface.co/papers/2509.21623 (arXiv 2509.21623). The first tokens (sinks), the newest tokens and a
few tokens that matter (anchors) stay at full rank. Every other token is stored as its coordinates in one basis for keys
and one for values, per layer and head. The bases are fitted to the prompt after its attention ran at full rank, then
updated every `update_interval` generated tokens. Decoding attends in the coordinates: `q . (c U^T) = (q U) . c`, so
nothing is rebuilt, and the scale stays `1 / sqrt(D)`. The mathematics is in `subspace.py`, one layer's storage in
`ojakv_layer.py`.

Shapes: B batch, H query heads, K key/value heads, N tokens, D head dim, R rank.
Plugs in: `generate(cache_implementation="ojakv", cache_config={...})` after `hf_ext.register()`, or
`generate(past_key_values=OjaKVCache(model, OjaKVConfig(...)))`.

Differs from the paper: bases by eigendecomposition (`update_rule="oja"` is the paper's); coordinates keep the basis they
were written in (`coefficients="rotate"` re-expresses them); the budget counts every byte, bases, anchors and slack
included, where the paper's ratio is the rank's share of the head dimension (`key_ratio`, `value_ratio`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from hf_ext.cache_impls.base import ConfiguredCache
from hf_ext.cache_impls.budget import RankBudget
from hf_ext.cache_impls.calibration import Calibration
from hf_ext.cache_impls.ojakv_layer import OjaKVLayer
from hf_ext.cache_impls.rope import UNROTATED_MODELS, Rope
from hf_ext.config import MethodConfig
from hf_ext.errors import UnsupportedModelError


@dataclass
class OjaKVConfig(MethodConfig):
    """Budget, full-rank tokens and basis updates of an `OjaKVCache` (arXiv 2509.21623).

    At most one of `ratio`, `max_bytes`, `energy` and the pair `key_ratio`/`value_ratio` sets the size.

    Args:
        ratio (`float`, *optional*):
            Bytes of the whole cache at the end of the prompt as a share of the dense cache, in (0, 1]; 0.6 when nothing
            else sets the size. 1 stores everything exactly. Short prompts, where sinks, newest tokens and bases fill
            the budget, keep at least half of the rank a long one would get and exceed it.
        max_bytes (`int`, *optional*):
            The same as a number of bytes, over all layers and the batch. Generated tokens come on top. In a padded batch
            both budgets count padding as tokens, as the dense cache does.
        energy (`float`, *optional*):
            Smallest ranks that keep this share of the energy in every head of a layer, in (0, 1].
        key_ratio (`float`, *optional*):
            Rank of the keys as a share of the head dimension, in (0, 1]: the paper's ratio. Goes with `value_ratio`.
        value_ratio (`float`, *optional*):
            The same for the values.
        allocation (`str`, defaults to `"equal"`):
            How `ratio` or `max_bytes` becomes ranks. `"equal"`: keys and values of all layers alike. `"layer"`: by
            eigenvalues between keys and values of a layer. `"global"`: by eigenvalues over all layers; holds the dense
            prompt until its last layer ran.
        sink_tokens (`int`, defaults to 32):
            First tokens kept at full rank.
        recent_tokens (`int`, defaults to 32):
            Newest tokens kept at full rank.
        anchor_ratio (`float`, *optional*):
            Share of the tokens between them kept at full rank, per key/value head, in [0, 1). By default anchors get
            six to eight tenths of the byte budget, the more the smaller it is, and 0.05 of the tokens where ranks are
            set instead.
        anchor_score (`str`, defaults to `"expected_error"`):
            What makes an anchor. `"expected_error"`: the attention a token may expect, from the last queries, from
            queries all over the prompt, and a small equal share for questions still to come, times the residuals of
            its key and value relative to their means. `"attention"` from the last queries; the norm of its key's
            `"residual"`; their product `"attention_residual"`; the root mean square error of its `"logit"`.
        query_window (`int`, defaults to 32):
            Last queries of the prompt the scores look at; `"expected_error"` adds twice as many spread over it.
        update_rule (`str`, defaults to `"exact"`):
            `"exact"`, `"hebbian"`, `"oja"`, or `"none"` for a basis that never moves.
        normalize (`str`, *optional*, defaults to `"lambda"`):
            `"lambda"` divides the covariance by a bound of its largest eigenvalue before a step of `"hebbian"` or
            `"oja"`; `None` is the literal rule, which destroys the basis on real keys.
        prompt_learning_rate (`float`, defaults to 0.1):
            Rate of those two rules on the prompt (the paper's eta). Zero keeps the basis.
        decode_learning_rate (`float`, defaults to 0.05):
            The same while decoding.
        pool_window (`int`, defaults to 4):
            Tokens averaged before the prompt step of those two rules.
        update_interval (`int`, defaults to 64):
            Generated tokens between updates (the paper's T).
        forgetting (`float`, defaults to 0.9):
            Weight of the past in the covariance of `"exact"` (rho); at most the past's share of the tokens.
        coefficients (`str`, defaults to `"versioned"`):
            `"versioned"` leaves coordinates as written; `"rotate"` re-expresses all in every new basis.
        drift_tolerance (`float`, defaults to 0.02):
            A basis that moved less than this is not replaced.
        max_versions (`int`, defaults to 4):
            Bases kept per stream; beyond it the youngest is rotated. Versions are opened for a whole batch, so a row may
            reach the rotation earlier than it would alone.
        prefill (`str`, defaults to `"full"`):
            `"full"`: the prompt attends to full-rank keys and values. `"compressed"`: to the compressed ones.
        key_space (`str`, defaults to `"post"`):
            `"pre"` compresses keys before rotary embedding: smaller error, but every step rebuilds the keys.
        calibration (`str`, *optional*):
            A file of `Calibration.save`, the starting basis of every rule but `"exact"`, which takes the prompt's own.
            Without it they too start from the prompt's.
    """

    ratio: float | None = None
    max_bytes: int | None = None
    energy: float | None = None
    key_ratio: float | None = None
    value_ratio: float | None = None
    allocation: Literal["equal", "layer", "global"] = "equal"
    sink_tokens: int = 32
    recent_tokens: int = 32
    anchor_ratio: float | None = None
    anchor_score: Literal["expected_error", "attention", "attention_residual", "residual", "logit"] = "expected_error"
    query_window: int = 32
    update_rule: Literal["exact", "hebbian", "oja", "none"] = "exact"
    normalize: Literal["lambda"] | None = "lambda"
    prompt_learning_rate: float = 0.1
    decode_learning_rate: float = 0.05
    pool_window: int = 4
    update_interval: int = 64
    forgetting: float = 0.9
    coefficients: Literal["versioned", "rotate"] = "versioned"
    drift_tolerance: float = 0.02
    max_versions: int = 4
    prefill: Literal["full", "compressed"] = "full"
    key_space: Literal["post", "pre"] = "post"
    calibration: str | None = None

    def __post_init__(self) -> None:
        if all(value is None for value in (self.ratio, self.max_bytes, self.energy, self.key_ratio, self.value_ratio)):
            self.ratio = 0.6
        super().__post_init__()

    def validate(self) -> None:
        for field in ("ratio", "energy", "key_ratio", "value_ratio"):
            value = getattr(self, field)
            self.check(value is None or 0 < value <= 1, field, "must lie in (0, 1]")
        self.check(self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be positive")
        self.check((self.key_ratio is None) == (self.value_ratio is None), "key_ratio", "and value_ratio go together")
        budgets = [f for f in ("ratio", "max_bytes", "energy", "key_ratio") if getattr(self, f) is not None]
        self.check(len(budgets) == 1, budgets[0], f"cannot be combined with {', '.join(budgets[1:])}; set one of them")
        by_bytes = budgets[0] in ("ratio", "max_bytes")
        self.check(by_bytes or self.allocation == "equal", "allocation", "needs ratio or max_bytes as the budget")
        for field in ("query_window", "pool_window", "update_interval", "max_versions"):
            self.check(getattr(self, field) >= 1, field, "must be at least 1")
        self.check(self.anchor_ratio is None or 0 <= self.anchor_ratio < 1, "anchor_ratio", "must lie in [0, 1)")
        rates = ("prompt_learning_rate", "decode_learning_rate", "drift_tolerance")
        for field in ("sink_tokens", "recent_tokens", *rates):
            self.check(getattr(self, field) >= 0, field, "must not be negative")
        self.check(0 <= self.forgetting < 1, "forgetting", "must lie in [0, 1)")
        self.check(
            not (self.prefill == "compressed" and self.allocation == "global"),
            "prefill",
            "needs the ranks of a layer before the next one runs; use allocation 'equal' or 'layer'",
        )


class OjaKVCache(ConfiguredCache):
    """Cache with a low-rank tier (arXiv 2509.21623).

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`):
            See `KVCache`. Where attention does not run inside the cache, it sees neither queries nor padding: anchors
            are chosen by residual alone and padding counts as tokens, so give it the model or register.
        config (`OjaKVConfig` or `dict`, *optional*): settings; the defaults otherwise.

    Raises:
        `UnsupportedModelError`: an encoder-decoder or ALiBi model, a model with no full-attention layer, or one whose
            rotary embedding `key_space="pre"` does not know.
        `ConfigError`: a calibration that does not fit the model.

    Example:
        ```python
        import hf_ext
        cache = hf_ext.OjaKVCache(model, hf_ext.OjaKVConfig(ratio=0.4))
        model.generate(**inputs, past_key_values=cache)
        print(cache.nbytes(), cache.tier_bytes())
        ```
    """

    config_class = OjaKVConfig
    config: OjaKVConfig

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, config: OjaKVConfig | dict[str, Any] | None = None):
        self._rope: Rope | None = None
        self._calibration: Calibration | None = None
        super().__init__(model, config)
        self._calibration = None  # the layers hold its bases

    def prepare(self, decoder: PreTrainedConfig, layers: int) -> None:
        self.config.validate()
        if not layers:
            raise UnsupportedModelError(
                f"ojakv compresses full-attention layers and {decoder.model_type} has none (sliding windows are bounded "
                "already); generate without it."
            )
        self.budget = RankBudget(self.config, layers)
        if self.config.key_space == "pre" and decoder.model_type not in UNROTATED_MODELS:
            self._rope = Rope(decoder)
        if self.config.calibration is not None:
            self._calibration = Calibration.load(self.config.calibration)
            self._calibration.check_fits(decoder, layers)

    def make_layer(self, model_config: PreTrainedConfig, layer_idx: int, order: int) -> OjaKVLayer:
        start = None if self._calibration is None else self._calibration.bases[order]
        return OjaKVLayer(model_config, layer_idx, self.config, self.budget, self._rope, start)

    def expect_prompt(self, length: int) -> None:
        """Says that the prompt, of `length` tokens, comes in chunks; ranks are then made for the whole of it."""
        self.budget.expected = length
