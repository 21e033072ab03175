"""`compress_delta` through its front door: the size that was asked for, measured, repeatable, and every refusal."""

import copy
import math

import pytest
import torch

from hf_ext.errors import ConfigError, DeltaError
from hf_ext.merging import osd
from hf_ext.merging.blob import LowRankTerm, SignTerm, encode
from hf_ext.merging.calibrate import Calibration
from hf_ext.merging.compress import compress_delta
from hf_ext.merging.osd_artifact import OSDArtifact
from hf_ext.merging.osd_config import OSDConfig
from hf_ext.tiny import tiny_model
from tests.merging.helpers import expected_deltas, save, tuned_model


# Two layers of about 150,000 weights each, so that small budgets are worth spending.
SIZES = {
    "llama_tied": {"hidden_size": 128, "intermediate_size": 256},
    "gpt2": {"n_embd": 128},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256},
}
BUDGETS = (5_000, 12_000, 40_000)


def pair(arch="llama_tied"):
    """A base and a fine-tune that moved along a few directions, in some noise."""
    base, tuned = tiny_model(arch, **SIZES[arch]), tuned_model(arch, **SIZES[arch])
    generator = torch.Generator().manual_seed(7)
    for weight in tuned.parameters():
        if weight.dim() == 2:
            left, right = (torch.randn(side, 4, generator=generator) for side in weight.shape)
            weight.data += 0.02 * left @ right.T / 2
    return base, tuned


@pytest.fixture(scope="module")
def llama():
    return pair()


class MLP(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(96, 192), torch.nn.Linear(192, 64), torch.nn.LayerNorm(64)
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            weight.data = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
            weight.data += 0.01 * seed * torch.randn(weight.shape, generator=generator)


def compress(base, tuned, calibration=None, **settings):
    return compress_delta(base, tuned, OSDConfig(**settings), calibration, progress=False)


def size_on_disk(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def error(artifact, base, tuned):
    """Frobenius norm of what is missing, and of all."""
    missing = total = 0.0
    for name, delta in expected_deltas(base, tuned).items():
        decoded = torch.zeros_like(delta)
        if name in artifact.deltas:
            decoded = torch.from_numpy(artifact.deltas[name].dense())
        missing += float((delta - decoded).double().pow(2).sum())
        total += float(delta.double().pow(2).sum())
    return missing**0.5, total**0.5


def texts(count=6, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 128, (1, length), generator=generator)} for _ in range(count)]


def options(codec):
    """One relaxation, because a search over five takes seconds here."""
    return {"codec": codec} | ({"relaxation": 2, "refit_steps": 1} if codec == "sparse" else {})


# Size


@pytest.mark.parametrize("codec", ["auto", "factors", "signs"])
@pytest.mark.parametrize("arch", sorted(SIZES))
def test_what_is_saved_fits_the_budget_and_fills_it(arch, codec, tmp_path):
    base, tuned = pair(arch)
    for budget in BUDGETS:
        artifact = compress(base, tuned, budget=budget, codec=codec)
        folder = tmp_path / str(budget)
        artifact.save_pretrained(folder)
        size = size_on_disk(folder)
        assert size <= budget
        # A column of one bit is two to three percent of the smallest of these budgets.
        least = 0.97 if codec == "factors" and budget < 10_000 else 0.98
        assert size >= least * budget, f"{size} of {budget} bytes used"
        assert artifact.nbytes() == size
        after = {row.what: row.value for row in artifact.measured()}["bytes after"]
        assert after == size


