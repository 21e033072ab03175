"""The pure functions behind OjaKV: bases, scores, ranks, rows and the rotary embedding."""

import itertools
import math

import pytest
import torch

from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.rope import ROTARY_MODELS, Rope
from hf_ext.cache_impls.rows import leading_pads, split_top, take
from hf_ext.errors import CacheStateError, UnsupportedModelError
from hf_ext.tiny import tiny_config, tiny_model
from tests.reference.ojakv import eigenvalue_bound, gram_schmidt, hebbian, oja, pooled, second_moment


def cloud(batch=2, heads=2, length=200, dim=16, scale=1.0, seed=0):
    """Tokens whose covariance has eigenvalues falling by a factor of about four hundred."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(batch, heads, dim, dim, generator=generator)).Q
    spread = torch.logspace(0.5, -0.8, dim) * scale
    return torch.randn(batch, heads, length, dim, generator=generator) * spread @ axes.mT


def orthonormal(batch=2, heads=2, dim=16, rank=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(batch, heads, dim, rank, generator=generator)).Q


def energy(basis, matrix):
    """Trace of the covariance inside the span, per row and head."""
    return (basis.mT @ matrix @ basis).diagonal(dim1=-2, dim2=-1).sum(-1)


def lost_share(basis, tokens):
    return float((tokens - tokens @ basis @ basis.mT).square().sum() / tokens.square().sum())


def skewness(basis):
    return float((basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max())


def test_covariance_is_the_mean_outer_product_of_the_valid_tokens():
    tokens, valid = cloud(length=11), torch.ones(2, 11, dtype=torch.bool)
    valid[1, :4] = False
    found = subspace.covariance(tokens, valid)
    for row, head in itertools.product(range(2), range(2)):
        expected = second_moment(tokens[row, head, 4 if row else 0 :]).float()
        torch.testing.assert_close(found[row, head], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(subspace.covariance(tokens)[0], found[0], atol=1e-6, rtol=1e-6)
    assert subspace.covariance(tokens.bfloat16()).dtype == torch.float32


def test_no_basis_of_the_same_rank_holds_more_than_top_basis():
    matrix = subspace.covariance(cloud())
    basis, values = subspace.top_basis(matrix, 5)
    assert skewness(basis) < 1e-5
    torch.testing.assert_close(energy(basis, matrix), values[..., :5].sum(-1), atol=1e-4, rtol=1e-5)
    assert (values.diff(dim=-1) <= 0).all()
    for seed in range(30):
        assert (energy(orthonormal(seed=seed), matrix) <= energy(basis, matrix) + 1e-4).all()
        near = subspace.orthonormalize(basis + 0.05 * orthonormal(seed=seed))
        assert (energy(near, matrix) <= energy(basis, matrix) + 1e-4).all()


def test_exact_low_rank_tokens_lose_nothing():
    tokens = cloud(dim=5) @ orthonormal().mT
    basis, values = subspace.top_basis(subspace.covariance(tokens), 5)
    assert lost_share(basis, tokens) < 1e-10
    assert float(values[..., 5:].max()) < 1e-4


def test_orthonormalize_is_gram_schmidt_with_signs():
    matrix = torch.randn(2, 3, 16, 5)
    found = subspace.orthonormalize(matrix)
    for row, head in itertools.product(range(2), range(3)):
        torch.testing.assert_close(found[row, head], gram_schmidt(matrix[row, head]).float(), atol=1e-5, rtol=0)
    basis = orthonormal()
    torch.testing.assert_close(subspace.orthonormalize(basis), basis, atol=1e-5, rtol=0)
    nudged = subspace.orthonormalize(basis + 1e-4 * torch.randn_like(basis))
    assert float((nudged - basis).abs().max()) < 1e-3, "a small change of the input moved the basis far"


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_largest_eigenvalue_is_bounded_closely_from_above(scale):
    matrix = subspace.covariance(cloud()) * scale
    bound = subspace.largest_eigenvalue(matrix)[..., 0, 0]
    values = torch.linalg.eigvalsh(matrix)
    assert (bound >= values[..., -1] * (1 - 1e-5)).all()
    assert (bound <= 1.2 * values[..., -1]).all()
    assert (bound <= values.sum(-1) * (1 + 1e-5)).all()
    assert float(bound[0, 0]) == pytest.approx(eigenvalue_bound(matrix[0, 0]), rel=1e-4)


def test_largest_eigenvalue_of_nothing_does_not_divide_by_zero():
    basis = orthonormal()
    for step in (subspace.oja_step, subspace.hebbian_step):
        moved = step(basis, torch.zeros(2, 2, 16, 16), 0.5)
        torch.testing.assert_close(moved, basis, atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.1, 3.0])
def test_steps_follow_the_formula(rate, normalize):
    basis, matrix = orthonormal(), subspace.covariance(cloud())
    for step, slow in ((subspace.oja_step, oja), (subspace.hebbian_step, hebbian)):
        found = step(basis, matrix, rate, normalize)
        for row, head in itertools.product(range(2), range(2)):
            expected = slow(basis[row, head].double(), matrix[row, head].double(), rate, normalize)
            torch.testing.assert_close(found[row, head].double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rate", [0.05, 0.5, 20.0, 1e4])
def test_hebbian_never_holds_less_than_before_and_ends_at_the_optimum(rate):
    matrix = subspace.covariance(cloud())
    basis, best = orthonormal(), energy(subspace.top_basis(matrix, 5)[0], matrix)
    now = energy(basis, matrix)
    for _ in range(400):
        basis = subspace.hebbian_step(basis, matrix, rate)
        before, now = now, energy(basis, matrix)
        assert (now >= before - 1e-5 * best).all(), "a step lost energy on a stationary covariance"
        assert (now <= best * (1 + 1e-5)).all()
    if rate > 0.1:
        torch.testing.assert_close(now, best, atol=0, rtol=1e-3)


def test_the_literal_rule_destroys_a_good_basis_and_the_normalised_one_improves_it():
    """The trap: the step adds only what lies outside the span, so a large rate swaps the subspace for a worse one."""
    tokens = cloud(length=400, scale=4)
    matrix = subspace.covariance(tokens)
    rate = 0.1
    assert float(rate * torch.linalg.eigvalsh(matrix)[..., -1].min()) >= 10
    basis = subspace.orthonormalize(subspace.top_basis(matrix, 5)[0] + 0.1 * orthonormal())
    start, best = lost_share(basis, tokens), lost_share(subspace.top_basis(matrix, 5)[0], tokens)
    literal = lost_share(subspace.oja_step(basis, matrix, rate, normalize=False), tokens)
    assert literal > 1.5 * start, f"the literal rule should do harm: {start:.4f} -> {literal:.4f}"
    for step in (subspace.oja_step, subspace.hebbian_step):
        assert best <= lost_share(step(basis, matrix, rate), tokens) < start
    assert best <= lost_share(subspace.hebbian_step(basis, matrix, rate, normalize=False), tokens) < start


@pytest.mark.parametrize("step", [subspace.oja_step, subspace.hebbian_step])
@pytest.mark.parametrize("normalize", [True, False])
def test_bases_stay_orthonormal_over_hundreds_of_updates(step, normalize):
    basis = orthonormal()
    for seed in range(300):
        basis = step(basis, subspace.covariance(cloud(length=8, seed=seed)), 0.5, normalize)
    assert skewness(basis) < 1e-5


def test_blended_bases_stay_orthonormal_and_in_order():
    matrix = subspace.covariance(cloud())
    basis, values = subspace.top_basis(matrix, 5)
    spectrum = values[..., :5]
    for seed in range(300):
        blended = subspace.blend(basis, spectrum, subspace.covariance(cloud(length=8, seed=seed)), 0.9)
        basis, values = subspace.top_basis(blended, 5)
        spectrum = values[..., :5]
    assert skewness(basis) < 1e-5
    assert (spectrum.diff(dim=-1) <= 1e-4).all()


def test_blend_is_the_weighted_sum_with_what_was_kept():
    old, new = subspace.covariance(cloud()), subspace.covariance(cloud(seed=7))
    basis, values = subspace.top_basis(old, 16)
    torch.testing.assert_close(subspace.blend(basis, values, new, 0.7), 0.7 * old + 0.3 * new, atol=1e-4, rtol=1e-4)
    cut = subspace.blend(basis[..., :5], values[..., :5], new, 0.7)
    kept = basis[..., :5] @ torch.diag_embed(values[..., :5]) @ basis[..., :5].mT
    torch.testing.assert_close(cut, 0.7 * kept + 0.3 * new, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(subspace.blend(basis[..., :5], values[..., :5], new, 0.0), new, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 4, 11, 12])
@pytest.mark.parametrize("window", [1, 4, 5])
def test_pooling_averages_each_window_over_what_it_has(length, window):
    tokens = cloud(length=length)
    found = subspace.mean_pool(tokens, window)
    assert found.shape == (2, 2, math.ceil(length / window), 16)
    for row, head in itertools.product(range(2), range(2)):
        torch.testing.assert_close(found[row, head], pooled(tokens[row, head], window).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pads", [1, 4, 6])
def test_pooling_leaves_padding_out_of_the_means(pads):
    tokens, valid = cloud(length=11), torch.arange(11) >= torch.tensor([0, pads])[:, None]
    found = subspace.mean_pool(tokens, 4, valid)
    for index, start in enumerate(range(0, 11, 4)):
        real = [place for place in range(start, min(start + 4, 11)) if place >= pads]
        expected = tokens[1, :, real].mean(1) if real else torch.zeros(2, 16)
        torch.testing.assert_close(found[1, :, index], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0], subspace.mean_pool(tokens, 4)[0], atol=1e-6, rtol=1e-6)


def test_drift_is_zero_for_the_same_span_and_one_for_the_opposite():
    basis = orthonormal(rank=8)
    rotation = torch.linalg.qr(torch.randn(2, 2, 8, 8)).Q
    assert float(subspace.drift(basis, basis @ rotation).abs().max()) < 1e-5
    full = torch.linalg.qr(torch.randn(16, 16)).Q
    assert float(subspace.drift(full[:, :8], full[:, 8:])) == pytest.approx(1, abs=1e-5)
    assert float(subspace.drift(full[:, :4], full[:, 2:6])) == pytest.approx(0.5, abs=1e-5)


def test_energy_rank_is_the_smallest_rank_that_keeps_the_share_in_every_head():
    spectrum = subspace.top_basis(subspace.covariance(cloud()), 16)[1]
    for share in (0.3, 0.9, 0.99, 1.0):
        rank = subspace.energy_rank(spectrum, share)
        kept = spectrum[..., :rank].sum(-1) / spectrum.sum(-1)
        assert (kept >= share - 1e-6).all()
        if rank > 1:
            assert (spectrum[..., : rank - 1].sum(-1) / spectrum.sum(-1) < share).any()
    assert subspace.energy_rank(torch.tensor([4.0, 0.0, 0.0]), 0.9) == 1
    assert subspace.energy_rank(torch.tensor([4.0, 4.0, 2.0]), 0.8) == 2
    assert subspace.energy_rank(torch.tensor([4.0, 4.0, 2.0]), 1.0) == 3


def best_split(spectra, costs, budget):
    """Least energy left behind over every way to share the ranks."""
    ways = itertools.product(*(range(1, len(spectrum) + 1) for spectrum in spectra))
    affordable = (way for way in ways if sum(rank * cost for rank, cost in zip(way, costs)) <= budget)
    return min(sum(float(s[rank:].sum()) for s, rank in zip(spectra, way)) for way in affordable)


@pytest.mark.parametrize("budget", [3.0, 5.0, 8.0, 11.0, 15.0, 40.0])
def test_water_fill_equals_brute_force_at_equal_costs(budget):
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        spectra = [torch.rand(n, generator=generator).sort(descending=True).values for n in (4, 6, 5)]
        ranks = subspace.water_fill(spectra, [1.0, 1.0, 1.0], budget)
        left = sum(float(s[rank:].sum()) for s, rank in zip(spectra, ranks))
        assert left == pytest.approx(best_split(spectra, [1.0] * 3, budget), abs=1e-5)
        assert all(1 <= rank <= len(s) for s, rank in zip(spectra, ranks))
        assert sum(ranks) == min(budget, 15)


@pytest.mark.parametrize("budget", [7.0, 12.0, 17.0, 24.0])
def test_water_fill_at_unequal_costs_misses_the_optimum_by_less_than_one_eigenvalue(budget):
    costs = [1.0, 2.0, 3.0]
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        spectra = [torch.rand(5, generator=generator).sort(descending=True).values for _ in costs]
        ranks = subspace.water_fill(spectra, costs, budget)
        assert sum(rank * cost for rank, cost in zip(ranks, costs)) <= budget
        left = sum(float(s[rank:].sum()) for s, rank in zip(spectra, ranks))
        best = best_split(spectra, costs, budget)
        largest = max(float(s[1:].max()) for s in spectra)
        assert best - 1e-5 <= left <= best + largest


def test_water_fill_takes_the_larger_gain_per_byte_first():
    spectra = [torch.tensor([9.0, 4.0, 4.0]), torch.tensor([9.0, 6.0, 6.0])]
    assert subspace.water_fill(spectra, [1.0, 1.0], 4) == [1, 3]
    assert subspace.water_fill(spectra, [1.0, 2.0], 5) == [3, 1], "6 for two bytes is less than 4 for one"


@pytest.mark.parametrize("scaling", [0.25, 0.1])
def test_logit_error_and_residual_norm_equal_those_of_the_residual_itself(scaling):
    keys, queries, basis = cloud(length=30), cloud(heads=6, length=9, seed=3), orthonormal()
    lost = keys - keys @ basis @ basis.mT
    torch.testing.assert_close(subspace.residual_norm(keys, basis), lost.norm(dim=-1), atol=2e-3, rtol=1e-3)
    found = subspace.logit_error(queries, keys, basis, scaling)
    grouped = queries.view(2, 2, 3, 9, 16)
    for row, head, token in itertools.product(range(2), range(2), range(30)):
        squares = [float(q @ lost[row, head, token]) ** 2 for g in grouped[row, head] for q in g]
        expected = scaling * math.sqrt(sum(squares) / len(squares))
        assert float(found[row, head, token]) == pytest.approx(expected, abs=1e-4, rel=1e-3)


def test_no_logit_is_off_by_more_than_the_norms_allow():
    keys, queries, basis = cloud(length=50), cloud(length=20, seed=4), orthonormal()
    error = (queries @ keys.mT - (queries @ basis) @ (keys @ basis).mT).abs() / 4
    bound = queries.norm(dim=-1)[..., :, None] * subspace.residual_norm(keys, basis)[..., None, :] / 4
    assert (error <= bound + 1e-3).all()
    assert float((error / bound.clamp_min(1e-3)).max()) > 0.3, "the bound is loose everywhere: wrong scale"


def test_residual_norm_of_tokens_inside_the_span_is_zero_not_nan():
    basis = orthonormal()
    inside = torch.randn(2, 2, 30, 5) @ basis.mT
    found = subspace.residual_norm(inside, basis)
    assert found.isfinite().all()
    assert float(found.max()) < 5e-3


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("places", [[9, 10, 11, 12, 13], [0, 4, 7, 13]])
def test_token_attention_is_the_mean_causal_softmax_over_the_later_queries(groups, places):
    keys, queries = cloud(length=14), cloud(heads=2 * groups, length=len(places), seed=6)
    valid = torch.arange(14) >= torch.tensor([0, 6])[:, None]
    found = subspace.token_attention(queries, torch.tensor(places), keys, 0.25, valid)
    for row, head in itertools.product(range(2), range(2)):
        total, count = torch.zeros(14), torch.zeros(14)
        for group, (index, place) in itertools.product(range(groups), enumerate(places)):
            if not valid[row, place]:
                continue
            shown = valid[row] & (torch.arange(14) <= place)
            logits = 0.25 * keys[row, head] @ queries[row, head * groups + group, index]
            total += torch.softmax(logits.masked_fill(~shown, -torch.inf), 0)
            count += shown
        torch.testing.assert_close(found[row, head], total / count.clamp_min(1), atol=1e-5, rtol=1e-4)
    bare = subspace.token_attention(queries, torch.tensor(places), keys, 0.25)
    torch.testing.assert_close(bare[0], found[0], atol=1e-6, rtol=1e-6)


def test_relative_residuals_weigh_the_streams_alike():
    streams, bases = [cloud(length=30), cloud(length=30, seed=2)], [orthonormal(), orthonormal(seed=3)]
    found = subspace.relative_residual(streams, bases)
    norms = [(x - x @ u @ u.mT).norm(dim=-1) for x, u in zip(streams, bases)]
    expected = sum(norm / norm.mean(-1, keepdim=True) for norm in norms)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    scaled = subspace.relative_residual([100 * streams[0], streams[1]], bases)
    torch.testing.assert_close(scaled, found, atol=1e-3, rtol=1e-3)


def test_split_top_sorts_slots_and_gives_ties_to_the_earlier():
    scores = torch.tensor([[[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]]])
    top, rest = split_top(scores, 3)
    assert top.tolist() == [[[1, 2, 3]]]
    assert rest.tolist() == [[[0, 4, 5]]]
    top, rest = split_top(torch.zeros(2, 2, 40), 7)
    assert (top == torch.arange(7)).all()
    assert (rest == torch.arange(7, 40)).all()
    assert split_top(scores, 0)[0].shape == (1, 1, 0)
    assert split_top(scores, 6)[1].shape == (1, 1, 0)


def test_take_reads_places_shared_by_heads_or_of_each_head():
    tokens = torch.randn(2, 3, 10, 4)
    places = torch.tensor([[0, 9], [3, 3]])
    assert torch.equal(take(tokens, places)[1], tokens[1][:, [3, 3]])
    own = torch.randint(0, 10, (2, 3, 5))
    for row, head in itertools.product(range(2), range(3)):
        assert torch.equal(take(tokens, own)[row, head], tokens[row, head, own[row, head]])


@pytest.mark.parametrize("additive", [False, True])
def test_leading_pads_are_counted_from_the_last_query(additive):
    valid = torch.arange(8) >= torch.tensor([0, 3, 8 - 1])[:, None]
    mask = (valid[:, None, None] & (torch.arange(8) <= torch.arange(8)[:, None])).clone()
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    assert leading_pads(given, 8).tolist() == [0, 3, 7]
    assert leading_pads(None, 8) is None
    assert leading_pads(given[:1], 8) is None


def test_masked_tokens_elsewhere_than_in_front_are_refused():
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[1, ..., 6:] = False
    with pytest.raises(CacheStateError, match="padding_side='left'"):
        leading_pads(mask, 8)


@pytest.mark.parametrize("arch", ["llama", "llama_head80", "qwen3", "phi3", "mistral"])
def test_rope_is_the_models_own_and_can_be_taken_off(arch):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny_model(arch)
    dim = getattr(model.config, "head_dim", None) or 16
    keys = torch.randn(2, 2, 9, dim)
    positions = torch.stack([torch.arange(9), torch.arange(9) + 500])
    cos, sin = model.model.rotary_emb(keys, positions)
    expected = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    rope = Rope(model.config)
    rotated = rope.rotate(keys, positions)
    torch.testing.assert_close(rotated, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rope.rotate(rotated, positions, sign=-1), keys, atol=1e-4, rtol=0)
    per_head = positions[:, None].expand(2, 2, 9)
    assert torch.equal(rope.rotate(keys, per_head), rotated)


def test_rope_keeps_the_scaled_frequencies_of_llama3():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = tiny_config("llama", rope_parameters=scaled)
    found = torch.as_tensor(Rope(config).inv_freq)
    assert torch.equal(found, LlamaRotaryEmbedding(config).inv_freq)
    assert not torch.equal(found, torch.as_tensor(Rope(tiny_config("llama")).inv_freq))


@pytest.mark.parametrize("arch", ["gpt_neox", "cohere", "gemma3_text", "smollm3", "phi"])
def test_an_unknown_rotary_embedding_is_refused_by_name(arch):
    config = tiny_config(arch)
    assert config.model_type not in ROTARY_MODELS
    with pytest.raises(UnsupportedModelError, match=rf"{config.model_type}.*key_space='post'"):
        Rope(config)


def test_a_rope_type_that_depends_on_the_length_is_refused():
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="rope type dynamic"):
        Rope(tiny_config("llama", rope_parameters=parameters))
