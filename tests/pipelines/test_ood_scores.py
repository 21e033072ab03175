"""Post-hoc scores: against formulas written out, against autograd, their invariances, and every documented error."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_ext.errors import DataError
from hf_ext.pipelines.medix import knn_distances
from hf_ext.pipelines.ood_scores import ASH, KNN, ODIN, SCORES, Combined, Mahalanobis, ReAct, ViM, odin_scores


def rows(n=300, d=12, classes=3, seed=0, shift=0.0):
    """Three Gaussian classes after a ReLU; `shift` moves them along one more direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 4 * torch.eye(d)[:classes]
    away = torch.zeros(d)
    away[-1] = shift
    return (centres[labels] + torch.randn(n, d, generator=generator) + away).relu(), labels


def last_layer(d=12, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, d, generator=generator), torch.randn(classes, generator=generator)


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_finite_deterministic_and_one_a_row(name):
    features, labels = rows()
    new, _ = rows(seed=1)
    weight, bias = last_layer()
    first = SCORES[name]().fit(features, labels, weight, bias).score(new)
    assert first.shape == (300,)
    assert first.isfinite().all()
    again = SCORES[name]().fit(features.numpy(), labels.numpy(), weight.numpy(), bias.numpy()).score(new.numpy())
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", SCORES)
def test_a_row_scores_the_same_alone(name):
    features, labels = rows()
    score = SCORES[name]().fit(features, labels, *last_layer())
    together = score.score(features)
    alone = torch.cat([score.score(features[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, together[:5], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mahalanobis", "knn", "vim", "combined"])
def test_rows_far_from_all_classes_score_higher(name):
    features, labels = rows()
    inside, _ = rows(seed=1)
    outside, _ = rows(seed=2, shift=12.0)
    score = SCORES[name]().fit(features, labels)
    assert score.score(outside).median() > score.score(inside).quantile(0.99)


@pytest.mark.parametrize("name", ["msp", "max_logit", "energy", "odin", "react"])
def test_rows_between_the_classes_score_higher(name):
    features, labels = rows()
    inside, _ = rows(seed=1)
    between = features.mean(0).expand(5, -1)
    score = SCORES[name]().fit(features, labels)
    assert score.score(between).min() > score.score(inside).median()


def test_logit_scores_are_their_formulas():
    features, labels = rows()
    weight, bias = last_layer()
    z = features @ weight.T + bias
    expected = {
        "msp": -z.softmax(1).max(1).values,
        "max_logit": -z.max(1).values,
        "energy": -z.exp().sum(1).log(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(SCORES[name]().fit(features, labels, weight, bias).score(features), value)


def test_mahalanobis_is_the_smallest_quadratic_form():
    features, labels = rows()
    x = features.double()
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    centred = x - means[labels]
    precision = torch.linalg.inv(centred.T @ centred / len(x))
    expected = torch.stack([torch.einsum("nd,de,ne->n", x - m, precision, x - m) for m in means]).amin(0)
    torch.testing.assert_close(Mahalanobis().fit(x, labels).score(x), expected, atol=1e-8, rtol=1e-8)


def test_relative_mahalanobis_takes_the_distance_to_all_off():
    features, labels = rows()
    x = features.double()
    centred = x - x.mean(0)
    background = torch.einsum("nd,de,ne->n", centred, torch.linalg.inv(centred.T @ centred / len(x)), centred)
    relative = SCORES["relative_mahalanobis"]().fit(x, labels).score(x)
    torch.testing.assert_close(relative, Mahalanobis().fit(x, labels).score(x) - background, atol=1e-8, rtol=1e-8)


def test_shrinking_is_scikit_learns():
    covariance = pytest.importorskip("sklearn.covariance")
    features, labels = rows(n=40)
    x = features.double()
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    shrunk, _ = covariance.ledoit_wolf((x - means[labels]).numpy(), assume_centered=True)
    precision = torch.linalg.inv(torch.from_numpy(shrunk))
    expected = torch.stack([torch.einsum("nd,de,ne->n", x - m, precision, x - m) for m in means]).amin(0)
    torch.testing.assert_close(Mahalanobis(shrink=True).fit(x, labels).score(x), expected, atol=1e-8, rtol=1e-8)


def test_knn_is_the_distance_on_the_sphere():
    features, labels = rows()
    new, _ = rows(seed=3)
    distances = torch.cdist(F.normalize(new.double(), dim=1), F.normalize(features.double(), dim=1)).sort(1).values
    for neighbors in (1, 7, 300):
        found = KNN(neighbors).fit(features.double(), labels).score(new.double())
        torch.testing.assert_close(found, distances[:, neighbors - 1], atol=1e-7, rtol=1e-6)
    assert torch.equal(knn_distances(new, features, 1000), knn_distances(new, features, 300))


def test_vim_without_a_residual_is_the_energy():
    features, labels = rows()
    weight, bias = last_layer()
    score = ViM(dimensions=6).fit(features, labels, weight, bias)
    # A row moved within the principal space keeps its residual.
    principal = torch.linalg.eigh(
        (features.double() - score.origin_).T @ (features.double() - score.origin_)
    ).eigenvectors[:, 6:]
    row = features[:1].double()
    moved = row + principal[:, -1]
    energy = SCORES["energy"]().fit(features.double(), labels, weight, bias)
    score = ViM(dimensions=6).fit(features.double(), labels, weight, bias)
    torch.testing.assert_close(
        score.score(moved) - score.score(row), energy.score(moved) - energy.score(row), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(DataError, match="12 of 12"):
        ViM(dimensions=12).fit(features, labels)


def test_react_without_a_cut_and_ash_without_pruning():
    features, labels = rows()
    weight, bias = last_layer()
    energy = SCORES["energy"]().fit(features, labels, weight, bias)
    torch.testing.assert_close(ReAct(1.0).fit(features, labels, weight, bias).score(features), energy.score(features))
    whole = ASH(0.0).fit(features, labels, weight, bias)
    # Nothing is pruned: before and after are one sum, and the scale is e.
    torch.testing.assert_close(whole.score(features), energy.score(features * torch.e))


def test_ash_keeps_the_largest():
    weight, bias = torch.eye(10)[:2] * 0 + 1, torch.zeros(2)
    features = torch.arange(10.0).expand(4, -1)
    score = ASH(0.8).fit(features, torch.tensor([0, 1, 0, 1]), weight, bias).score(features)
    kept = (8 + 9) * torch.tensor(45 / 17).exp()
    torch.testing.assert_close(score, -(kept + torch.tensor(2.0).log()).expand(4))


def test_odin_moves_every_input_up_its_own_confidence():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = []
    for row in x:
        leaf = row.clone().requires_grad_()
        (model(leaf) / 10).softmax(0).max().backward()
        expected.append(-(model(row + 0.1 * leaf.grad.sign()) / 10).softmax(0).max())
    with torch.no_grad():
        found = odin_scores(x, model, temperature=10.0, magnitude=0.1)
    torch.testing.assert_close(found, torch.stack(expected).detach())
    assert not found.requires_grad
    assert (found <= odin_scores(x, model, temperature=10.0, magnitude=0.0)).all()


def test_odin_does_not_depend_on_the_scale_of_a_feature():
    features, labels = rows()
    weight, bias = last_layer()
    scale = torch.logspace(-3, 3, 12)
    plain = ODIN(temperature=2.0, magnitude=0.1).fit(features, labels, weight, bias).score(features)
    scaled = ODIN(temperature=2.0, magnitude=0.1).fit(features * scale, labels, weight / scale, bias)
    torch.testing.assert_close(scaled.score(features * scale), plain, atol=1e-4, rtol=1e-4)


def test_combined_is_sure_about_rows_that_either_part_finds():
    features, labels = rows()
    inside, _ = rows(seed=1)
    score = Combined().fit(features, labels)
    far = features[:1] + 50 * torch.eye(12)[-1]
    limit = score.score(inside).quantile(0.95)
    assert score.score(far) > limit
    assert score.score(features.mean(0, keepdim=True)) > score.score(inside).median()
    # Beyond all known rows the order stays.
    further = features[:1] + 100 * torch.eye(12)[-1]
    assert score.score(further) > score.score(far)


def test_labels_of_any_numbers_without_a_last_layer():
    features, labels = rows()
    for name in SCORES:
        plain = SCORES[name]().fit(features, labels).score(features)
        assert torch.equal(SCORES[name]().fit(features, labels * 7 - 3).score(features), plain), name


def test_one_class_is_enough_for_distances():
    features, _ = rows()
    for name, cls in SCORES.items():
        score = cls()
        if score.reads_logits:
            with pytest.raises(DataError, match="1 class"):
                score.fit(features, torch.zeros(300))
        else:
            assert score.fit(features, torch.zeros(300)).score(features).isfinite().all(), name


@pytest.mark.parametrize("name", SCORES)
def test_bad_rows_are_named(name):
    features, labels = rows()
    score = SCORES[name]()
    with pytest.raises(DataError, match="not fitted"):
        score.score(features)
    with pytest.raises(DataError, match="NaN"):
        score.fit(torch.full((30, 4), float("nan")), torch.zeros(30))
    with pytest.raises(DataError, match="classes"):
        score.fit(features, labels + 1, *last_layer())
    with pytest.raises(DataError, match="labels have shape"):
        score.fit(features, labels[:-1], *last_layer())
    with pytest.raises(DataError, match="wide"):
        score.fit(features, labels, last_layer(d=11)[0])
    score.fit(features, labels, *last_layer())
    with pytest.raises(DataError, match="3 wide; expected 12"):
        score.score(np.zeros((2, 3)))
    with pytest.raises(DataError, match="NaN or infinity in 1 of 2"):
        score.score(np.stack([np.zeros(12), np.full(12, np.inf)]))


# Each against a formula of its own, in numpy and float64.


def _softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _energy(z):
    return -(np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1))


def _numpy_setup():
    features, labels = rows(n=200)
    weight, bias = last_layer()
    new, _ = rows(n=40, seed=7, shift=1.5)
    arrays = [part.double().numpy() for part in (features, new, weight, bias)]
    return *arrays, labels.numpy()


def _vim(h, x, w, b, y):
    origin = -np.linalg.pinv(w) @ b
    _, vectors = np.linalg.eigh((h - origin).T @ (h - origin))
    outside = vectors[:, :6]
    alpha = (h @ w.T + b).max(1).sum() / np.linalg.norm((h - origin) @ outside, axis=1).sum()
    return alpha * np.linalg.norm((x - origin) @ outside, axis=1) + _energy(x @ w.T + b)


def _react(h, x, w, b, y):
    return _energy(np.minimum(x, np.sort(h.ravel())[round(0.9 * h.size) - 1]) @ w.T + b)


def _ash(h, x, w, b, y):
    kept = x * (x >= np.sort(x, axis=1)[:, -1:])
    return _energy((kept * np.exp(x.sum(1) / kept.sum(1))[:, None]) @ w.T + b)


def _odin(h, x, w, b, y):
    """The gradient by finite differences, of features in units of their deviation."""
    unit, step, moved = h.std(0), 1e-4, x.copy()
    for j in range(x.shape[1]):
        move = step * unit[j] * np.eye(x.shape[1])[j]
        up, down = (_softmax(((x + sign * move) @ w.T + b) / 1000).max(1) for sign in (1, -1))
        moved[:, j] += 0.0014 * unit[j] * np.sign(up - down)
    return -_softmax((moved @ w.T + b) / 1000).max(1)


def _squares(h, x, centre, inverse):
    return np.array([(row - centre) @ inverse @ (row - centre) for row in x])


def _mahalanobis(h, x, w, b, y):
    means = [h[y == c].mean(0) for c in range(3)]
    inverse = np.linalg.inv(sum(np.cov(h[y == c].T, bias=True) * (y == c).mean() for c in range(3)))
    return np.min([_squares(h, x, mean, inverse) for mean in means], axis=0)


def _relative(h, x, w, b, y):
    return _mahalanobis(h, x, w, b, y) - _squares(h, x, h.mean(0), np.linalg.inv(np.cov(h.T, bias=True)))


def _knn(h, x, w, b, y):
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (h, x)]
    return np.array([np.sort(np.linalg.norm(unit[0] - row, axis=1))[49] for row in unit[1]])


FORMULAS = {
    "msp": lambda h, x, w, b, y: -_softmax(x @ w.T + b).max(1),
    "max_logit": lambda h, x, w, b, y: -(x @ w.T + b).max(1),
    "energy": lambda h, x, w, b, y: _energy(x @ w.T + b),
    "odin": _odin,
    "mahalanobis": _mahalanobis,
    "relative_mahalanobis": _relative,
    "knn": _knn,
    "vim": _vim,
    "react": _react,
    "ash": _ash,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_each_score_is_its_formula(name):
    h, x, w, b, y = _numpy_setup()
    found = SCORES[name]().fit(h, y, w, b).score(x)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), FORMULAS[name](h, x, w, b, y), rtol=1e-6, atol=1e-6)
    assert set(SCORES) - set(FORMULAS) == {"combined"}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_low_precision_is_near(name, dtype):
    h, x, w, b, y = _numpy_setup()
    cast = [torch.from_numpy(part).to(dtype) for part in (h, w, b, x)]
    found = SCORES[name]().fit(cast[0], y, cast[1], cast[2]).score(cast[3])
    exact = SCORES[name]().fit(cast[0].double(), y, cast[1].double(), cast[2].double()).score(cast[3].double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", SCORES)
def test_an_obvious_case_is_higher(name):
    """In-distribution: one of three blocks of features is active, all strongly. OOD: a little of every feature."""
    generator = torch.Generator().manual_seed(0)

    def active(n):
        y = torch.arange(n) % 3
        h = 0.1 * torch.rand(n, 30, generator=generator)
        for c in range(3):
            h[y == c, 10 * c : 10 * c + 10] += 2 + 0.2 * torch.rand(int((y == c).sum()), 10, generator=generator)
        return h, y

    weight = torch.eye(3).repeat_interleave(10, 1)
    inside, labels = active(300)
    outside = 0.3 + 0.3 * torch.rand(100, 30, generator=generator)
    if name == "ash":
        # Its scale rewards features that are spread evenly; what is weak all over is higher.
        outside = 0.2 * active(100)[0]
    score = SCORES[name]().fit(inside, labels, weight, torch.zeros(3))
    assert score.score(outside).median() > score.score(active(150)[0]).quantile(0.95)


@pytest.mark.parametrize("name", SCORES)
def test_scores_use_no_global_generator_and_leave_inputs_alone(name):
    features, labels = rows(n=120)
    weight, bias = last_layer()
    before, state = [part.clone() for part in (features, weight, bias)], torch.get_rng_state()
    scores = SCORES[name]().fit(features, labels, weight, bias).score(features)
    assert not scores.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, (features, weight, bias)))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("labels", [["a", "b"] * 60, [float("nan")] * 120, [0.5] * 120])
def test_labels_that_are_no_integers(name, labels):
    features, _ = rows(n=120)
    with pytest.raises(DataError, match="labels"):
        SCORES[name]().fit(features, labels)


@pytest.mark.parametrize("name", SCORES)
def test_no_rows_and_another_bias(name):
    features, labels = rows(n=120)
    weight, _ = last_layer()
    with pytest.raises(DataError, match=r"bias has shape \(2,\); expected \(3,\)"):
        SCORES[name]().fit(features, labels, weight, torch.zeros(2))
    with pytest.raises(DataError, match="features holds 0 rows"):
        SCORES[name]().fit(features[:0], labels[:0], weight)
    with pytest.raises(DataError, match="features holds 0 rows"):
        SCORES[name]().fit(features, labels, weight).score(features[:0])


@pytest.mark.parametrize("name", SCORES)
def test_constant_and_collinear_features_stay_finite(name):
    features, labels = rows(n=120)
    features = torch.cat([features, torch.full((120, 2), 5.0), features[:, :3]], 1)
    scores = SCORES[name]().fit(features, labels).score(features + 0.01)
    assert scores.isfinite().all()


def test_a_class_of_one_row_needs_a_last_layer_for_the_combination():
    """Left out with its fold, the class is gone; a head that is given knows it."""
    features, _ = rows(n=60)
    labels = torch.zeros(60, dtype=torch.long)
    labels[0] = 1
    with pytest.raises(DataError, match="1 class"):
        Combined().fit(features, labels)
    weight, bias = last_layer(classes=2)
    assert Combined().fit(features, labels, weight, bias).score(features).isfinite().all()
