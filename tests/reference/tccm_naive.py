"""TCCM as the paper writes it: a row, a network and a feature at a time, in float64. Slow and obvious, an oracle for tests.

Time is embedded and concatenated, not folded into a bias; neighbours are found by sorting all distances; a network is three
`nn.Linear`; p-values are counted.
"""

import math

import numpy as np
import torch
from torch import nn


FLOOR = 0.05


def embed_time(t, size):
    half = size // 2
    frequencies = [math.exp(-math.log(10_000.0) * i / half) for i in range(half)]
    return np.array([math.sin(t * w) for w in frequencies] + [math.cos(t * w) for w in frequencies])


def standardise(model, row):
    mean, scale = model.mean.numpy(), model.scale.numpy()
    return np.array([(float(x) - m) / s for x, m, s in zip(row, mean, scale)])


def network(model, member, z, t):
    """f of one member at one standardised row and time."""
    x = z
    if model.config.time_embedding == "sinusoidal":
        x = np.concatenate([z, embed_time(t, model.config.time_embedding_size)])
    for layer in range(3):
        weight = model.net.weights[layer][member].detach().double().numpy()
        bias = model.net.biases[layer][member, 0].detach().double().numpy()
        x = np.array([sum(x[i] * weight[i, o] for i in range(len(x))) + bias[o] for o in range(len(bias))])
        if layer < 2:
            x = np.maximum(x, 0)
    return x


def residual(model, member, z):
    scale = model.residual_scale[member, 0].double().numpy()
    return (network(model, member, z, 1.0) + z) / scale


def distance(z, references, k):
    """Root mean square of the distances to the k nearest references, one equal to the row left out."""
    squares = sorted(sum((a - b) ** 2 for a, b in zip(z, reference)) for reference in references)
    squares = squares[1:] if squares[0] == 0 else squares
    return math.sqrt(sum(squares[:k]) / k)


def score(model, row):
    """The score of one row in the table's units."""
    config, z = model.config, standardise(model, row)
    norms = [math.sqrt(sum(residual(model, member, z) ** 2)) for member in range(config.members)]
    r = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    references = model.references.double().numpy()
    k = min(config.neighbors, len(references) - 1)
    if config.mode == "paper" and k < 1:
        return r
    # References are kept in float32; only there is a row equal to itself.
    d = distance(z.astype(np.float32).astype(np.float64), references, k) if k >= 1 else 1.0
    medians, w = model.medians.double().numpy(), config.residual_weight
    parts = [math.sqrt((value / median) ** 2 + FLOOR**2) for value, median in zip((d, r), medians)]
    return parts[0] ** (1 - w) * parts[1] ** w


def train(config, z):
    """Every member alone, as three `nn.Linear` and an Adam of its own; the draws of `TCCMModel.fit`. Returns the networks."""
    n, m = len(z), config.members
    starts = torch.Generator().manual_seed(config.seed)
    sizes = [config.feature_size + config.embedding_size, config.hidden_size, config.hidden_size, config.feature_size]
    layers = [[nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:])] for _ in range(m)]
    for place, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        weights = (torch.rand(m, fan_in, fan_out, generator=starts) * 2 - 1) / math.sqrt(fan_in)
        biases = (torch.rand(m, 1, fan_out, generator=starts) * 2 - 1) / math.sqrt(fan_in)
        for member in range(m):
            layers[member][place].weight.data = weights[member].T.contiguous()
            layers[member][place].bias.data = biases[member, 0]
    nets = [nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c) for a, b, c in layers]
    optimizers = [torch.optim.Adam(net.parameters(), lr=config.learning_rate) for net in nets]
    draws = torch.Generator().manual_seed(config.seed)
    batch, done = min(config.batch_size, n), 0
    steps = config.steps if config.steps is not None else config.epochs * math.ceil(n / batch)
    while done < steps:
        orders = torch.rand(m, n, generator=draws).argsort(1)
        for start in range(0, n, batch):
            if done == steps:
                break
            times = torch.rand(m, min(batch, n - start), 1, generator=draws)
            for member in range(m):
                losses = []
                for row, t in zip(orders[member, start : start + batch].tolist(), times[member, :, 0].tolist()):
                    time = torch.tensor(embed_time(t, config.embedding_size), dtype=torch.float32)
                    losses.append(((nets[member](torch.cat([z[row], time])) + z[row]) ** 2).mean())
                kept = sorted(losses, key=lambda loss: loss.item())[: len(losses) - int(config.trim * len(losses))]
                optimizers[member].zero_grad()
                (sum(kept) / len(kept)).backward()
                optimizers[member].step()
            done += 1
    return nets


def p_value(score, calibration):
    return (1 + sum(other >= score for other in calibration)) / (len(calibration) + 1)


def discoveries(p_values, rate):
    """Benjamini and Hochberg: all up to the largest k with p_(k) <= k rate / n."""
    ordered = sorted(p_values)
    limits = [p for k, p in enumerate(ordered, 1) if p <= k * rate / len(ordered)]
    return [bool(limits) and p <= limits[-1] for p in p_values]


def conditional_gains(z, covariance, ridge, prior_precision):
    """Gains of one row's features: each shift found is a variance added to its feature, and all is inverted anew."""
    d = len(z)
    total, gains, left = covariance + ridge * np.eye(d), np.zeros(d), list(range(d))
    while left:
        precision = np.linalg.inv(total)
        u = precision @ z
        found = {j: u[j] ** 2 / (precision[j, j] + prior_precision) for j in left}
        best = max(left, key=found.get)
        gains[best] = found[best]
        total[best, best] += 1 / prior_precision
        left.remove(best)
    return gains


def auroc(normal, abnormal):
    """Share of pairs in the right order, ties a half."""
    normal, abnormal = np.asarray(normal), np.asarray(abnormal)
    wins = (abnormal[:, None] > normal[None]).mean() + (abnormal[:, None] == normal[None]).mean() / 2
    return float(wins)
