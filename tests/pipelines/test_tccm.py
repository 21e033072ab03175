"""The score, its networks and its fit against the paper's formulas, loops and exact cases."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from hf_ext.errors import ConfigError, DataError
from hf_ext.pipelines import tccm
from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel
from tests.reference import tccm_naive as naive


SMALL = {"members": 2, "hidden_size": 16, "steps": 30, "batch_size": 64, "time_embedding_size": 8}
PAPER = {"mode": "paper", "hidden_size": 16, "steps": 30, "batch_size": 64, "time_embedding_size": 8}


def _rows(n=200, d=3, seed=0):
    """Correlated rows, each column in units of its own."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(d))
    return rows * torch.logspace(-1, 2, d, dtype=torch.float64) + torch.arange(d) * 5.0


def _fit(rows, **settings):
    return TCCMModel(TCCMConfig(feature_size=rows.shape[1], **{**SMALL, **settings})).eval().fit(rows)


def _naive_scores(model, rows):
    return torch.tensor([naive.score(model, row) for row in rows.tolist()], dtype=torch.float64)


def _weights(model):
    return [p.detach().clone() for p in model.net.parameters()]


@pytest.fixture(scope="module")
def rows():
    return _rows()


@pytest.fixture(scope="module")
def fitted(rows):
    return _fit(rows)


@pytest.fixture(scope="module")
def paper(rows):
    return _fit(rows, **PAPER, members=1)


# Exact cases


def test_with_a_zero_last_layer_the_papers_score_is_the_norm_of_z(rows):
    model = _fit(rows, **{**PAPER, "steps": 0}, members=1)
    with torch.no_grad():
        model.net.weights[2].zero_()
        model.net.biases[2].zero_()
    z = (rows - rows.mean(0)) / rows.std(0, correction=0)
    torch.testing.assert_close(model.score(rows).double(), z.norm(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(model.residuals(rows)[0], model.standardize(rows))


def test_the_papers_score_is_the_norm_of_what_the_network_misses(paper):
    other = _rows(40, seed=1)
    z = paper.standardize(other)
    missed = paper.net(z[None], torch.ones(1, len(z), 1))[0] + z
    torch.testing.assert_close(paper.score(other), missed.norm(dim=1).detach(), rtol=1e-5, atol=1e-6)
    assert len(paper.references) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"time_embedding": "none"},
        {"members": 1, "neighbors": 2},
        {"residual_weight": 1.0, "neighbors": 0},
        {"residual_weight": 0.0},
        {**PAPER, "members": 1},
        {**PAPER, "members": 3},
        {**PAPER, "members": 1, "neighbors": 3, "residual_weight": 0.5},
    ],
    ids=str,
)
def test_the_score_is_that_of_loops_over_rows_networks_and_references(rows, settings):
    model = _fit(rows[:60], **settings)
    some = torch.cat([_rows(12, seed=2), rows[:4]])
    expected = _naive_scores(model, some)
    torch.testing.assert_close(model.score(some).double(), expected, rtol=2e-4, atol=1e-6)


def test_folding_the_time_into_the_bias_changes_nothing(fitted):
    z = fitted.standardize(_rows(50, seed=3)).expand(2, 50, 3)
    unfolded = fitted.net(z, torch.ones(2, 50, 1))
    torch.testing.assert_close(fitted.net.at_one(z[0]), unfolded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 8, 128])
def test_time_is_embedded_as_in_the_paper(size):
    for t in (0.0, 0.3, 1.0):
        found = tccm.embed_time(torch.tensor([[t]]), size)[0]
        np.testing.assert_allclose(found.numpy(), naive.embed_time(t, size), atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"trim": 0.2}, {"steps": None, "epochs": 3}], ids=str)
