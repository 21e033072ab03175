"""The quick comparison of `SGCAdamW`, with models trained for a few steps."""

import math

import pytest
import torch

from hf_ext.benches import sgc as bench


@pytest.fixture(scope="module")
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STEPS", 12)
        patch.setattr(bench, "WARM_UP", 2)
        yield


@pytest.fixture(scope="module")
def rows(short):
    return bench.run(1)


def values(rows, metric):
    return {row.system: row.value for row in rows if row.metric == metric}


def test_every_optimizer_has_a_loss_and_its_bytes(rows):
    losses, sizes = values(rows, "loss above entropy"), values(rows, "state")
    assert losses.keys() == sizes.keys() == set(bench.SYSTEMS)
    # A model that has learned nothing is log(64) nats from certain.
    assert all(0 < value < math.log(bench.SYMBOLS) + 0.5 for value in losses.values())
    assert sizes["block scalar"] < sizes["sgc"] < sizes["AdamW"] / 20
    assert sizes["sgc"] < sizes["sgc, paper known"] == sizes["sgc, paper omp"] < sizes["AdamW"] / 5


def test_bytes_of_adamw_are_two_numbers_a_weight(short):
    data, _, _ = bench.material(0)
    model, optimizer = bench.train("AdamW", 0, data)
    weights = list(model.parameters())
    steps = 4 * len(weights)
    assert bench.state_bytes(optimizer) == 8 * sum(weight.numel() for weight in weights) + steps


@pytest.mark.parametrize("name", ["sgc", "AdamW", "Adafactor", "Adafactor relative", "block scalar"])
def test_training_lowers_the_loss(short, name):
    data, held_out, _ = bench.material(0)
    with torch.no_grad():
        trained = float(bench.token_loss(bench.train(name, 0, data)[0], held_out))
    assert trained < math.log(bench.SYMBOLS + 2) - 0.05


def test_a_seed_is_always_the_same_and_another_one_is_another(short):
    first, again, other = (bench.material(seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert first[2] == again[2]
    assert not torch.equal(first[0], other[0])
    seen = {tuple(row) for row in first[0].tolist()}
    assert not seen & {tuple(row) for row in first[1].tolist()}
    one, two = (bench.train("sgc", 0, first[0])[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_the_least_loss_is_that_of_who_knows_the_language():
    language = bench.Language(torch.Generator().manual_seed(0))
    language.tables[:] = 0
    assert bench.entropy(language, language.sequences(3)) == pytest.approx(math.log(bench.SYMBOLS))
    language.tables[0, torch.arange(64), torch.arange(64)] = 100.0  # P(x | a, b) is all on x = a
    assert bench.entropy(language, language.sequences(3)) == pytest.approx(0, abs=1e-6)
