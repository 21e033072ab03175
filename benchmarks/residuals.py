"""How well a basis holds the prompt it was made for: every update rule against the exact PCA of the same prompt.

    python benchmarks/residuals.py [--model NAME] [--documents 6] [--length 2048] [--share 0.6]
                                   [--out benchmarks/results/residuals.json]

The real cache reads BBC news with ranks of `--share` of the head dimension; the number is the part of the energy of all
prompt keys (or values) outside the basis it stored, over the same for the eigenvectors of the prompt's own covariance at
the same rank. Rules but `exact` start from a basis of another domain, Python source code. Float32, mean over documents.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from hf_ext import OjaKVCache, OjaKVConfig
from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.calibration import Calibration
from hf_ext.models import load_bbc, load_model
from hf_ext.table import Row, write_rows


RULES: dict[str, dict] = {
    "ojakv": {},
    "static pca": {"update_rule": "none"},
    "oja, normalised": {"update_rule": "oja"},
    "oja, literal": {"update_rule": "oja", "normalize": None},
    "hebbian": {"update_rule": "hebbian"},
}


def residual(tokens: Tensor, basis: Tensor) -> float:
    """Share of the energy of `(B, K, N, D)` outside the span of `(B, K, D, R)`."""
    tokens = tokens.float()
    return 1 - float((tokens @ basis.float()).square().sum() / tokens.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--out", default="benchmarks/results/residuals.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, tokenizer = load_model(arguments.model)
    text = "\n\n".join(document["text"] for document in load_bbc())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.documents * arguments.length]
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, statistics))
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        calibration = str(Path(folder) / "calibration.safetensors")
        code = tokenizer(source, return_tensors="pt").input_ids[:, :4096]
        Calibration.from_model(model, code.chunk(2, dim=1)).save(calibration)
        for part in tqdm(ids.split(arguments.length, dim=1), desc="residuals"):
            dense = DynamicCache(config=model.config)
            model(part, past_key_values=dense, logits_to_keep=1)
            for name, settings in RULES.items():
                start = {"calibration": calibration} if settings else {}
                config = OjaKVConfig(key_ratio=arguments.share, value_ratio=arguments.share, **settings, **start)
                cache = OjaKVCache(model, config)
                model(part, past_key_values=cache, logits_to_keep=1)
                for stream in ("key", "value"):
                    parts = []
                    for layer, ours in zip(dense.layers, cache.kv_layers):
                        tokens = layer.keys if stream == "key" else layer.values
                        basis = getattr(ours.segments[0], f"{stream}_basis")
                        best, _ = subspace.top_basis(subspace.covariance(tokens), basis.shape[-1])
                        parts.append((residual(tokens, basis), residual(tokens, best)))
                    ratio = sum(mine for mine, _ in parts) / sum(best for _, best in parts)
                    found.setdefault((name, stream), []).append(ratio)
    name_of_model = "SmolLM2-135M" if arguments.model is None else arguments.model
    rows = []
    for (name, stream), values in found.items():
        setting = f"{name_of_model}, {arguments.length} tokens, {stream}s, rank {arguments.share:g} of the dimension"
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        metric = "residual over exact PCA"
        rows.append(
            Row("ojakv", name, setting, metric, round(statistics.mean(values), 4), "x", len(values), round(spread, 4))
        )
        print(f"{setting:66s} {name:16s} {rows[-1].value:9.4f} +- {rows[-1].spread:.4f}")
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
