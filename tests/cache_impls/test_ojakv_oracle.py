"""The layer against `tests/reference/ojakv.py`, head by head and token by token.

Float32 against float64: outputs are of size one, so the tolerance of 5e-5 leaves room for some hundred roundings.
"""

import pytest
import torch

from hf_ext.cache_impls.calibration import Calibration
from hf_ext.cache_impls.rope import Rope
from tests.cache_impls.helpers import SMALL, Driver, text_tensors
from tests.reference.ojakv import ReferenceCache


PROMPT, DIM = 100, 16
RATIOS = {"key_ratio": 0.375, "value_ratio": 0.5}
RANKS = (6, 8)


def oracle_outputs(text, blocks, pads, groups, start=None, **settings):
    """Outputs `(B, Q, H, D)` per block after the prompt, from one reference cache per row and head."""
    query, key, value = text
    batch, kv_heads = key.shape[:2]
    outputs = [torch.zeros(batch, size, kv_heads * groups, DIM) for size in blocks]
    for row in range(batch):
        for head in range(kv_heads):
            own_start = None if start is None else [basis[head] for basis in start]
            reference = ReferenceCache(RANKS, start=own_start, **settings)
            q, k, v = query[row, head * groups : (head + 1) * groups], key[row, head], value[row, head]
            reference.prompt(k[pads[row] : PROMPT], v[pads[row] : PROMPT], q[:, pads[row] : PROMPT])
            place = PROMPT
            for output, size in zip(outputs, blocks):
                part = slice(place, place + size)
                answer = reference.block(k[part], v[part], q[:, part])
                output[row, :, head * groups : (head + 1) * groups] = answer.transpose(0, 1).float()
                place += size
    return outputs


def compare(settings=None, oracle=None, *, kv_heads=2, groups=2, pads=None, blocks=(1,) * 23, start=None):
    settings, oracle = settings or {}, oracle or {}
    defaults = {"drift_tolerance": 0.0, "anchor_ratio": 0.0, "max_versions": 100, **RATIOS}
    driver = Driver(kv_heads=kv_heads, groups=groups, pads=pads, **{**defaults, **settings})
    driver.layer.start = start
    text = text_tensors(2, kv_heads, groups, PROMPT + sum(blocks), DIM)
    outputs = driver.feed_text(text, PROMPT, blocks)[1:]
    assert driver.layer.segments, "the prompt was not compressed"
    options = {"sinks": SMALL["sink_tokens"], "recent": SMALL["recent_tokens"], "interval": SMALL["update_interval"]}
    expected = oracle_outputs(text, blocks, pads or (0, 0), groups, **options, start=start, **oracle)
    for step, (found, wanted) in enumerate(zip(outputs, expected)):
        torch.testing.assert_close(found, wanted, atol=5e-5, rtol=0, msg=lambda m, step=step: f"block {step}: {m}")
    return driver


RULES = {
    "exact": ({}, {}),
    "hebbian": ({"update_rule": "hebbian"}, {"rule": "hebbian"}),
    "hebbian_fast": (
        {"update_rule": "hebbian", "prompt_learning_rate": 2.0, "decode_learning_rate": 1.0, "pool_window": 3},
        {"rule": "hebbian", "prompt_rate": 2.0, "decode_rate": 1.0, "pool": 3},
    ),
    "oja": (
        {"update_rule": "oja", "decode_learning_rate": 0.5},
        {"rule": "oja", "decode_rate": 0.5},
    ),
    "oja_literal": ({"update_rule": "oja", "normalize": None}, {"rule": "oja", "normalize": False}),
    "none": ({"update_rule": "none"}, {"rule": "none"}),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("coefficients", ["versioned", "rotate"])
def test_every_rule_and_both_kinds_of_coefficients(rule, coefficients):
    settings, oracle = RULES[rule]
    driver = compare(
        {**settings, "coefficients": coefficients},
        {**oracle, "coefficients": coefficients},
    )
    # 23 tokens in intervals of 5: four updates.
    versions = 5 if coefficients == "versioned" and rule != "none" else 1
    assert len(driver.layer.segments) == versions


@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 4), (4, 1), (1, 1)])
def test_multi_query_and_ungrouped_heads(kv_heads, groups):
    compare(kv_heads=kv_heads, groups=groups)


def test_beyond_max_versions_the_youngest_is_rotated():
    driver = compare({"max_versions": 3}, {"max_versions": 3})
    assert len(driver.layer.segments) == 3


@pytest.mark.parametrize("score", ["residual", "logit"])
def test_anchors_of_the_prompt_and_of_the_window(score):
    driver = compare(
        {"anchor_ratio": 0.2, "anchor_score": score, "query_window": 10},
        {"anchor_ratio": 0.2, "score": score, "window": 10},
    )
    assert driver.layer.anchors == int(0.2 * (PROMPT - 10)) + 4, "18 of the prompt and one of each five later tokens"


def test_blocks_of_several_tokens():
    compare(blocks=(3, 7, 1, 12, 6))


@pytest.mark.parametrize("rule", ["hebbian", "none"])
@pytest.mark.parametrize("key_space", ["post", "pre"])
def test_a_padded_row_is_the_unpadded_text(rule, key_space):
    frequencies = torch.as_tensor(Rope(Driver().config).inv_freq) if key_space == "pre" else None
    compare(
        {"update_rule": rule, "key_space": key_space},
        {"rule": rule, "frequencies": frequencies},
        pads=(0, 13),
        blocks=(1, 1, 4, *(1,) * 8),
    )


def test_windows_of_padding_do_not_dilute_the_literal_rule():
    settings = {"update_rule": "oja", "normalize": None, "prompt_learning_rate": 0.5, "decode_learning_rate": 0.0}
    compare(settings, {"rule": "oja", "normalize": False, "prompt_rate": 0.5, "decode_rate": 0.0}, pads=(0, 40))


def test_a_padded_row_weighs_its_own_past_under_the_exact_rule():
    compare(pads=(0, 80), blocks=(1,) * 12)


@pytest.mark.parametrize("rule", ["exact", "hebbian"])
def test_keys_before_rotary_embedding(rule):
    frequencies = torch.as_tensor(Rope(Driver().config).inv_freq)
    compare({"key_space": "pre", "update_rule": rule}, {"frequencies": frequencies, "rule": rule}, blocks=(1,) * 12)


@pytest.mark.parametrize("rule", ["none", "hebbian", "oja", "exact"])
def test_calibrated_starting_bases(rule):
    generator = torch.Generator().manual_seed(3)
    bases = [torch.linalg.qr(torch.randn(2, DIM, DIM, generator=generator)).Q for _ in range(2)]
    Calibration([bases], [[torch.ones(2, DIM)] * 2]).check_fits(Driver().config, 1)
    compare({"update_rule": rule}, {"rule": rule}, start=bases, blocks=(1,) * 8)


def test_forgetting_weighs_the_past():
    compare({"forgetting": 0.3}, {"forgetting": 0.3})
    with pytest.raises(AssertionError, match="block"):
        compare({"forgetting": 0.3}, {"forgetting": 0.6})


def test_drift_tolerance_keeps_a_basis_that_moved_less():
    driver = compare({"drift_tolerance": 0.005}, {"tolerance": 0.005})
    assert 1 < len(driver.layer.segments) < 5