def test_members_trained_together_are_those_trained_alone(settings):
    model = _fit(_rows(21, 2), **{**SMALL, "hidden_size": 6, "steps": 7, "batch_size": 8, **settings})
    z = model.standardize(_rows(21, 2))
    for member, net in enumerate(naive.train(model.config, z)):
        for place in range(3):
            torch.testing.assert_close(model.net.weights[place][member], net[2 * place].weight.T, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(model.net.biases[place][member, 0], net[2 * place].bias, rtol=1e-3, atol=1e-5)


def test_the_start_is_that_of_torchs_linear_layers():
    model = TCCMModel(TCCMConfig(feature_size=20))
    for weight, bias in zip(model.net.weights, model.net.biases):
        bound = weight.shape[1] ** -0.5
        for tensor in (weight, bias):
            assert tensor.abs().max() <= bound
            assert tensor.abs().max() > 0.95 * bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not torch.equal(model.net.weights[0][0], model.net.weights[0][1]), "members start alike"


# Invariance


def test_a_row_scores_the_same_in_any_company(fitted):
    other = _rows(700, seed=4)
    scores = fitted.score(other)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fitted.score(other[order]), scores[order])
    assert torch.equal(torch.cat([fitted.score(part) for part in other.split(97)]), scores)
    assert torch.equal(torch.cat([fitted.score(other[i : i + 1]) for i in range(40)]), scores[:40])
    assert fitted.score(other[:0]).shape == (0,)


@pytest.mark.parametrize("units", [1e-3, 7.0, 1e-14, 1e9])
def test_units_and_offsets_of_the_columns_do_not_matter(rows, fitted, units):
    scale, shift = units * torch.tensor([1.0, 3.0, 0.5]), units * torch.tensor([-2.0, 0.0, 9.0])
    other = _rows(50, seed=5)
    found = _fit(rows * scale + shift).score(other * scale + shift)
    torch.testing.assert_close(found, fitted.score(other), rtol=2e-2, atol=1e-3)


def test_time_stamps_keep_their_seconds(rows, fitted):
    """In float32 a time of today is off by a minute."""
    away = torch.tensor([1.7e9, 0.0, 0.0])
    other = _rows(50, seed=5)
    moved = _fit(rows + away)
    torch.testing.assert_close(moved.score(other + away), fitted.score(other), rtol=2e-2, atol=1e-3)
    minute = torch.zeros(1, 3, dtype=torch.float64)
    minute[0, 0] = 1e-3
    assert (moved.standardize(rows + away + minute) != moved.standardize(rows + away))[:, 0].all()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.int8, torch.bool, torch.float32, torch.bfloat16], ids=str
)
def test_any_kind_of_number_is_read_as_it_is(dtype):
    generator = torch.Generator().manual_seed(0)
    most = {torch.bool: 2, torch.int8: 128}.get(dtype, 256)
    values = torch.randint(0, most, (80, 3), generator=generator)
    typed, exact = _fit(values.to(dtype), steps=3), _fit(values.double(), steps=3)
    assert torch.equal(typed.score(values.to(dtype)), exact.score(values.double()))


def test_a_model_in_train_mode_scores_the_same(rows, fitted):
    model = copy.deepcopy(fitted).train()
    assert torch.equal(model.score(rows), fitted.score(rows))
    assert torch.equal(_fit(rows).train().fit(rows).score(rows), fitted.score(rows))


def test_the_same_seed_gives_the_same_model_whatever_was_drawn_before(rows, fitted):
    torch.manual_seed(12345)
    torch.rand(17)
    state = torch.get_rng_state()
    again = _fit(rows)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(a, b) for a, b in zip(_weights(again), _weights(fitted)))
    assert torch.equal(again.score(rows), fitted.score(rows))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        start = _weights(TCCMModel(TCCMConfig(feature_size=3, **SMALL)))
    finally:
        torch.set_default_dtype(default)
    assert all(torch.equal(a, b) for a, b in zip(start, _weights(TCCMModel(TCCMConfig(feature_size=3, **SMALL)))))


def test_another_seed_gives_another_model(rows, fitted):
    other = _fit(rows, seed=1)
    assert not torch.equal(other.net.weights[0], fitted.net.weights[0])
    assert not torch.equal(other.score(rows), fitted.score(rows))


def test_fitting_again_forgets_what_was_learned(rows, fitted):
    model = _fit(_rows(90, seed=6))
    model.fit(rows)
    assert torch.equal(model.score(rows), fitted.score(rows))
    assert int(model.rows_seen) == len(rows)


def test_pickle_and_deepcopy_keep_the_scores(rows, fitted):
    for twin in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert torch.equal(twin.score(rows), fitted.score(rows))


