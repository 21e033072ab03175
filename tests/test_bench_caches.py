"""The benches of the caches on a tiny model, and the parts they share against slower and plainer versions."""

import importlib
import math

import pytest
import torch
from transformers import DynamicCache

from hf_ext.benches import caches
from hf_ext.errors import MissingPackageError
from hf_ext.tiny import tiny_model


CONTEXT, LENGTH = 600, 24
OJAKV, SENTENCEKV, HYBRIDKV = (
    importlib.import_module(f"hf_ext.benches.{name}") for name in ("ojakv", "sentencekv", "hybridkv")
)
MAKERS = {
    **OJAKV.SYSTEMS,
    **SENTENCEKV.systems(128, [2, 3, 4, 5]),
    **HYBRIDKV.systems(128, [2, 3, 4, 5]),
}
del MAKERS["streaming"]


@pytest.fixture
def small(monkeypatch):
    def missing():
        raise MissingPackageError("not here")

    monkeypatch.setattr(caches, "load_smollm2", missing)
    for name, value in {"CONTEXT": CONTEXT, "STORED": 1200, "STEPS": 4}.items():
        monkeypatch.setattr(caches, name, value)
    for bench in (SENTENCEKV, HYBRIDKV):
        monkeypatch.setattr(bench, "BUDGET", 128)
    for bench in (OJAKV, SENTENCEKV, HYBRIDKV):
        monkeypatch.setattr(bench, "CONTINUATION", LENGTH)


def values(rows, metric):
    return {row.system: row for row in rows if row.metric == metric}


@pytest.mark.parametrize(
    ("bench", "untimed"),
    [(OJAKV, set()), (SENTENCEKV, {"sentencekv paper"}), (HYBRIDKV, set())],
    ids=["ojakv", "sentencekv", "hybridkv"],
)
def test_without_the_packaged_model_a_tiny_one_is_measured_and_the_setting_says_so(small, bench, untimed):
    threads = torch.get_num_threads()
    rows = bench.run(2)
    assert torch.get_num_threads() == threads
    assert {row.method for row in rows} == {bench.__name__.rpartition(".")[2]}
    assert len({(row.system, row.metric) for row in rows}) == len(rows)
    assert all(math.isfinite(row.value) and math.isfinite(row.spread) and row.n == 2 for row in rows)
    systems = set(bench.SYSTEMS if bench is OJAKV else bench.systems(128, [2]))
    loss, lost, size = (values(rows, name) for name in ("NLL above dense", "KL from dense", "bytes over dense"))
    assert set(loss) == set(lost) == set(size) == {"dense", *systems}
    assert set(values(rows, "decode step")) == {"dense", *systems} - untimed
    assert all("tiny random Llama" in row.setting for row in loss.values())
    assert all(lost[system].value > 1e-4 for system in systems - {"packed"}), "these caches lose something"
    assert (loss["dense"].value, lost["dense"].value, size["dense"].value) == (0, 0, 1)
    assert values(rows, "decode step over dense")["dense"].value == 1


def test_the_exact_cache_loses_nothing_and_the_peer_has_the_same_bytes(small):
    rows = OJAKV.run(1)
    lost, size = values(rows, "KL from dense"), values(rows, "bytes over dense")
    assert lost["packed"].value == pytest.approx(0, abs=1e-4)
    for ratio in ("0.6", "0.4"):
        assert size[f"ojakv {ratio}"].value == pytest.approx(size[f"exact PCA {ratio}"].value, rel=0.1)


@pytest.mark.parametrize("bench", [SENTENCEKV, HYBRIDKV], ids=["sentencekv", "hybridkv"])
def test_a_retrieval_cache_is_judged_token_by_token(small, bench, monkeypatch):
    model, fed = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    monkeypatch.setattr(caches, "tiny_model", lambda arch: model)
    bench.run(1)
    systems = 1 + len(bench.systems(128, [2]))
    assert fed == [CONTEXT] + [1] * systems * (LENGTH - 1)


@pytest.mark.parametrize("system", MAKERS)
def test_a_filled_cache_predicts_what_one_that_read_the_prompt_does(system):
    model = tiny_model("llama")
    ids = torch.cat([torch.randint(2, 128, (1, CONTEXT + LENGTH)) for _ in range(2)])
    context, tokens = ids[:, :CONTEXT], ids[:, CONTEXT:]
    with torch.no_grad():
        cache = MAKERS[system](model)
        model(input_ids=context, past_key_values=cache)
        expected, expected_bytes = caches.predict(model, cache, tokens, 1)
        cache = MAKERS[system](model)
        caches.fill(cache, caches.read(model, context), context)
        found, found_bytes = caches.predict(model, cache, tokens, 1)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert found_bytes == expected_bytes


def test_streaming_attends_to_first_and_newest_tokens_at_their_own_positions():
    model, budget = tiny_model("llama"), 64
    ids = torch.randint(2, 128, (2, 100 + LENGTH))
    rows, columns = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])
    near = (columns > rows - (budget - caches.SINKS)) | (columns < caches.SINKS) | (rows < 100)
    mask = torch.zeros(near.shape).masked_fill(~(near & (columns <= rows)), torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask.expand(2, 1, -1, -1)).logits[:, 100:-1].log_softmax(-1)
        cache = caches.StreamingCache(model, budget)
        caches.fill(cache, caches.read(model, ids[:, :100]))
        found, held = caches.predict(model, cache, ids[:, 100:], 1)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    config = model.config
    assert held == 2 * 2 * budget * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


def test_streaming_within_its_budget_is_dense():
    model, ids = tiny_model("llama"), torch.randint(2, 128, (1, 100 + LENGTH))
    with torch.no_grad():
        prompt = caches.read(model, ids[:, :100])
        found = []
        for cache in (caches.StreamingCache(model, 200), DynamicCache(config=model.config)):
            caches.fill(cache, prompt)
            found.append(caches.predict(model, cache, ids[:, 100:], 1)[0])
    assert torch.equal(*found)


def test_predictions_in_blocks_are_those_of_one_forward():
    model, ids = tiny_model("llama"), torch.randint(2, 128, (2, 100))
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].log_softmax(-1)
        for block in (1, 7, 100):
            found, _ = caches.predict(model, DynamicCache(config=model.config), ids, block)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_a_document_is_measured_the_same_alone_and_in_a_batch(small):
    subject, makers = caches.load(), SENTENCEKV.systems(128, [2, 3, 4, 5])
    with torch.no_grad():
        alone = values(caches.quality("sentencekv", makers, subject, 1, LENGTH, 1), "KL from dense")
        two = caches.quality("sentencekv", makers, subject, 2, LENGTH, 1)
    for row in values(two, "KL from dense").values():
        first, spread = alone[row.system].value, row.spread / math.sqrt(2)
        assert min(abs(row.value - spread - first), abs(row.value + spread - first)) < 5e-4, row.system
