"""Medix as the paper and its code write it: medians of lists, one row left out at a time, one backward pass a row."""

import math

import torch
import torch.nn.functional as F


def lower_median(values):
    """Of a list; the lower of the two middle ones."""
    return sorted(values)[(len(values) - 1) // 2]


def distance(rows, reference):
    """Euclidean distance of the element-wise median of a list of lists to a list."""
    return math.sqrt(sum((lower_median(column) - r) ** 2 for column, r in zip(zip(*rows), reference)))


def deltas(rows, reference):
    """What the distance loses when a row is left out, for each row."""
    whole = distance(rows, reference)
    return [whole - distance(rows[:i] + rows[i + 1 :], reference) for i in range(len(rows))]


def greedy(rows, reference, k, epsilon, max_rounds):
    """Algorithm 1 as released: the test for a stop comes after the removal. Returns indices and rounds."""
    left, taken, previous = list(range(len(rows))), [], 1e-8
    for number in range(1, max_rounds + 1):
        if k >= len(left):
            return taken + left, number
        kept = [rows[i] for i in left]
        now = distance(kept, reference)
        scores = deltas(kept, reference)
        best = sorted(range(len(left)), key=lambda i: -scores[i])[:k]
        taken += [left[i] for i in best]
        left = [row for i, row in enumerate(left) if i not in set(best)]
        if abs(previous - now) < epsilon:
            return taken, number
        previous = now
    return taken, max_rounds


def greedy_default(rows, reference, k, epsilon, max_rounds):
    """The loop of the default mode: the test comes before a removal, and relative to the first distance."""
    left, taken, distances = list(range(len(rows))), [], []
    for number in range(1, max_rounds + 1):
        kept = [rows[i] for i in left]
        distances.append(distance(kept, reference))
        if number > 1 and abs(distances[-2] - distances[-1]) < epsilon * distances[0]:
            return taken, number - 1
        if k >= len(left):
            return taken + left, number
        scores = deltas(kept, reference)
        best = sorted(range(len(left)), key=lambda i: -scores[i])[:k]
        taken += [left[i] for i in best]
        left = [row for i, row in enumerate(left) if i not in set(best)]
    return taken, max_rounds


def last_layer_gradients(features, weight, bias, labels, kind):
    """One backward pass a row, towards the features or the weight."""
    found = []
    for h, label in zip(features, labels):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = F.cross_entropy((w @ h + bias)[None], label[None])
        (gradient,) = torch.autograd.grad(loss, h if kind == "feature" else w)
        found.append(gradient.flatten())
    return torch.stack(found)


def fpr_at_recall(positive, negative, recall=0.95):
    """Share of negatives accepted at the first threshold, from above, whose recall of positives is at least `recall`."""
    for threshold in sorted({*positive, *negative}, reverse=True):
        if sum(value >= threshold for value in positive) / len(positive) >= recall - 1e-12:
            return sum(value >= threshold for value in negative) / len(negative)
    raise AssertionError("the lowest threshold has recall 1")


def auroc(low, high):
    """Share of pairs in the right order, ties count half."""
    pairs = [(a < b) + 0.5 * (a == b) for a in low for b in high]
    return sum(pairs) / len(pairs)


def average_precision(positive, negative):
    """Precision at every threshold, from above, times the recall it gains."""
    total, caught = 0.0, 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        hits = sum(value >= threshold for value in positive)
        false = sum(value >= threshold for value in negative)
        total += (hits / len(positive) - caught) * hits / (hits + false)
        caught = hits / len(positive)
    return total


def prevalence(inside, wild, confidence):
    """1 - F_wild / F_in at the cut where F_wild, with the widths of both bands, is the least part of F_in."""
    n, m = len(inside), len(wild)
    slack = math.sqrt(math.log(4 / confidence) / (2 * n)) + math.sqrt(math.log(4 / confidence) / (2 * m))
    bounds = []
    for cut in sorted(set(inside)):
        below_in = sum(value <= cut for value in inside) / n
        below_wild = sum(value <= cut for value in wild) / m
        bounds.append(((below_wild + slack) / below_in, 1 - below_wild / below_in))
    return min(max(min(bounds, key=lambda bound: bound[0])[1], 0.0), 1.0)