@pytest.mark.parametrize(
    "settings",
    [
        {"codec": "sparse", "relaxation": 2},
        {"codec": "sparse", "values": "int8", "selection": "separate", "relaxation": 0},
        {"codec": "sparse", "values": "bf16", "importance": "energy", "relaxation": 4, "refit_steps": 0},
        {"codec": "factors", "values": "int8"},
        {"codec": "factors", "values": "int3", "scope": "per_layer"},
        {"codec": "factors", "values": "bf16", "svd": "exact", "refit_steps": 0},
        {"codec": "auto", "other_tensors": "code"},
        {"codec": "auto", "other_tensors": "drop", "target_modules": ["q_proj", "down_proj"]},
    ],
    ids=str,
)
def test_every_option_fits_its_budget(settings, llama, tmp_path):
    artifact = compress(*llama, budget=9_000, **settings)
    artifact.save_pretrained(tmp_path / "out")
    size = size_on_disk(tmp_path / "out")
    assert 0.75 * 9_000 <= size <= 9_000
    missing, total = error(artifact, *llama)
    assert settings["codec"] == "auto" or missing < total
    if "target_modules" in settings:
        assert {name.split(".")[-2] for name in artifact.deltas} == {"q_proj", "down_proj"}
    if settings.get("other_tensors") == "drop":
        assert not any("norm" in name or "embed" in name for name in artifact.deltas)


def test_there_is_no_more_to_spend_than_the_delta_has(tmp_path):
    """A budget far beyond a small model is not an error, and is not used up."""
    base, tuned = MLP(1), MLP(2)
    artifact = compress(base, tuned, budget=10_000_000, codec="factors", values="fp32", other_tensors="code")
    assert artifact.nbytes() < 1_000_000
    missing, total = error(artifact, base, tuned)
    assert missing <= 1e-4 * total


def test_error_falls_as_the_budget_grows(llama):
    found = [error(compress(*llama, budget=budget, codec="factors"), *llama)[0] for budget in BUDGETS]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


def test_without_a_budget_a_2000th_or_20_kilobytes_are_used(llama):
    artifact = compress(*llama)
    assert 19_000 <= artifact.nbytes() <= 20_000


# Content


@pytest.mark.parametrize("codec", ["auto", "factors", "signs", "sparse"])
def test_the_same_input_gives_the_same_bytes(codec, llama, tmp_path):
    for attempt in ("one", "two"):
        compress(*llama, budget=7_000, **options(codec)).save_pretrained(tmp_path / attempt)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "artifact.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_the_search_over_relaxations_is_no_worse_than_one_of_them(llama):
    settings = {"budget": 9_000, "codec": "sparse", "other_tensors": "drop"}
    searched, alone = (compress(*llama, **settings, relaxation=c) for c in (None, 0))
    assert error(searched, *llama)[0] <= 1.02 * error(alone, *llama)[0]


def test_another_seed_gives_other_signs(llama):
    one, two = (compress(*llama, budget=7_000, codec="signs", seed=seed) for seed in (0, 1))
    assert encode(one.deltas) != encode(two.deltas)


def test_codecs_give_their_terms(llama):
    for codec, kind in (("factors", LowRankTerm), ("sparse", LowRankTerm), ("signs", SignTerm)):
        artifact = compress(*llama, budget=9_000, **options(codec))
        assert {type(t) for name, d in artifact.deltas.items() if "proj" in name for t in d.terms} == {kind}
    sparse = compress(*llama, budget=9_000, **options("sparse"))
    assert any(side.mask is not None for d in sparse.deltas.values() for t in d.terms for side in (t.left, t.right))


def test_signs_do_not_share_places_between_tensors_of_one_shape(llama):
    artifact = compress(*llama, budget=9_000, codec="signs")
    seeds = [term.seed for delta in artifact.deltas.values() for term in delta.terms if isinstance(term, SignTerm)]
    assert len(set(seeds)) == len(seeds) > 10


@pytest.mark.parametrize("codec", ["factors", "signs"])
def test_reports_hold_the_error_of_what_the_file_decodes_to(codec, llama, tmp_path):
    artifact = compress(*llama, budget=9_000, codec=codec)
    artifact.save_pretrained(tmp_path)
    loaded = OSDArtifact.from_pretrained(tmp_path)
    expected = expected_deltas(*llama)
    assert {report.name for report in artifact.reports} == set(expected)
    for report in artifact.reports:
        delta = expected[report.name]
        energy = float(delta.double().pow(2).sum())
        assert report.energy == pytest.approx(energy, rel=1e-5)
        decoded = loaded.deltas[report.name].dense() if report.name in loaded.deltas else torch.zeros(delta.shape)
        missing = float((delta - torch.as_tensor(decoded)).double().pow(2).sum())
        assert report.error == pytest.approx(missing, rel=1e-4)