# Training


@pytest.mark.parametrize("embedding", ["sinusoidal", "none"])
def test_the_loss_falls_to_less_than_half_on_a_normal_cloud(embedding):
    cloud = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    settings = {"mode": "paper", "members": 1, "hidden_size": 64, "batch_size": 256, "time_embedding": embedding}
    before = _fit(cloud, **{**settings, "steps": 0})(cloud).loss
    after = _fit(cloud, **{**settings, "steps": 200})(cloud).loss
    assert after < 0.5 * before, (before, after)


def test_rows_of_zeros_are_learned_quickly():
    model = _fit(torch.full((100, 5), 3.25), members=1, steps=100)
    assert model(torch.full((100, 5), 3.25)).loss < 1e-3


@pytest.mark.parametrize("settings", [{}, {**PAPER, "members": 1}], ids=["default", "paper"])
def test_a_cloud_six_deviations_away_is_beyond_the_99th_percentile(settings):
    generator = torch.Generator().manual_seed(0)
    train, test, far = (torch.randn(n, 6, generator=generator) for n in (500, 500, 200))
    model = _fit(train, **settings)
    assert model.score(far + 6).min() > model.score(test).quantile(0.99)
    # Six deviations in all, 2.45 in each of the features.
    assert (model.score(far + 6 / math.sqrt(6)) > model.score(test).quantile(0.99)).float().mean() > 0.95


@pytest.mark.parametrize("n", [100, 96, 7])
def test_epochs_are_counted_in_steps_with_a_short_last_batch(n):
    each = math.ceil(n / 32)
    by_steps = _fit(_rows(n), batch_size=32, steps=3 * each)
    by_epochs = _fit(_rows(n), batch_size=32, steps=None, epochs=3)
    assert by_epochs.config.steps is None
    assert all(torch.equal(a, b) for a, b in zip(_weights(by_steps), _weights(by_epochs)))


def test_every_member_meets_every_row_once_an_epoch_at_times_of_its_own(monkeypatch):
    met, times, loss = [], [], TCCMModel._loss

    def watch(self, z, t):
        met.append(z)
        times.append(t)
        return loss(self, z, t)

    monkeypatch.setattr(TCCMModel, "_loss", watch)
    rows = torch.arange(70.0)[:, None]
    model = _fit(rows, batch_size=32, steps=None, epochs=2)
    assert [z.shape[1] for z in met] == [32, 32, 6] * 2
    for epoch in (met[:3], met[3:]):
        for member in torch.cat(epoch, dim=1):
            assert torch.equal(member.sort(0).values, model.standardize(rows))
    assert not torch.equal(met[0][0], met[0][1]), "members share their order"
    assert not torch.equal(met[0], met[3]), "epochs share their order"
    drawn = torch.cat(times, dim=1).flatten()
    assert len(drawn.unique()) > 0.99 * len(drawn)
    assert drawn.min() >= 0
    assert drawn.max() < 1


def test_the_trimmed_loss_is_that_of_the_rows_that_fit_best(rows, fitted):
    z, t = fitted.standardize(rows[:10]).expand(2, 10, 3), torch.full((2, 10, 1), 0.5)
    each = (fitted.net(z, t) + z).square().mean(-1)
    model = copy.deepcopy(fitted)
    for trim, dropped in ((0.0, 0), (0.09, 0), (0.2, 2), (0.45, 4)):
        model.config.trim = trim
        expected = sum(sum(sorted(member)[: 10 - dropped]) / (10 - dropped) for member in each.tolist())
        assert model._loss(z, t).item() == pytest.approx(expected, rel=1e-5)


def test_trim_takes_its_share_of_the_most_distant_rows_from_the_references():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(190, 3, generator=generator)
    far = 8 * torch.nn.functional.normalize(torch.randn(10, 3, generator=generator))
    model = _fit(torch.cat([rows, far]), trim=0.05)
    assert len(model.references) == 190
    kept = model.references.double() * model.scale + model.mean
    assert kept.norm(dim=1).max() < 6


