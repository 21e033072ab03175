"""What the benchmarks of optimizers rest on: true bytes of state, momenta of the ablation, and runs that are told apart."""

import math

import pytest
import torch

from benchmarks import optimizer_ablation as ablation
from benchmarks import optimizer_quality as quality
from benchmarks.optimizer_peers import OURS, PEERS, Peer, sgc, true_state_bytes


@pytest.mark.parametrize(
    ("momentum", "least"),
    [(ablation.Full, 0.95), (ablation.FourBit, 0.95), (ablation.Measured, 0.9), (ablation.FedBack, 0.2)],
)
def test_momenta_stay_bounded_and_follow_the_steps_they_are_fed(momentum, least):
    generator = torch.Generator().manual_seed(0)
    mean = 0.3 * torch.randn(64, 64, generator=generator)
    fed, made, one = torch.zeros(64, 64), torch.zeros(64, 64), momentum()
    for _ in range(60):
        step = mean + torch.randn(64, 64, generator=generator)
        moved = one(step)
        fed += step
        made += moved
        assert float(moved.norm()) < 2 * float(step.norm())
    assert float((fed * made).sum() / fed.norm() / made.norm()) > least
    assert float(made.norm() / fed.norm()) < 1.1


def test_bytes_are_counted_wherever_they_are_kept():
    class Projector:
        def __init__(self):
            self.basis = torch.zeros(10, 3)

    weight = torch.nn.Parameter(torch.zeros(128, 128))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert true_state_bytes(optimizer) == 0
    optimizer.state[weight]["projector"] = Projector()
    optimizer.state[weight]["view"] = torch.zeros(100)[:7]
    optimizer.state[weight]["same"] = optimizer.state[weight]["view"][:2]
    assert true_state_bytes(optimizer) == 4 * (30 + 100)


def test_a_four_bit_momentum_keeps_half_a_byte_a_weight():
    weight = torch.nn.Parameter(torch.randn(128, 128))
    settings = {"lr": 1e-3, "directions": 0}
    plain = ablation.SGCAdamW([{"params": [weight]}], **settings)
    coded = ablation.StepMomentum([{"params": [weight]}], ablation.FourBit, **settings)
    for optimizer in (plain, coded):
        weight.grad = torch.randn(128, 128)
        optimizer.step()
    scales = 4 * 128 * 128 // ablation.BITS_BLOCK
    assert true_state_bytes(coded) - true_state_bytes(plain) == 128 * 128 // 2 + scales


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A lab whose runs take no time: the loss depends on the rate and the settings alone."""
    trained = []

    def train(model, optimizer, *rest):
        trained.append(optimizer.defaults.get("directions"))
        model.outcome = abs(math.log10(optimizer.param_groups[0]["lr"]) + 2.6)
        return True

    for name in ("build", "start"):
        monkeypatch.setattr(quality, name, lambda *names: torch.nn.Linear(16, 16))
    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "sequences", lambda *names: torch.zeros(1, 4))
    monkeypatch.setattr(quality.small_finetunes, "loss", lambda model, batches: model.outcome)
    made = quality.Lab("scratch", "1m", 10, 4, tmp_path)
    made.trained = trained
    return made


def plain(**settings):
    return Peer(lambda model, rate: ablation.SGCAdamW(model.parameters(), lr=rate, **settings), 5e-2, 5e-2)


def test_a_run_is_kept_and_counts_for_its_settings_and_arithmetic_alone(lab, monkeypatch):
    lab.run(OURS, plain(), 5e-3, 0)
    lab.run(OURS, plain(), 5e-3, 0)
    assert lab.trained == [None]
    lab.run(OURS, plain(directions=3), 5e-3, 0)
    assert lab.trained == [None, 3]
    assert lab.run("another name", plain(), 5e-3, 0)["method"] == "another name"
    assert lab.trained == [None, 3]
    monkeypatch.setitem(quality.ARITHMETIC, "factored", 1000)
    lab.run(OURS, plain(), 5e-3, 0)
    assert lab.trained == [None, 3, None]


def test_a_search_goes_on_where_the_best_rate_is_at_an_edge(lab):
    lab.search(OURS, plain())  # from 0.02, 0.05, 0.1 down to the best at 0.002
    tried = sorted(run["rate"] for run in lab.runs())
    assert tried == [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    assert lab.best_rate(OURS) == 2e-3
    rows = quality.read_rows(lab.grid_path)
    assert [row.value for row in rows if row.metric == "best rate"] == [2e-3]
    assert len([row for row in rows if row.metric.startswith("held-out loss")]) == len(tried)


def test_rows_have_the_difference_to_ours_of_the_same_seed(lab):
    for name, rate in ((OURS, 2e-3), ("peer", 1e-2)):
        for seed in range(2):
            lab.run(name, plain(directions=seed), rate, seed)
    lab.write({"peer": 1e-2})
    rows = {row.metric: row for row in quality.read_rows(lab.rows_path)}
    expected = (math.log10(1e-2) + 2.6) - abs(math.log10(2e-3) + 2.6)
    assert rows["loss above sgc"].value == pytest.approx(expected)
    assert rows["loss above sgc"].n == 2


def test_every_peer_that_needs_no_package_is_made_with_decay_on_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    for name, peer in PEERS.items():
        if peer.needs or "budget" in name:
            continue
        groups = peer.make(model, 1e-3).param_groups
        assert [group["weight_decay"] for group in groups] == [0.01, 0.0], name
        assert [tuple(p.shape) for p in groups[0]["params"]] == [(8, 8)], name


def test_a_budget_is_a_share_of_adamw(lab):
    model = torch.nn.Linear(512, 512)
    optimizer = sgc(0.005)(model, 1e-3)
    model(torch.randn(2, 512)).sum().backward()
    optimizer.step()
    assert optimizer.state_bytes() <= 0.005 * 8 * (512 * 512 + 512)