def test_a_tied_head_is_compressed_once(llama):
    artifact = compress(*llama, budget=12_000, other_tensors="code", codec="factors")
    assert "model.embed_tokens.weight" in artifact.deltas
    assert "lm_head.weight" not in artifact.deltas
    assert artifact.config.tied == {"lm_head": "model.embed_tokens"}


def test_folders_models_and_shards_give_the_same_deltas(llama, tmp_path):
    base, tuned = llama
    save(base, tmp_path / "base")
    save(tuned, tmp_path / "tuned", max_shard_size="300KB")
    # Paper mode, because elsewhere the bytes of the path count too.
    live = compress(base, tuned, mode="paper", rank=1, relaxation=1)
    stored = compress(str(tmp_path / "base"), tmp_path / "tuned", mode="paper", rank=1, relaxation=1)
    assert encode(live.deltas) == encode(stored.deltas)
    assert stored.config.base_model_name_or_path == str(tmp_path / "base")
    assert live.config.base_fingerprint == stored.config.base_fingerprint


@pytest.mark.parametrize("codec", ["factors", "signs", "sparse"])
def test_a_module_that_is_no_transformer_works(codec, tmp_path):
    base, tuned = MLP(1), MLP(2)
    artifact = compress(base, tuned, budget=4_000, **options(codec))
    artifact.save_pretrained(tmp_path)
    assert 0.9 * 4_000 <= size_on_disk(tmp_path) <= 4_000
    assert {"up.weight", "down.weight"} <= set(artifact.deltas)


def test_a_convolution_is_coded_in_its_own_shape():
    base = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Conv1d(16, 32, 5))
    tuned = copy.deepcopy(base)
    for weight in tuned.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    for codec in ("factors", "signs"):
        artifact = compress(base, tuned, budget=3_500, codec=codec)
        for name in ("0.weight", "1.weight"):
            assert artifact.deltas[name].dense().shape == dict(base.named_parameters())[name].shape


def test_a_scalar_parameter_is_no_obstacle():
    """Scales such as CLIP's `logit_scale` have no axis."""

    def model(seed):
        module = MLP(seed)
        module.scale = torch.nn.Parameter(torch.tensor(2.0 + seed))
        return module

    for codec in ("factors", "signs"):
        artifact = compress(model(1), model(2), budget=4_000, codec=codec)
        assert "up.weight" in artifact.deltas
        encode(artifact.deltas)


def test_only_vectors_changed():
    base, tuned = MLP(1), MLP(1)
    tuned.norm.weight.data += 0.3
    artifact = compress(base, tuned, budget=4_000)
    assert list(artifact.deltas) == ["norm.weight"]
    missing, total = error(artifact, base, tuned)
    assert missing < 0.3 * total


def test_equal_models_give_an_empty_artifact(llama, tmp_path):
    base = llama[0]
    artifact = compress(base, base, budget=5_000)
    assert artifact.deltas == {}
    artifact.save_pretrained(tmp_path)
    assert size_on_disk(tmp_path) == artifact.nbytes() <= 5_000
    assert OSDArtifact.from_pretrained(tmp_path).deltas == {}


def test_a_tensor_that_did_not_change_is_not_stored():
    base, tuned = pair()
    tuned.model.layers[0].mlp.up_proj.weight.data = base.model.layers[0].mlp.up_proj.weight.data.clone()
    for codec in ("factors", "signs", "sparse"):
        artifact = compress(base, tuned, budget=9_000, **options(codec))
        assert "model.layers.0.mlp.up_proj.weight" not in artifact.deltas
        assert "model.layers.1.mlp.up_proj.weight" in artifact.deltas