def test_trim_helps_where_training_rows_are_contaminated():
    plain, trimmed = [], []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def anomalies(n, generator=generator):
            return (torch.rand(n, 3, generator=generator) * 2 - 1) * 6

        train = torch.cat([torch.randn(340, 3, generator=generator), anomalies(60)])
        normal, abnormal = torch.randn(300, 3, generator=generator), anomalies(300)
        for found, trim in ((plain, 0.0), (trimmed, 0.15)):
            model = _fit(train, trim=trim)
            found.append(naive.auroc(model.score(normal), model.score(abnormal)))
    assert all(after > before for before, after in zip(plain, trimmed)), (plain, trimmed)


def test_the_papers_mode_needs_epochs(rows):
    model = TCCMModel(TCCMConfig(feature_size=3, mode="paper"))
    assert (model.config.members, model.config.hidden_size, model.config.neighbors) == (1, 256, 0)
    with pytest.raises(ConfigError, match="needs epochs or steps"):
        model.fit(rows)
    assert int(model.rows_seen) == 0


# Awkward tables


def test_a_constant_column_counts_by_its_departure():
    rows = torch.cat([_rows(100, 2), torch.full((100, 1), 1e6, dtype=torch.float64)], dim=1)
    model = _fit(rows)
    assert model.scale[2] == 1
    assert (model.standardize(rows)[:, 2] == 0).all()
    away = rows.clone()
    away[:, 2] += 5
    assert (model.score(away) > 2 * model.score(rows)).all()


@pytest.mark.parametrize("value", [0.1, -1e-20, 1e15, 0.0])
def test_a_constant_column_is_seen_as_one_in_spite_of_rounding(value):
    rows = torch.full((1001, 1), value, dtype=torch.float64)
    assert float(_fit(rows, steps=0).scale) == 1


@pytest.mark.parametrize("settings", [{}, {**PAPER, "members": 1}], ids=["default", "paper"])
@pytest.mark.parametrize("shape", [(50, 1), (2, 3), (2, 1), (3, 2)], ids=str)
def test_small_tables_are_scored_by_the_same_formula(shape, settings):
    rows = _rows(*shape)
    model = _fit(rows, **settings)
    some = torch.cat([_rows(5, shape[1], seed=1), rows])
    expected = _naive_scores(model, some)
    torch.testing.assert_close(model.score(some).double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("references", [1, 2, 5, 6, 7])
def test_fewer_references_than_neighbors(rows, references):
    model = _fit(rows, max_references=references)
    assert len(model.references) == references
    expected = _naive_scores(model, rows[:10])
    torch.testing.assert_close(model.score(rows[:10]).double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "rows", [torch.ones(30, 2), torch.tensor([[0.0, 1.0]] * 29 + [[5.0, 5.0]])], ids=["constant", "nearly"]
)
def test_rows_that_repeat_have_finite_scores_in_order(rows):
    model = _fit(rows)
    scores = model.score(torch.cat([rows, rows[:1] + 3.0]))
    assert torch.isfinite(scores).all()
    assert torch.isfinite(model.threshold)
    assert scores[-1] > scores[0]


@pytest.mark.parametrize("value", [1e30, -1e30, 1e200])
def test_huge_values_have_finite_scores(rows, fitted, value):
    odd = rows.clone()
    odd[3, 1] = value
    scores = fitted.score(odd)
    assert torch.isfinite(scores).all()
    assert scores.argmax() == 3
    assert torch.isfinite(_fit(odd, steps=3).score(odd)).all()


def test_rows_seen_in_the_fit_are_not_their_own_neighbours(rows, fitted):
    """Otherwise training rows would score lower than new ones, and the threshold would flag more than its share."""
    assert abs(float((fitted.score(rows) > fitted.threshold).double().mean()) - 0.1) <= 1 / len(rows)
    assert float(fitted.score(rows).median()) == pytest.approx(
        float(fitted.score(_rows(400, seed=8)).median()), rel=0.25
    )


@pytest.mark.parametrize("contamination", [0.01, 0.1, 0.5])
def test_the_threshold_leaves_the_stated_share_beyond_it(rows, contamination):
    model = _fit(rows, contamination=contamination)
    assert int((model.score(rows) > model.threshold).sum()) == round(contamination * len(rows))


# Bad input


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(4, 2), "fitted on 3 features"),
        (torch.ones(3), "fitted on 3 features"),
        (torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]]), "first in row 1"),
        (torch.tensor([[math.inf, 2.0, 3.0]]), "first in row 0"),
    ],
    ids=["width", "vector", "nan", "inf"],
)
def test_rows_that_cannot_be_scored_are_refused(rows, fitted, bad, message):
    before = fitted.score(rows)
    for call in (fitted.score, fitted, fitted.residuals, copy.deepcopy(fitted).calibrate):
        with pytest.raises(DataError, match=message if bad.ndim == 2 else "shape"):
            call(bad)
    for call in (fitted.fit, fitted.partial_fit):
        with pytest.raises(DataError):
            call(bad)
    assert torch.equal(fitted.score(rows), before), "a refused call changed the model"


