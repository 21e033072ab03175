"""Generated ids against DynamicCache on every tiny architecture, and the slack of the stored pages.

    python benchmarks/exactness.py [--seeds 3] [--out benchmarks/results/exactness.json]

`packed` stores every token as it came, and so do `ojakv` at ratio 1 and, while the text is within their token budget,
`sentencekv` and `hybridkv`; every id they generate must equal DynamicCache's,
in float32: greedy with left padding, beams, prompt lookup, assisted decoding, two turns on one cache. Random models of
`hf_ext.tiny`, a fresh one per seed. Slack is the part of `nbytes()` that holds no token, the worst over 64 steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from hf_ext import HybridKVCache, OjaKVCache, OjaKVConfig, PackedCache, SentenceKVCache
from hf_ext.table import Row, write_rows
from hf_ext.tiny import ARCHITECTURES, tiny_model


# ALiBi; no full-attention layer.
NOT_SERVED = dict.fromkeys(("ojakv", "sentencekv", "hybridkv"), ("bloom", "mistral_sliding"))
CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "packed": PackedCache,
    "ojakv": lambda model: OjaKVCache(model, OjaKVConfig(ratio=1.0)),
    "sentencekv": SentenceKVCache,
    "hybridkv": HybridKVCache,
}


def generate(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)


def modes(model: PreTrainedModel, arch: str, seed: int) -> dict[str, Callable[[Any], Tensor]]:
    """Mode -> function from a cache to generated ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (2, 90), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :23], mask[1, :23] = 0, 0
    one = ids[:1].clone()
    one[:, 45:] = one[:, :45]

    def two_turns(cache: Any) -> Tensor:
        first = generate(model, cache, one)
        return generate(model, cache, torch.cat([first, ids[:1, :40]], dim=1))

    return {
        "greedy, left padding": lambda cache: generate(model, cache, ids, mask),
        "beams": lambda cache: generate(model, cache, ids, mask, num_beams=3, num_return_sequences=2),
        "prompt lookup": lambda cache: generate(model, cache, one, prompt_lookup_num_tokens=4),
        "assisted": lambda cache: generate(model, cache, one, assistant_model=tiny_model(arch, seed=seed + 100)),
        "two turns": two_turns,
    }


def slack(make: Callable[[PreTrainedModel], Any], length: int) -> float:
    model = tiny_model("llama")
    cache, worst = make(model), 0.0
    with torch.no_grad():
        model(torch.randint(3, 128, (1, length)), past_key_values=cache)
        for _ in range(64):
            model(torch.randint(3, 128, (1, 1)), past_key_values=cache)
            worst = max(worst, cache.tier_bytes().get("slack", 0) / cache.nbytes())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results/exactness.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    equal: dict[tuple[str, str], list[float]] = {}
    for arch in tqdm(sorted(ARCHITECTURES), desc="architectures"):
        for seed in range(arguments.seeds):
            model = tiny_model(arch, seed=seed)
            for mode, run in modes(model, arch, seed).items():
                expected = run(DynamicCache(config=model.config))
                for name, make in CACHES.items():
                    if arch not in NOT_SERVED.get(name, ()):
                        equal.setdefault((name, mode), []).append(float(torch.equal(run(make(model)), expected)))
    rows = []
    for (name, mode), values in equal.items():
        system = {"packed": "packed", "ojakv": "ojakv at ratio 1"}.get(name, f"{name} within its budget")
        value = round(100 * sum(values) / len(values), 2)
        rows.append(
            Row(name, system, f"tiny models, {mode}", "runs whose ids equal DynamicCache's", value, "%", len(values))
        )
    compressed = {"packed": PackedCache, "ojakv 0.4": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.4))}
    for length in (2048, 4096, 8192):
        for name, make in compressed.items():
            value = round(100 * slack(make, length), 2)
            rows.append(
                Row(name.split()[0], name, f"tiny llama, {length} tokens", "page slack, worst of 64 steps", value, "%")
            )
    for row in rows:
        print(f"{row.setting:36s} {row.system:18s} {row.metric:38s} {row.value:7.2f} {row.unit} (n={row.n})")
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
