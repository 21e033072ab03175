"""Taking the rotary embedding off keys and putting it back, for caches that compress keys as they were before it.

Shapes: B batch, K key/value heads, N tokens, D head dim (the first `2 * len(inv_freq)` of it rotate).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_ext.errors import UnsupportedModelError


# Models whose every full-attention layer rotates the two halves of the head dimension, by one set of frequencies.
ROTARY_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "granite")
# Models whose keys carry no position: nothing to take off.
UNROTATED_MODELS = ("gpt2", "opt")
STATIC_ROPE_TYPES = ("default", "linear", "llama3")


class Rope:
    """The rotary embedding of a model, by its config.

    Args:
        config (`PreTrainedConfig`): of the text decoder.

    Raises:
        `UnsupportedModelError`: the model rotates in a way this class does not know.
    """

    def __init__(self, config: PreTrainedConfig):
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if config.model_type not in ROTARY_MODELS or kind not in STATIC_ROPE_TYPES:
            raise UnsupportedModelError(
                f"key_space='pre' does not know the rotary embedding of {config.model_type} (rope type {kind}); "
                f"use key_space='post'. Known: {', '.join(ROTARY_MODELS + UNROTATED_MODELS)}."
            )
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        # Plain numbers: a tensor would be one more thing every cache keeps alive.
        self.inv_freq: list[float] = LlamaRotaryEmbedding(config).inv_freq.double().tolist()  # type: ignore[arg-type]

    def rotate(self, keys: Tensor, positions: Tensor, sign: int = 1) -> Tensor:
        """Rotates `keys` `(B, K, N, D)` by `positions`, `(B, N)` or `(B, K, N)`; `sign=-1` takes the rotation off."""
        width = 2 * len(self.inv_freq)
        positions = positions if positions.dim() == 3 else positions[:, None]
        angles = positions[..., None].float() * torch.tensor(self.inv_freq, device=keys.device) * sign
        cos, sin = angles.cos(), angles.sin()
        first, second = keys[..., :width].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(keys.dtype)
        return torch.cat([turned, keys[..., width:]], dim=-1) if width < keys.shape[-1] else turned