def test_one_row_is_too_few_to_fit_and_enough_to_go_on(rows):
    model = TCCMModel(TCCMConfig(feature_size=3, **SMALL)).eval()
    for call in (model.fit, model.partial_fit):
        with pytest.raises(DataError, match="at least 2 rows"):
            call(rows[:1])
    model.fit(rows).partial_fit(rows[:1])
    with pytest.raises(DataError, match="at least 1 row "):
        model.partial_fit(rows[:0])
    with pytest.raises(DataError, match="at least 1 row "):
        model.calibrate(rows[:0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feature_size", 0),
        ("mode", "other"),
        ("members", 0),
        ("hidden_size", 0),
        ("time_embedding", "learned"),
        ("time_embedding_size", 7),
        ("time_embedding_size", 0),
        ("steps", -1),
        ("epochs", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("neighbors", -1),
        ("neighbors", 0),
        ("max_references", 0),
        ("residual_weight", 1.5),
        ("trim", 0.5),
        ("trim", -0.1),
        ("contamination", 0.0),
        ("contamination", 0.6),
        ("seed", -1),
        ("seed", "one"),
    ],
)
def test_a_setting_that_cannot_work_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name}="):
        TCCMConfig(**{name: value})


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(ConfigError, match="exclude each other"):
        TCCMConfig(steps=3, epochs=3)


# Learning from more rows


def test_moments_after_parts_are_those_of_all_rows():
    generator = torch.Generator().manual_seed(0)
    rows = _rows(300, 3)
    constant = torch.full((300, 1), 4.0, dtype=torch.float64)
    late = torch.cat([torch.full((200, 1), 2.0), torch.randn(100, 1, generator=generator)]).double()
    rare = (torch.rand(300, 1, generator=generator) < 0.01).double()
    rows = torch.cat([rows, constant, late, rare], dim=1)
    floors = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.2])
    whole = TCCMModel(TCCMConfig(feature_size=6, **SMALL)).fit(rows, scale_floors=floors)
    parts = TCCMModel(TCCMConfig(feature_size=6, **SMALL))
    for part in (rows[:50], rows[50:51], rows[51:200], rows[200:]):
        parts.partial_fit(part, scale_floors=floors)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-9, atol=1e-9)
    assert whole.scale[3] == 1
    assert whole.scale[5] == pytest.approx(0.2)
    assert int(parts.rows_seen) == 300


def test_the_first_part_is_a_fit_and_the_same_parts_give_the_same_model(rows, fitted):
    def parts():
        model = TCCMModel(TCCMConfig(feature_size=3, **SMALL)).eval().partial_fit(rows)
        assert torch.equal(model.score(rows), fitted.score(rows))
        return model.partial_fit(_rows(50, seed=7)).partial_fit(_rows(60, seed=8))

    one, two = parts(), parts()
    assert torch.equal(one.score(rows), two.score(rows))
    assert not torch.equal(one.score(rows), fitted.score(rows))


