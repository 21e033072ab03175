"""What one OjaKV layer stores and how it attends, driven by tensors without a model."""

import copy

import pytest
import torch

import hf_ext
from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.attention import dense_attention
from hf_ext.cache_impls.rope import Rope
from tests.cache_impls.helpers import SMALL, Driver, text_tensors


PROMPT, DIM = 100, 16
RATIOS = {"key_ratio": 0.375, "value_ratio": 0.5, "drift_tolerance": 0.0}
SINKS, RECENT, INTERVAL = SMALL["sink_tokens"], SMALL["recent_tokens"], SMALL["update_interval"]


def fed(steps=0, text=None, dtype=torch.float32, batch=2, pads=None, **settings):
    """A driver after the prompt and `steps` tokens, and the text it saw."""
    driver = Driver(batch=batch, pads=pads, **{**RATIOS, **settings})
    text = text_tensors(batch, 2, 2, PROMPT + 60, DIM, dtype=dtype) if text is None else text
    driver.feed_text([t[:, :, : PROMPT + steps] for t in text], PROMPT)
    assert driver.layer.segments, "the prompt was not compressed"
    return driver, text


def whole_places(layer, row, head):
    """Places in the text of the full-rank tokens of one head, in the order of storage, from the documented layout."""
    start = 0 if layer.sink_start is None else int(layer.sink_start[row])
    sinks = range(start, start + layer.sinks)
    return [*sinks, *layer.anchor_positions[row, head].tolist(), *range(layer.seen - layer.recent, layer.seen)]


def low_places(layer, row, head):
    return [place for place in range(layer.seen) if place not in set(whole_places(layer, row, head))]