# Paper mode


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("selection", ["joint", "separate"])
def test_paper_mode_holds_its_formula_in_every_layer(rank, selection, llama):
    artifact = compress(*llama, mode="paper", rank=rank, selection=selection)
    moved = {n: d for n, d in expected_deltas(*llama).items() if d.dim() == 2 and "embed" not in n}
    assert set(artifact.deltas) == set(moved)
    sparse = 0
    for name, delta in artifact.deltas.items():
        n, d = delta.shape
        budget = 32 * rank * (n + d)
        (term,) = delta.terms
        assert term.left.bits == term.right.bits == 32
        k = len(term.left.values)
        if term.left.mask is None and term.right.mask is None:
            assert 32 * k * (n + d) <= budget
        else:
            sparse += 1
            kept = [int(s.values.size if s.mask is None else s.mask.sum()) for s in (term.left, term.right)]
            assert budget - 100 < osd.paper_bits(n, d, k, *kept) <= budget
        missing = float((moved[name] - torch.from_numpy(delta.dense())).norm())
        tail = float(torch.linalg.svdvals(moved[name])[rank:].norm())
        # c = 0 is among the choices; the decomposition is randomised.
        assert missing <= 1.02 * tail
    assert sparse, "every layer took the dense form"


@pytest.mark.parametrize(
    ("field", "value", "fixed"),
    [
        ("codec", "signs", "'sparse'"),
        ("values", "int4", "'fp32'"),
        ("refit_steps", 1, "0"),
        ("other_tensors", "code", "'drop'"),
    ],
)
def test_paper_mode_refuses_what_it_would_overrule(field, value, fixed):
    with pytest.raises(
        ConfigError, match=rf"OSDConfig.{field}={value!r} must be {fixed} with mode=\"paper\"; leave it"
    ):
        OSDConfig(mode="paper", rank=1, **{field: value})


def test_paper_mode_sets_the_fields_left_alone_and_comes_back():
    config = OSDConfig(mode="paper", rank=1, selection="separate", svd="exact")
    assert (config.codec, config.values, config.scope, config.refit_steps) == ("sparse", "fp32", "per_layer", 0)
    assert config.other_tensors == "drop"
    assert (config.selection, config.svd) == ("separate", "exact")
    assert OSDConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_the_rank_of_paper_mode_sets_the_size(llama):
    sizes = [compress(*llama, mode="paper", rank=rank).nbytes() for rank in (1, 2)]
    assert sizes[0] < sizes[1] < 2 * sizes[0] + 1000


# Refusals


