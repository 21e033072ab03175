"""A slow and obvious OjaKV cache: one sequence, one key/value head, one token at a time, float64.

Tokens sit in a list in the order of the text. A token is either whole or a pair of coordinate vectors with the number of
the bases they were written in. Attention rebuilds every key and value. Nothing is shared with the library: bases come
from an SVD of the tokens, orthogonalisation is Gram-Schmidt, rotary embedding is multiplication of complex numbers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Token:
    key: Tensor | None
    value: Tensor | None
    key_code: Tensor | None = None
    value_code: Tensor | None = None
    version: int = -1


def gram_schmidt(matrix: Tensor) -> Tensor:
    """Columns made orthonormal from left to right; a column keeps its direction, so the signs are those of R > 0."""
    done = []
    for column in matrix.double().T:
        for _ in range(2):  # once is not enough in floating point
            for other in done:
                column = column - (other @ column) * other
        done.append(column / column.norm())
    return torch.stack(done, dim=1)


def principal_basis(tokens: Tensor, rank: int) -> Tensor:
    """Right singular vectors of the uncentred tokens `(N, D)`."""
    return torch.linalg.svd(tokens.double(), full_matrices=True).Vh[:rank].T


def second_moment(tokens: Tensor) -> Tensor:
    total = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float64)
    for token in tokens.double():
        total += torch.outer(token, token)
    return total / len(tokens)


def eigenvalue_bound(matrix: Tensor) -> float:
    """The 16-norm of the eigenvalues, which is at least the largest one and at most the trace."""
    return float(torch.linalg.eigvalsh(matrix.double()).clamp_min(0).pow(16).sum().pow(1 / 16))


def oja(basis: Tensor, matrix: Tensor, rate: float, normalize: bool) -> Tensor:
    matrix = matrix / eigenvalue_bound(matrix) if normalize else matrix
    outside = torch.eye(len(matrix), dtype=torch.float64) - basis @ basis.T
    return gram_schmidt(basis + rate * outside @ matrix @ basis)


def hebbian(basis: Tensor, matrix: Tensor, rate: float, normalize: bool) -> Tensor:
    matrix = matrix / eigenvalue_bound(matrix) if normalize else matrix
    return gram_schmidt(basis + rate * matrix @ basis)


def pooled(tokens: Tensor, window: int) -> Tensor:
    means = []
    for start in range(0, len(tokens), window):
        means.append(tokens[start : start + window].double().mean(0))
    return torch.stack(means)


def residual(token: Tensor, basis: Tensor) -> Tensor:
    return token - basis @ (basis.T @ token)


def turn(token: Tensor, place: int, frequencies: Tensor | None, sign: int) -> Tensor:
    """Rotary embedding of one token: entry `i` and entry `i + D / 2` are one complex number."""
    if frequencies is None:
        return token
    half = len(frequencies)
    numbers = torch.complex(token[:half], token[half:])
    angles = sign * place * torch.tensor(frequencies, dtype=torch.float64)
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag])


class ReferenceCache:
    """One head's cache.

    Args:
        ranks: of keys and values.
        frequencies: of the rotary embedding to take off keys before they are compressed, `None` to leave it on.
        start: bases of keys and values to start from, `None` for those of the prompt itself.
    """

    def __init__(
        self,
        ranks,
        *,
        sinks,
        recent,
        interval,
        anchor_ratio=0.0,
        score="residual",
        window=32,
        rule="exact",
        normalize=True,
        prompt_rate=0.1,
        decode_rate=0.05,
        pool=4,
        forgetting=0.9,
        coefficients="versioned",
        tolerance=0.0,
        max_versions=100,
        frequencies=None,
        start=None,
    ):
        self.ranks, self.sinks, self.recent, self.interval = ranks, sinks, recent, interval
        self.anchor_ratio, self.score, self.window = anchor_ratio, score, window
        self.rule, self.normalize, self.pool, self.forgetting = rule, normalize, pool, forgetting
        self.prompt_rate, self.decode_rate = prompt_rate, decode_rate
        self.coefficients, self.tolerance, self.max_versions = coefficients, tolerance, max_versions
        self.frequencies, self.start = frequencies, start
        self.tokens: list[Token] = []
        self.versions: list[list[Tensor]] = []  # [key basis, value basis] of each version
        self.running: list[Tensor] = []
        self.spectra: list[Tensor] = []
        self.newest = 0  # place of the first token that may still be compressed

    def prompt(self, keys: Tensor, values: Tensor, queries: Tensor) -> None:
        """Takes the prompt `(N, D)` in; `queries` `(G, N, D)` of the heads that share these keys."""
        keys, values = keys.double(), values.double()
        self.tokens = [Token(key, value) for key, value in zip(keys, values)]
        if len(keys) > self.sinks + self.recent:
            self._compress_prompt(keys, values, queries.double()[:, -self.window :].reshape(-1, keys.shape[1]))

    def block(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Later tokens `(Q, D)` with their queries `(G, Q, D)`; returns their attention outputs `(G, Q, D)`."""
        start = len(self.tokens)
        self.tokens += [Token(key, value) for key, value in zip(keys.double(), values.double())]
        outputs = torch.stack(
            [torch.stack([self.attend(q, start + i + 1) for i, q in enumerate(head)]) for head in queries.double()]
        )
        self._compress_overflow()
        return outputs

    def attend(self, query: Tensor, length: int) -> Tensor:
        rebuilt = [self.rebuild(place) for place in range(length)]
        logits = torch.stack([query @ key for key, _ in rebuilt]) / math.sqrt(len(query))
        weights = torch.softmax(logits, dim=0)
        return sum(weight * value for weight, (_, value) in zip(weights, rebuilt))

    def rebuild(self, place: int) -> tuple[Tensor, Tensor]:
        token = self.tokens[place]
        if token.key is not None:
            return token.key, token.value
        key_basis, value_basis = self.versions[token.version]
        return turn(key_basis @ token.key_code, place, self.frequencies, 1), value_basis @ token.value_code

    def _low_key(self, place: int) -> Tensor:
        return turn(self.tokens[place].key, place, self.frequencies, -1)

    def _write(self, place: int) -> None:
        token, bases = self.tokens[place], self.versions[-1]
        token.key_code, token.value_code = bases[0].T @ self._low_key(place), bases[1].T @ token.value
        token.key = token.value = None
        token.version = len(self.versions) - 1

    def _compress_prompt(self, keys: Tensor, values: Tensor, queries: Tensor) -> None:
        low_keys = torch.stack([self._low_key(place) for place in range(len(keys))])
        bases = []
        for stream, (tokens, rank) in enumerate(zip((low_keys, values), self.ranks)):
            given = self.start is not None and self.rule != "exact"
            basis = self.start[stream].double()[:, :rank] if given else principal_basis(tokens, rank)
            if self.rule in ("oja", "hebbian") and self.prompt_rate:
                step = oja if self.rule == "oja" else hebbian
                basis = step(basis, second_moment(pooled(tokens, self.pool)), self.prompt_rate, self.normalize)
            bases.append(basis)
            self.spectra.append(torch.linalg.eigvalsh(second_moment(tokens)).flip(0)[:rank])
        self.versions, self.running = [bases], list(bases)
        self.newest = len(keys) - self.recent
        middle = range(self.sinks, self.newest)
        scores = {}
        for place in middle:
            lost = residual(low_keys[place], bases[0])
            if self.score == "residual":
                scores[place] = float(lost.norm())
            else:  # root mean square error of the logits
                scores[place] = math.sqrt(sum(float(q @ lost) ** 2 for q in queries) / len(queries) / keys.shape[1])
        kept = sorted(middle, key=lambda place: (-scores[place], place))[: int(self.anchor_ratio * len(middle))]
        for place in middle:
            if place not in kept:
                self._write(place)

    def _compress_overflow(self) -> None:
        end = len(self.tokens) - self.recent
        if not self.versions or end - self.newest < self.interval:
            return
        leaving = range(self.newest, end)
        low_keys = torch.stack([self._low_key(place) for place in leaving])
        values = torch.stack([self.tokens[place].value for place in leaving])
        self._update((low_keys, values), past=len(self.tokens) - len(leaving))
        lost = {p: float(residual(k, self.versions[-1][0]).norm()) for p, k in zip(leaving, low_keys)}
        kept = sorted(leaving, key=lambda place: (-lost[place], place))[: int(self.anchor_ratio * len(leaving))]
        for place in leaving:
            if place not in kept:
                self._write(place)
        self.newest = end

    def _update(self, streams: tuple[Tensor, Tensor], past: int) -> None:
        if self.rule == "none":
            return
        for index, (tokens, rank) in enumerate(zip(streams, self.ranks)):
            matrix, basis = second_moment(tokens), self.running[index]
            if self.rule == "exact":
                # Of the old covariance only the top eigenpairs were kept. A short past weighs by its length.
                keep = min(self.forgetting, past / (past + len(tokens)))
                old = basis @ torch.diag(self.spectra[index]) @ basis.T
                values, vectors = torch.linalg.eigh(keep * old + (1 - keep) * matrix)
                self.running[index], self.spectra[index] = vectors.flip(1)[:, :rank], values.flip(0)[:rank]
            elif self.decode_rate:
                step = oja if self.rule == "oja" else hebbian
                self.running[index] = step(basis, matrix, self.decode_rate, self.normalize)
        stored = self.versions[-1]
        moved = [
            1 - float((old.T @ new).square().sum()) / old.shape[1] > self.tolerance
            for old, new in zip(stored, self.running)
        ]
        if not any(moved):
            return
        fresh = [new if m else old for m, old, new in zip(moved, stored, self.running)]
        if self.coefficients == "rotate" or len(self.versions) >= self.max_versions:
            for token in self.tokens:
                if token.version == len(self.versions) - 1:
                    token.key_code = fresh[0].T @ (stored[0] @ token.key_code)
                    token.value_code = fresh[1].T @ (stored[1] @ token.value_code)
            self.versions[-1] = fresh
        else:
            self.versions.append(fresh)
