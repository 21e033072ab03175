"""The quick comparison of OSD, with models trained for a few steps."""

import math
import statistics

import pytest
import torch

from hf_ext.benches import osd as bench


@pytest.fixture(scope="module")
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STEPS", 40)
        patch.setattr(bench, "TUNING_STEPS", 30)
        patch.setattr(bench, "CALIBRATION", 4)
        patch.setattr(bench, "RANKS", (1,))
        yield


@pytest.fixture(scope="module")
def rows(short):
    return bench.run(1)


def values(rows, metric):
    return {row.system: row.value for row in rows if row.metric == metric}


def test_every_system_has_a_recovery_and_bytes_within_the_papers(rows):
    recovery, size = values(rows, "recovery of the loss gap"), values(rows, "bytes")
    assert recovery.keys() == size.keys() == {"osd paper", *bench.SYSTEMS}
    assert all(math.isfinite(value) and value <= 1 for value in recovery.values())
    assert all(value <= size["osd paper"] for value in size.values())
    # The share of the budget that dense factors use: whole columns, so some of it stays.
    assert all(size[f"dense SVD {kind}"] > 0.9 * size["osd paper"] for kind in ("fp32", "int8", "int4"))


def test_at_equal_bytes_fewer_bits_a_value_recover_more(rows):
    recovery = values(rows, "recovery of the loss gap")
    assert recovery["dense SVD fp32"] < recovery["dense SVD int8"] < recovery["dense SVD int4"]
    assert recovery["dense SVD fp32"] < recovery["osd paper"], "the paper's claim"


def test_two_seeds_are_two_fine_tunes_and_one_seed_always_the_same(short):
    first, again, other = (bench.finetune(seed) for seed in (0, 0, 1))
    for name, weight in first[1].state_dict().items():
        assert torch.equal(weight, again[1].state_dict()[name])
    assert torch.equal(first[3], again[3])
    assert not torch.equal(first[3], other[3])


def test_the_fine_tune_leaves_the_embedding_alone_and_lowers_the_loss(short):
    base, tuned, calibration, held_out = bench.finetune(0)
    assert torch.equal(base.get_input_embeddings().weight, tuned.get_input_embeddings().weight)
    moved = [name for name, weight in base.named_parameters() if not torch.equal(weight, tuned.state_dict()[name])]
    assert len(moved) == len(list(base.parameters())) - 1
    assert bench.held_out_loss(tuned, None, held_out) < bench.held_out_loss(base, None, held_out) - 0.1
    seen = {tuple(row) for row in calibration.tolist()}
    assert not seen & {tuple(row) for row in held_out.tolist()}


def test_a_token_follows_from_the_two_before_it():
    language = bench.Language(torch.Generator().manual_seed(0))
    language.tables[:] = 0
    language.tables[0, torch.arange(64), torch.arange(64)] = 100.0  # P(x | a, b) is all on x = a
    ids = language.sequences(5)
    assert torch.equal(ids[:, 2:], ids[:, :-2])
    assert ids.min() >= 2
    assert ids.max() < bench.SYMBOLS + 2


def test_a_third_of_the_rows_of_the_second_language_are_its_own():
    language = bench.Language(torch.Generator().manual_seed(0))
    same = (language.changed().tables == language.tables).all(dim=2).float()
    assert statistics.mean(same.flatten().tolist()) == pytest.approx(1 - bench.CHANGED, abs=0.12)