def test_weights_that_are_not_finite_are_refused_by_name():
    base, tuned = pair()
    for value in (math.nan, math.inf):
        tuned.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        with pytest.raises(DeltaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            compress(base, tuned, budget=9_000)


def test_other_shapes_are_refused_by_name(llama):
    other = tiny_model("llama_tied", hidden_size=128, intermediate_size=192)
    with pytest.raises(DeltaError, match=r"(?s)proj.*192"):
        compress(llama[0], other, budget=9_000)
    with pytest.raises(DeltaError):
        compress(llama[0], pair("gpt2")[1], budget=9_000)


def test_a_rank_beyond_the_matrices_is_refused(llama):
    for settings in ({"mode": "paper"}, {"codec": "factors"}):
        with pytest.raises(ConfigError, match=r"OSDConfig\.rank=65 exceeds 64"):
            compress(*llama, rank=65, **settings)


def test_a_budget_below_one_entry_is_refused_with_one_that_is_not(llama):
    for codec in ("auto", "factors", "signs", "sparse"):
        for budget in (1, 500):
            with pytest.raises(ConfigError, match=rf"OSDConfig\.budget={budget} .*use at least (\d+)") as caught:
                compress(*llama, budget=budget, codec=codec)
        enough = int(str(caught.value).rstrip(".").split()[-1])
        assert compress(*llama, budget=enough, codec=codec).nbytes() <= enough


@pytest.mark.parametrize("importance", ["taylor1", "taylor", "fisher"])
def test_scores_from_data_are_refused_without_data(importance, llama):
    with pytest.raises(ConfigError, match=f"importance='{importance}' needs calibration data"):
        compress(*llama, budget=9_000, codec="sparse", importance=importance)


@pytest.mark.parametrize(
    ("data", "match"),
    [([], "calibration data is empty"), ([3], "int '3'"), ([{"words": 1}], "words"), ("a text", "one example")],
)
def test_calibration_data_of_the_wrong_kind_is_refused(data, match, llama):
    with pytest.raises(ConfigError, match=match):
        compress(*llama, data, budget=9_000)


def test_texts_without_a_tokenizer_are_refused(llama):
    with pytest.raises(ConfigError, match="no tokenizer"):
        compress(*llama, ["hello"], budget=9_000)


# Calibration


@pytest.mark.parametrize("arch", sorted(SIZES))
def test_calibration_restores_predictions_and_leaves_the_models_as_they_were(arch):
    base, tuned = pair(arch)
    before = [{name: w.clone() for name, w in model.state_dict().items()} for model in (base, tuned)]
    flags = [p.requires_grad for model in (base, tuned) for p in model.parameters()]
    base.train()
    artifact = compress(base, tuned, texts(), budget=30_000)
    assert base.training
    assert not tuned.training
    for model, weights in zip((base, tuned), before):
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name]), name
        assert all(p.grad is None for p in model.parameters())
    assert flags == [p.requires_grad for model in (base, tuned) for p in model.parameters()]
    fresh = Calibration(base, tuned, texts(seed=5), 10, "base", False)
    divergence = fresh.divergence(artifact.deltas)
    assert divergence < 0.5 * fresh.base_divergence, (divergence, fresh.base_divergence)
    assert artifact.recovery > 0.5
    assert artifact.nbytes() <= 30_000
    rows = {row.what: row.value for row in artifact.measured()}
    assert rows["recovery of predictions, calibration data"] == pytest.approx(artifact.recovery, abs=1e-4)


def test_more_bytes_restore_more_predictions(llama):
    measure = Calibration(*llama, texts(seed=5), 10, "base", False)
    assert measure._divergence(expected_deltas(*llama)) < 1e-3 * measure.base_divergence
    found = [measure.divergence(compress(*llama, texts(), budget=budget).deltas) for budget in (6_000, 60_000)]
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize("importance", ["taylor1", "taylor", "fisher"])
def test_scores_from_data_choose_other_entries(importance, llama):
    plain = compress(*llama, budget=9_000, codec="sparse", importance="magnitude", relaxation=2, refit_steps=1)
    scored = compress(
        *llama, texts(), budget=9_000, codec="sparse", importance=importance, relaxation=2, refit_steps=1
    )
    assert scored.nbytes() <= 9_000
    assert encode(scored.deltas) != encode(plain.deltas)
    missing, total = error(scored, *llama)
    assert missing < total


def test_the_number_of_calibration_samples_is_a_limit(llama):
    many, few = (compress(*llama, texts(count), budget=9_000, calibration_samples=4) for count in (9, 4))
    assert encode(many.deltas) == encode(few.deltas)
    batch = {"input_ids": torch.cat([item["input_ids"] for item in texts(9)])}
    assert encode(compress(*llama, [batch], budget=9_000, calibration_samples=4).deltas) == encode(few.deltas)


def test_a_weight_that_was_zero_in_the_base_still_gets_its_delta():
    """Zero-initialised gates and adapters: a share of nothing is no limit for noise."""
    base, tuned = MLP(1), MLP(2)
    base.up.weight.data.zero_()
    artifact = compress(base, tuned, budget=4_000, codec="signs")
    assert artifact.deltas["up.weight"].dense().any()


def test_an_empty_parameter_is_no_obstacle():
    def model(seed):
        module = MLP(seed)
        module.unused = torch.nn.Parameter(torch.zeros(0, 8))
        return module

    artifact = compress(model(1), model(2), budget=4_000)
    assert "unused" not in artifact.deltas
