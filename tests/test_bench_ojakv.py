import math

import pytest
import torch

from hf_ext.benches import ojakv as bench
from hf_ext.errors import MissingPackageError
from hf_ext.tiny import tiny_model


@pytest.fixture
def small(monkeypatch):
    def missing():
        raise MissingPackageError("not here")

    monkeypatch.setattr(bench, "load_smollm2", missing)
    for name, value in {"CONTEXT": 600, "CONTINUATION": 96, "STORED": 400, "STEPS": 3}.items():
        monkeypatch.setattr(bench, name, value)


def values(rows, metric):
    return {row.system: row for row in rows if row.metric == metric}


def test_without_the_packaged_model_a_tiny_one_is_measured_and_the_setting_says_so(small):
    threads = torch.get_num_threads()
    rows = bench.run(2)
    assert torch.get_num_threads() == threads
    assert {row.system for row in rows} == {"dense", *bench.OURS}
    assert len({(row.system, row.metric) for row in rows}) == len(rows) == 4 * (1 + len(bench.OURS))
    assert all(math.isfinite(row.value) and math.isfinite(row.spread) for row in rows)
    loss, size = values(rows, "NLL above dense"), values(rows, "bytes over dense")
    assert all("tiny random Llama" in row.setting for row in loss.values())
    assert all(row.n == 2 * bench.DOCUMENTS for row in loss.values())
    assert loss["packed"].value == pytest.approx(0, abs=1e-4)
    assert loss["ojakv 0.4"].value != 0
    assert size["dense"].value == 1
    for ratio in ("0.6", "0.4"):
        ours, peer = size[f"ojakv {ratio}"].value, size[f"exact PCA {ratio}"].value
        assert ours == pytest.approx(peer, rel=0.1), "the peer gets the same bytes"
    assert values(rows, "decode step over dense")["dense"].value == 1


def test_filled_caches_equal_caches_that_read_the_prompt(small, monkeypatch):
    model = tiny_model("llama")
    ids = torch.randint(2, 128, (1, bench.CONTEXT + bench.CONTINUATION))
    with torch.no_grad():
        dense = bench.DynamicCache(config=model.config)
        model(ids[:, : bench.CONTEXT], past_key_values=dense)
        cache = bench.OURS["ojakv 0.4"](model)
        model(ids[:, : bench.CONTEXT], past_key_values=cache)
        expected = bench.loss(model, cache, ids) - bench.loss(model, dense, ids)
        monkeypatch.setattr(bench, "load", lambda: (model, "tiny", lambda number: ids))
        found = values(bench.quality(1), "NLL above dense")["ojakv 0.4"].value
    assert found == pytest.approx(expected, abs=2e-4)
