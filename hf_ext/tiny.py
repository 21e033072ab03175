"""Tiny random models built in memory, one per architecture that the caches have to serve.

They exist so that tests and benches need no download: two to six layers, 128 tokens of vocabulary, four query heads on
two key/value heads where the architecture has them. No end-of-sequence token is set, so a generation always runs to the
length that was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_ext.errors import ConfigError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


VOCAB_SIZE = 128

_IDS = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # A random tied model repeats its last token for ever, which hides a broken cache.
    "tie_word_embeddings": False,
}
_GQA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    **_IDS,
}
# No grouped heads in these.
_MHA = {key: value for key, value in _GQA.items() if key != "num_key_value_heads"}

# name -> (model_type, config arguments)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _GQA),
    "llama_mqa": ("llama", {**_GQA, "num_key_value_heads": 1}),
    "llama_head80": ("llama", {**_GQA, "head_dim": 80}),
    "llama_head96": ("llama", {**_GQA, "head_dim": 96}),
    "llama_tied": ("llama", {**_GQA, "tie_word_embeddings": True}),
    "llama_untied": ("llama", _GQA),
    "mistral": ("mistral", {**_GQA, "sliding_window": None}),
    "mistral_sliding": ("mistral", {**_GQA, "sliding_window": 12}),
    "qwen2": ("qwen2", _GQA),
    "qwen3": ("qwen3", {**_GQA, "head_dim": 16}),
    # Layers alternate sliding, full, sliding, full.
    "gemma2": (
        "gemma2",
        {**_GQA, "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12},
    ),
    # The default pattern puts one full layer after five sliding ones.
    "gemma3_text": (
        "gemma3_text",
        {**_GQA, "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12},
    ),
    "gpt_neox": ("gpt_neox", _MHA),
    "phi": ("phi", {**_GQA, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {**_GQA, "original_max_position_embeddings": 4096}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 4096, **_IDS}),
    "opt": (
        "opt",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 4096,
            **_IDS,
        },
    ),
    # Every fourth layer has no rotary embedding.
    "smollm3": ("smollm3", {**_GQA, "num_hidden_layers": 4}),
    "cohere": ("cohere", {**_GQA, "logit_scale": 1.0}),
    # Does not go through the attention interface.
    "falcon": (
        "falcon",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "max_position_embeddings": 4096,
            "alibi": False,
            **_IDS,
        },
    ),
    # ALiBi instead of rotary positions.
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, **_IDS}),
}


def tiny_config(arch: str, **overrides):
    """The `PretrainedConfig` of a tiny model; `overrides` replace single arguments."""
    from transformers import AutoConfig

    if arch not in ARCHITECTURES:
        raise ConfigError(f"arch={arch!r} is not a tiny model; use one of {', '.join(sorted(ARCHITECTURES))}.")
    model_type, arguments = ARCHITECTURES[arch]
    return AutoConfig.for_model(model_type, **{**arguments, **overrides})


def tiny_model(arch: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random causal language model on the CPU in float32 and eval mode; the same seed gives the same weights.

    Every weight matrix is drawn with standard deviation `1.6 / sqrt(fan_in)`, so attention is far from uniform (a cache
    that loses or misplaces tokens changes the output) and the two best tokens are seldom close (rounding does not).
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(arch, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() < 2:
                # Norm gains stay; biases get small values so that a dropped bias is seen.
                if name.endswith("bias"):
                    weight.data.normal_(0.0, 0.1)
                continue
            # GPT-2 keeps its projections transposed (in x out).
            fan_in = weight.shape[0] if type(model).__name__.startswith("GPT2") else weight.shape[-1]
            std = 1.6 * fan_in**-0.5
            if weight is embedding:
                std = 0.2 if head is embedding else 1.0
            weight.data.normal_(0.0, std)
        if head is not embedding:
            head.data.normal_(0.0, 3.0 * head.shape[-1] ** -0.5)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, 0, 1
    return model