def projected(tokens, basis):
    return tokens.float() @ basis.float() @ basis.float().mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("pads", [None, (0, 9), (3, 97)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_in_the_coordinates_equals_attention_to_rebuilt_tokens(dtype, length, pads, softcap):
    steps = 0 if pads and pads[1] > 90 else 17
    driver, text = fed(steps, dtype=dtype, pads=pads, anchor_ratio=0.1, anchor_score="residual")
    layer, start = driver.layer, driver.layer.seen
    assert len(layer.segments) == (1 if not steps else 4)
    query, key, value = (t[:, :, start : start + length] for t in text)
    layer.append(key, value)
    layer.seen += length
    found = layer.attend(query, driver.mask(start, layer.seen), 0.25, softcap)
    options = {"scaling": 0.25, "softcap": softcap}
    expected, _ = dense_attention(
        driver.module, query, *layer.materialize(), driver.mask(start, layer.seen), **options
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("length", [64, 65])
def test_long_blocks_attend_to_rebuilt_tokens_with_the_same_result(length):
    text = text_tensors(2, 2, 2, PROMPT + 90, DIM)
    driver, _ = fed(text=text, pads=(0, 9))
    layer = driver.layer
    query, key, value = (t[:, :, PROMPT : PROMPT + length] for t in text)
    other = copy.deepcopy(driver)
    other.layer.append(key, value)
    other.layer.seen += length
    keys, values = other.layer.materialize()
    mask = other.mask(PROMPT, PROMPT + length)
    expected, _ = dense_attention(driver.module, query, keys, values, mask, scaling=0.25)
    torch.testing.assert_close(driver.feed(query, key, value), expected, atol=1e-5, rtol=0)
    assert layer.recent == RECENT, "a long block overflows at once"


@pytest.mark.parametrize("pads", [None, (0, 9), (2, 88)])
@pytest.mark.parametrize("anchor_ratio", [0.0, 0.15])
@pytest.mark.parametrize("steps", [0, 13])
def test_full_rank_tokens_come_back_bit_equal_in_their_places(pads, anchor_ratio, steps):
    driver, text = fed(steps, pads=pads, anchor_ratio=anchor_ratio, anchor_score="residual", update_rule="none")
    layer = driver.layer
    keys, values = layer.materialize()
    assert keys.shape == values.shape == (2, 2, PROMPT + steps, DIM)
    for row in range(2):
        for head in range(2):
            whole = whole_places(layer, row, head)
            assert len(set(whole)) == len(whole) == layer.full[0].length
            for rebuilt, given in ((keys, text[1]), (values, text[2])):
                assert torch.equal(rebuilt[row, head, whole], given[row, head, whole])
            low, segment = low_places(layer, row, head), layer.segments[0]
            for rebuilt, given, basis in ((keys, text[1], segment.key_basis), (values, text[2], segment.value_basis)):
                expected = projected(given[row, head, low], basis[row, head])
                torch.testing.assert_close(rebuilt[row, head, low], expected, atol=1e-5, rtol=0)


def test_sinks_are_the_first_real_tokens_and_padding_is_never_an_anchor():
    driver, _ = fed(pads=(0, 30), anchor_ratio=0.3, anchor_score="residual")
    layer = driver.layer
    assert whole_places(layer, 0, 0)[:SINKS] == list(range(SINKS))
    assert whole_places(layer, 1, 0)[:SINKS] == list(range(30, 30 + SINKS))
    assert int(layer.anchor_positions[1].min()) >= 30 + SINKS


@pytest.mark.parametrize("update_rule", ["exact", "hebbian", "oja", "none"])
def test_tokens_of_low_rank_lose_nothing(update_rule):
    query, _, _ = text_tensors(2, 2, 2, PROMPT + 12, DIM)
    axes = torch.linalg.qr(torch.randn(2, 2, 2, DIM, 6)).Q
    key, value = (torch.randn(2, 2, PROMPT + 12, 6) @ a.mT for a in axes)
    driver = Driver(**{**RATIOS, "update_rule": update_rule})
    outputs = driver.feed_text((query, key, value), PROMPT)
    assert driver.layer.segments
    for step, output in enumerate(outputs[1:]):
        end = PROMPT + step + 1
        whole = query[:, :, end - 1 : end], key[:, :, :end], value[:, :, :end]
        expected, _ = dense_attention(driver.module, *whole, None, scaling=0.25)
        torch.testing.assert_close(output, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_rule_loses_as_little_as_the_prompts_own_pca(dtype):
    driver, text = fed(dtype=dtype)
    segment = driver.layer.segments[0]
    for given, basis in ((text[1], segment.key_basis), (text[2], segment.value_basis)):
        tokens = given[:, :, :PROMPT].float()
        best = torch.linalg.svd(tokens).Vh[..., : basis.shape[-1], :].mT
        lost = (tokens - projected(tokens, basis)).square().sum((2, 3))
        least = (tokens - projected(tokens, best)).square().sum((2, 3))
        assert (lost <= 1.02 * least).all(), f"residual {float((lost / least).max()):.3f} times that of the PCA"


def test_anchors_by_residual_are_the_worst_rebuilt_keys():
    driver, text = fed(anchor_ratio=0.2, anchor_score="residual")
    layer, basis = driver.layer, driver.layer.segments[0].key_basis
    lost = subspace.residual_norm(text[1][:, :, :PROMPT], basis)
    assert layer.anchors == int(0.2 * (PROMPT - SINKS - RECENT))
    for row in range(2):
        for head in range(2):
            kept = lost[row, head, layer.anchor_positions[row, head].long()]
            compressed = lost[row, head, low_places(layer, row, head)]
            assert len(compressed) == PROMPT - SINKS - RECENT - layer.anchors
            assert float(compressed.max()) <= float(kept.min())


def test_versioned_coordinates_stay_as_written():
    driver, text = fed(coefficients="versioned", max_versions=8)
    layer = driver.layer
    written = []
    for step in range(22):
        for part in layer.segments[len(written) :]:
            written.append([part.key.rows.clone(), part.value.rows.clone(), *(t.clone() for t in part.tensors())])
        driver.feed(*(t[:, :, PROMPT + step : PROMPT + step + 1] for t in text))
    assert len(layer.segments) == 5
    for part, before in zip(layer.segments, written):
        now = [part.key.rows[:, :, : before[0].shape[2]], part.value.rows[:, :, : before[1].shape[2]], *part.tensors()]
        assert all(torch.equal(a, b) for a, b in zip(now, before))
    assert sum(part.key.length for part in layer.segments) == layer.seen - layer.full[0].length


def test_rotated_coordinates_never_grow():
    driver, text = fed(coefficients="rotate")
    layer, segment = driver.layer, driver.layer.segments[0]
    moved = 0
    for step in range(22):
        before, basis = segment.key.rows.clone(), segment.key_basis.clone()
        driver.feed(*(t[:, :, PROMPT + step : PROMPT + step + 1] for t in text))
        after = segment.key.rows[:, :, : before.shape[2]]
        assert (after.norm(dim=-1) <= before.norm(dim=-1) + 1e-5).all()
        if not torch.equal(segment.key_basis, basis):
            moved += 1
            expected = projected(before @ basis.mT, segment.key_basis)
            torch.testing.assert_close(after @ segment.key_basis.mT, expected, atol=1e-5, rtol=0)
    assert moved == 4
    assert layer.segments == [segment]


FROZEN = [
    {"update_rule": "none"},
    {"update_rule": "hebbian", "prompt_learning_rate": 0.0, "decode_learning_rate": 0.0},
    {"update_rule": "oja", "prompt_learning_rate": 0.0, "decode_learning_rate": 0.0},
]


@pytest.mark.parametrize("settings", FROZEN)
def test_a_rate_of_zero_and_the_rule_none_keep_the_starting_basis(settings):
    start = [torch.linalg.qr(torch.randn(2, DIM, DIM)).Q for _ in range(2)]
    driver = Driver(**{**RATIOS, **settings})
    driver.layer.start = start
    driver.feed_text(text_tensors(2, 2, 2, PROMPT + 20, DIM), PROMPT)
    bases = [(part.key_basis, part.value_basis) for part in driver.layer.segments]
    for basis, given in ((basis, given) for pair in bases for basis, given in zip(pair, start)):
        torch.testing.assert_close(basis, given[..., : basis.shape[-1]].expand_as(basis), atol=1e-5, rtol=0)


@pytest.mark.parametrize("update_rule", ["exact", "hebbian", "oja"])
def test_bases_stay_orthonormal_through_hundreds_of_updates(update_rule):
    text = text_tensors(1, 2, 2, PROMPT + 600, DIM)
    driver = Driver(batch=1, **{**RATIOS, "update_rule": update_rule, "update_interval": 2, "coefficients": "rotate"})
    driver.feed_text(text, PROMPT)
    segment = driver.layer.segments[-1]
    for basis in (segment.key_basis, segment.value_basis, *driver.layer.running):
        error = (basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max()
        assert float(error) < 1e-5


@pytest.mark.parametrize("max_versions", [1, 2, 3])
def test_no_more_versions_than_allowed(max_versions):
    driver, _ = fed(40, max_versions=max_versions)
    assert len(driver.layer.segments) == max_versions


def test_a_basis_that_drifted_less_than_the_tolerance_is_kept_per_row_and_head():
    """Only row 1, head 0 changes its text; the other heads go on as in the prompt."""
    text = text_tensors(2, 2, 2, PROMPT + 40, DIM, drift=0.0)
    turned = torch.linalg.qr(torch.randn(DIM, DIM)).Q
    for stream in text[1:]:
        stream[1, 0, PROMPT:] = stream[1, 0, PROMPT:] @ turned
    driver, _ = fed(40, text=text, drift_tolerance=0.1, max_versions=8)
    first, last = driver.layer.segments[0], driver.layer.segments[-1]
    assert first is not last
    for old, new in ((first.key_basis, last.key_basis), (first.value_basis, last.value_basis)):
        assert float(subspace.drift(old, new)[1, 0]) > 0.1
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1, 1], new[1, 1])


@pytest.mark.parametrize("coefficients", ["versioned", "rotate"])
@pytest.mark.parametrize("update_rule", ["exact", "hebbian"])
def test_permuted_rows_and_heads_give_permuted_results(coefficients, update_rule):
    settings = {"coefficients": coefficients, "update_rule": update_rule}
    text = text_tensors(3, 2, 2, PROMPT + 20, DIM)
    settings |= {"anchor_ratio": 0.1, "anchor_score": "logit", **RATIOS}
    outputs = Driver(batch=3, **settings).feed_text(text, PROMPT)
    rows, kv_heads, heads = [2, 0, 1], [1, 0], [2, 3, 0, 1]
    swapped = [t[rows][:, heads if t is text[0] else kv_heads] for t in text]
    for found, expected in zip(Driver(batch=3, **settings).feed_text(swapped, PROMPT), outputs):
        torch.testing.assert_close(found, expected[rows][:, :, heads], atol=1e-5, rtol=0)


# Versions are opened for a whole batch, so rows are independent as long as `max_versions` is not reached at different
# times; with tolerance 0 every row opens one at every update.
@pytest.mark.parametrize(("drift_tolerance", "max_versions"), [(0.0, 2), (0.0, 100), (0.05, 100)])
def test_a_row_does_not_depend_on_the_other_rows(max_versions, drift_tolerance):
    """Row 0 changes its text late, row 1 early: the versions row 1 opens must not use up those of row 0."""
    text = text_tensors(2, 2, 2, PROMPT + 60, DIM)
    axes = torch.linalg.qr(torch.randn(2, DIM, DIM)).Q[..., :6]
    for row, change in ((0, PROMPT + 30), (1, PROMPT)):
        for stream in text[1:]:
            codes = torch.randn(2, PROMPT + 60, 6)
            stream[row] = torch.cat([codes[:, :change] @ axes[0].T, codes[:, change:] @ axes[1].T], dim=1)
    settings = {"max_versions": max_versions, "anchor_ratio": 0.1, "anchor_score": "residual", "forgetting": 0.5}
    settings = {**RATIOS, **settings, "drift_tolerance": drift_tolerance, "value_ratio": 0.375}
    together = Driver(batch=2, **settings).feed_text(text, PROMPT)
    for row in range(2):
        driver = Driver(batch=1, **settings)
        alone = driver.feed_text([t[row : row + 1] for t in text], PROMPT)
        assert len(driver.layer.segments) > 1
        for step, (found, expected) in enumerate(zip(together, alone)):
            message = f"row {row}, step {step}"
            torch.testing.assert_close(
                found[row], expected[0], atol=1e-5, rtol=0, msg=lambda m, s=message: f"{s}: {m}"
            )


@pytest.mark.parametrize("pads", [(0, 60), (0, 95), (0, 99)])
@pytest.mark.parametrize("interval", [5, 8])
def test_a_row_with_few_real_tokens_among_long_ones_keeps_the_right_ones(pads, interval):
    """Padding reaches into the sinks and, at 95 and 99, into the six newest tokens."""
    text = text_tensors(2, 2, 2, PROMPT + 30, DIM)
    settings = {**RATIOS, "update_rule": "none", "anchor_ratio": 0.0, "update_interval": interval}
    start = [torch.linalg.qr(torch.randn(2, DIM, DIM)).Q for _ in range(2)]
    driver = Driver(pads=pads, **settings)
    driver.layer.start = start
    together = driver.feed_text(text, PROMPT)
    keys, values = driver.layer.materialize()
    for row, pad in enumerate(pads):
        low = [place for place in low_places(driver.layer, row, 0) if place >= pad]
        for rebuilt, given, basis, rank in ((keys, text[1], start[0], 6), (values, text[2], start[1], 8)):
            expected = given[row, :, pad : PROMPT + 30].clone()
            shifted = [place - pad for place in low]
            expected[:, shifted] = projected(expected[:, shifted], basis[..., :rank])
            torch.testing.assert_close(rebuilt[row, :, pad:], expected, atol=1e-5, rtol=0)
    assert all(output.isfinite().all() for output in together[1:])


@pytest.mark.parametrize("pads", [(0, 60), (0, 95), (0, 99)])
@pytest.mark.parametrize("interval", [5, 8])
@pytest.mark.parametrize("update_rule", ["exact", "hebbian"])
def test_a_row_with_few_real_tokens_does_not_disturb_the_updates_of_the_others(pads, interval, update_rule):
    text = text_tensors(2, 2, 2, PROMPT + 30, DIM)
    settings = {**RATIOS, "update_rule": update_rule, "anchor_ratio": 0.0, "update_interval": interval}
    together = Driver(pads=pads, **settings).feed_text(text, PROMPT)
    alone = Driver(batch=1, **settings).feed_text([t[:1] for t in text], PROMPT)
    for step, (found, expected) in enumerate(zip(together, alone)):
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0, msg=lambda m, s=step: f"step {s}: {m}")
    assert all(output.isfinite().all() for output in together[1:])


def test_reset_forgets_everything():
    driver, text = fed(20)
    driver.layer.reset()
    assert driver.layer.seen == 0
    assert not driver.layer.tensors()
    outputs = driver.feed_text(text, PROMPT)
    for found, expected in zip(outputs, Driver(**RATIOS).feed_text(text, PROMPT)):
        assert torch.equal(found, expected)


def test_a_deep_copy_goes_on_as_the_original_would():
    driver, text = fed(12)
    other = copy.deepcopy(driver)
    for step in range(12, 30):
        part = [t[:, :, PROMPT + step : PROMPT + step + 1] for t in text]
        assert torch.equal(driver.feed(*part), other.feed(*part))
    storages = [{t.data_ptr() for t in d.layer.tensors() if t.numel()} for d in (driver, other)]
    assert not storages[0] & storages[1]


def test_reordered_rows_go_on_as_the_rows_they_copied():
    driver, text = fed(12, batch=3, pads=(0, 9, 4), text=text_tensors(3, 2, 2, PROMPT + 40, DIM))
    other = copy.deepcopy(driver)
    index = torch.tensor([2, 2, 1])
    other.layer.reorder_cache(index)
    other.pads = driver.pads[index]
    for step in range(12, 40):
        part = [t[:, :, PROMPT + step : PROMPT + step + 1] for t in text]
        expected = driver.feed(*part)[index]
        torch.testing.assert_close(other.feed(*(t[index] for t in part)), expected, atol=1e-5, rtol=0)


def test_rows_can_be_selected_and_repeated_with_compressed_state():
    driver, text = fed(12)
    other = copy.deepcopy(driver)
    other.layer.batch_repeat_interleave(3)
    assert other.layer.batch_size == 6
    other.layer.batch_select_indices(torch.tensor([1, 4]))
    part = [t[:, :, PROMPT + 12 : PROMPT + 13] for t in text]
    torch.testing.assert_close(other.feed(*part), driver.feed(*part), atol=1e-5, rtol=0)


def test_the_newest_tokens_can_be_taken_back_but_not_the_compressed_ones():
    driver, text = fed(3)
    layer = driver.layer
    assert layer.recent == RECENT + 3
    other = copy.deepcopy(driver)
    with pytest.raises(hf_ext.CacheStateError, match=r"cannot crop 10 tokens.*newest 9.*recent_tokens"):
        layer.crop(-10)
    assert layer.seen == PROMPT + 3
    layer.crop(-9)
    assert layer.get_seq_length() == PROMPT - 6
    driver.feed_text([t[:, :, PROMPT - 6 : PROMPT + 3] for t in text], 9)
    for found, expected in zip(layer.materialize(), other.layer.materialize()):
        assert torch.equal(found, expected)


def test_a_short_prompt_is_compressed_once_it_grew_and_is_exact_until_then():
    text = text_tensors(2, 2, 2, 140, DIM)
    driver = Driver(**RATIOS)
    driver.feed_text([t[:, :, :10] for t in text], 10)
    compressed_at = None
    for place in range(10, 140):
        output = driver.feed(*(t[:, :, place : place + 1] for t in text))
        if compressed_at is None:
            whole = text[0][:, :, place : place + 1], text[1][:, :, : place + 1], text[2][:, :, : place + 1]
            expected, _ = dense_attention(driver.module, *whole, None, scaling=0.25)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
            if driver.layer.segments:
                compressed_at = place
    assert compressed_at is not None
    assert driver.layer.recent < RECENT + INTERVAL


def test_compressed_prefill_attends_to_what_is_stored():
    text = text_tensors(2, 2, 2, PROMPT, DIM)
    driver = Driver(pads=(0, 9), **RATIOS, prefill="compressed")
    output = driver.feed(*text)
    expected, _ = dense_attention(
        driver.module, text[0], *driver.layer.materialize(), driver.mask(0, PROMPT), scaling=0.25
    )
    torch.testing.assert_close(output[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(output[1, 9:], expected[1, 9:], atol=1e-5, rtol=0)
    full = Driver(pads=(0, 9), **RATIOS).feed(*text)
    assert float((output - full)[0].abs().max()) > 1e-3


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_energy_is_kept_in_every_head_by_the_smallest_rank(share):
    driver, text = fed(key_ratio=None, value_ratio=None, energy=share, anchor_ratio=0.0)
    segment = driver.layer.segments[0]
    for given, basis in ((text[1], segment.key_basis), (text[2], segment.value_basis)):
        values = torch.linalg.svdvals(given[:, :, :PROMPT]).square()
        kept = values.cumsum(-1) / values.sum(-1, keepdim=True)
        rank = basis.shape[-1]
        assert (kept[..., rank - 1] >= share - 1e-5).all()
        assert rank == 1 or (kept[..., rank - 2] < share).any()


def test_keys_of_low_rank_before_rotation_need_the_pre_space():
    """Rotation spreads a small subspace over the whole head dimension."""
    axes = torch.linalg.qr(torch.randn(2, 2, DIM, 4)).Q
    query, _, value = text_tensors(2, 2, 2, PROMPT, DIM)
    plain = torch.randn(2, 2, PROMPT, 4) @ axes.mT
    lost = {}
    for space in ("pre", "post"):
        driver = Driver(**{**RATIOS, "key_space": space, "key_ratio": 0.25, "anchor_ratio": 0.0})
        key = Rope(driver.config).rotate(plain, torch.arange(PROMPT).expand(2, -1))
        driver.feed(query, key, value)
        assert driver.layer.segments
        lost[space] = float((driver.layer.materialize()[0] - key).square().sum() / key.square().sum())
    assert lost["pre"] < 1e-8
    assert lost["post"] > 0.05
