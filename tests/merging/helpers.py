"""Checkpoints that the tests of merging share."""

import json

import torch
from safetensors.torch import load_file, save_file

from hf_ext.tiny import tiny_model


def tuned_model(arch, seed=1, **overrides):
    """The seed-0 model after a small step: every weight moved a little."""
    model = tiny_model(arch, **overrides)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def save(model, folder, dtype=torch.float32, **options):
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def expected_deltas(base, tuned):
    """Plain subtraction of the two models' parameters, tied ones once."""
    after = dict(tuned.named_parameters())
    return {name: after[name].detach().float() - weight.detach().float() for name, weight in base.named_parameters()}


def write_file(folder, tensors, config=None, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def store_head_too(folder, head=None):
    """The head written beside the embedding, as other trainers do."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone() if head is None else head
    save_file(weights, folder / "model.safetensors")
    return folder