def test_references_stay_a_bounded_uniform_sample_of_all_rows_seen():
    """Rows carry the number of their part: of 100 kept, 20 or so are of each of five equal parts."""
    counts = np.zeros(5)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        config = TCCMConfig(feature_size=2, **{**SMALL, "steps": 0, "hidden_size": 2}, max_references=100, seed=seed)
        model = TCCMModel(config)
        for part in range(5):
            noise = torch.randn(400, 1, generator=generator, dtype=torch.float64)
            model.partial_fit(torch.cat([noise, torch.full((400, 1), part, dtype=torch.float64)], dim=1))
            assert len(model.references) == 100
        kept = (model.references.double() * model.scale + model.mean)[:, 1].round().int()
        counts += np.bincount(kept.numpy(), minlength=5)
    # Each count is near 800, with a deviation of about 25.
    assert np.abs(counts - 800).max() < 110, counts


def test_a_part_smaller_than_the_references_adds_its_rows(rows):
    model = _fit(rows[:20]).partial_fit(rows[20:50])
    kept = model.references.double() * model.scale + model.mean
    assert len(kept) == 50
    torch.testing.assert_close(kept.sort(0).values, rows[:50].sort(0).values, rtol=1e-5, atol=1e-4)


def test_more_rows_of_another_kind_are_learned():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(300, 4, generator=generator), torch.randn(300, 4, generator=generator) + 12
    model = _fit(first)
    new = torch.randn(100, 4, generator=generator) + 12
    before = float((model.score(new) > model.threshold).double().mean())
    model.partial_fit(second)
    after = float((model.score(new) > model.threshold).double().mean())
    assert before == 1
    assert after < 0.3


# Thresholds and p-values


def test_p_values_are_counted(fitted):
    model = copy.deepcopy(fitted)
    calibration = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0])
    model._set_calibration(calibration, held_out=True)
    scores = [0.0, 1.0, 2.0, 2.5, 5.0, 6.0]
    expected = [naive.p_value(score, calibration.tolist()) for score in scores]
    assert model.p_values(torch.tensor(scores)).tolist() == pytest.approx(expected)
    assert expected[-1] == pytest.approx(1 / 6)


def test_p_values_of_exchangeable_rows_are_uniform(fitted):
    """With nine rows to compare with there are ten values, each as likely."""
    model, counts = copy.deepcopy(fitted), np.zeros(10)
    scores = model.score(_rows(10_000, seed=11)).reshape(1000, 10)
    for calibration, test in zip(scores[:, :9], scores[:, 9:]):
        model._set_calibration(calibration, held_out=True)
        counts[round(float(model.p_values(test)) * 10) - 1] += 1
    # Chi-square with nine degrees of freedom: above 27.9 once in a thousand.
    assert ((counts - 100) ** 2 / 100).sum() < 27.9, counts


def test_calibration_moves_the_threshold_and_fitting_again_takes_the_p_values_away(rows, fitted):
    model = copy.deepcopy(fitted)
    with pytest.raises(DataError, match="not fitted on"):
        model.p_values(model.score(rows))
    held = _rows(80, seed=12)
    model.calibrate(held)
    assert int((model.score(held) > model.threshold).sum()) == 8
    assert torch.equal(model.calibration, model.score(held).sort().values)
    assert float(model.p_values(model.score(held)).min()) == pytest.approx(2 / 81)
    assert torch.equal(model.score(rows), fitted.score(rows))
    model.partial_fit(rows)
    with pytest.raises(DataError, match="not fitted on"):
        model.p_values(model.score(rows))


def test_the_threshold_moves_with_the_contamination(rows, fitted):
    model = copy.deepcopy(fitted)
    for share in (0.05, 0.3):
        model.set_contamination(share)
        assert int((model.score(rows) > model.threshold).sum()) == round(share * len(rows))


# The forward pass


def test_forward_gives_the_loss_and_in_eval_mode_the_scores(rows, fitted):
    model = copy.deepcopy(fitted)
    given = model(rows, t=torch.full((len(rows), 1), 0.25))
    z = model.standardize(rows).expand(2, len(rows), 3)
    expected = (model.net(z, torch.full((2, len(rows), 1), 0.25)) + z).square().mean((1, 2)).sum()
    torch.testing.assert_close(given.loss, expected)
    assert torch.equal(given.scores, model.score(rows))
    assert torch.equal(model(rows).loss, model(rows).loss), "the loss of an evaluation is random"
    assert model(rows, return_loss=False).loss is None
    model.train()
    assert model(rows).scores is None
    assert model(rows).loss.requires_grad
