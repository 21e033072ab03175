"""Random linear measurements of chunks, `y = A x` for many chunks at once, and how sparse chunks are found again in them.

`A` has `K` rows and `N` columns of unit length. It is never stored: `(kind, K, N, seed)` describe it, a generator on the
CPU draws it, so it is the same on every device, and `checksum` tells whether it is the one a state was measured with.

Shapes: `C` chunks, `N` entries a chunk, `K` measurements, `S` entries of a support.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_ext.errors import ConfigError


KINDS = ("gaussian", "srht", "countsketch")
# Non-zero entries of a count-sketch column: with one, two entries of a chunk that fall into the same row are one.
HASHES = 4
# Added to normal equations that have no decomposition without it; columns have unit length.
SAFE_RIDGE = 1e-3


class Measurement:
    """One matrix `A` of a kind.

    Args:
        kind (`str`):
            `"gaussian"` keeps a dense matrix; `"srht"` (signs, Walsh-Hadamard transform, a choice of rows) and
            `"countsketch"` (`HASHES` signed entries a column) keep a few numbers a column.
        k (`int`): Rows.
        chunk_size (`int`): Columns. A power of two for `"srht"`.
        seed (`int`): Of the generator.
        device (`torch.device`, *optional*): Where chunks will be.

    Raises:
        ConfigError: an unknown kind, or numbers that make no such matrix.
    """

    def __init__(self, kind: str, k: int, chunk_size: int, seed: int, device: torch.device | None = None) -> None:
        if kind not in KINDS:
            raise ConfigError(f"measurement={kind!r}; expected one of {', '.join(KINDS)}.")
        if not 0 < k <= chunk_size:
            raise ConfigError(f"k={k} with chunk_size={chunk_size}; a chunk takes 1 to {chunk_size} measurements.")
        self.kind, self.k, self.chunk_size = kind, k, chunk_size
        generator = torch.Generator().manual_seed(seed)
        made = getattr(self, f"_make_{kind}")(generator)
        head = torch.cat([tensor.double().flatten()[:4] for tensor in made.values()])
        self.checksum = [*head.tolist(), sum(float(tensor.double().sum()) for tensor in made.values())]
        self._parts = {name: tensor.to(device) for name, tensor in made.items()}

    @property
    def nbytes(self) -> int:
        """Bytes that stay alive as long as this object."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._parts.values())

    def project(self, x: Tensor) -> Tensor:
        """`(C, N)` chunks to `(C, K)` measurements."""
        return getattr(self, f"_project_{self.kind}")(x)

    def correlate(self, y: Tensor) -> Tensor:
        """`(C, K)` to `(C, N)`: the products of all columns with `y`."""
        return getattr(self, f"_correlate_{self.kind}")(y)

    def gram(self) -> Tensor:
        """`(N, N)` products of all columns with each other. Made anew at each call: it would outweigh the state."""
        eye = torch.eye(self.chunk_size, device=next(iter(self._parts.values())).device)
        columns = self.project(eye)
        return columns @ columns.T

    def _make_gaussian(self, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = torch.randn(self.k, self.chunk_size, generator=generator)
        return {"matrix": drawn / drawn.norm(dim=0)}

    def _project_gaussian(self, x: Tensor) -> Tensor:
        return x @ self._parts["matrix"].T

    def _correlate_gaussian(self, y: Tensor) -> Tensor:
        return y @ self._parts["matrix"]

    def _make_srht(self, generator: torch.Generator) -> dict[str, Tensor]:
        if self.chunk_size & (self.chunk_size - 1):
            raise ConfigError(f"chunk_size={self.chunk_size} is no power of two, which measurement='srht' needs.")
        signs = torch.randint(0, 2, (self.chunk_size,), generator=generator).mul(2.0).sub(1.0)
        rows = torch.randperm(self.chunk_size, generator=generator)[: self.k].clone()
        left = 1 << (self.chunk_size.bit_length() // 2)
        return {
            "signs": signs / math.sqrt(self.k),
            "rows": rows,
            "left": _hadamard(left),
            "right": _hadamard(self.chunk_size // left),
        }

    def _transform(self, x: Tensor) -> Tensor:
        # The Hadamard matrix of N is a Kronecker product: two products with small ones, no loop over log2(N) stages.
        left, right = self._parts["left"], self._parts["right"]
        return (left @ x.view(-1, len(left), len(right)) @ right).view(x.shape)

    def _project_srht(self, x: Tensor) -> Tensor:
        return self._transform(x * self._parts["signs"])[:, self._parts["rows"]]

    def _correlate_srht(self, y: Tensor) -> Tensor:
        spread = y.new_zeros(len(y), self.chunk_size).index_copy_(1, self._parts["rows"], y)
        return self._transform(spread) * self._parts["signs"]

    def _make_countsketch(self, generator: torch.Generator) -> dict[str, Tensor]:
        # Each hash has rows of its own, so that no column meets itself.
        hashes = min(HASHES, self.k)
        edges = [self.k * part // hashes for part in range(hashes + 1)]
        rows = [
            torch.randint(low, high, (self.chunk_size,), generator=generator)
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]
        signs = torch.randint(0, 2, (hashes, self.chunk_size), generator=generator).mul(2.0).sub(1.0)
        return {"rows": torch.stack(rows), "signs": signs / math.sqrt(hashes)}

    def _project_countsketch(self, x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), self.k)
        for rows, signs in zip(self._parts["rows"], self._parts["signs"], strict=True):
            y.index_add_(1, rows, x * signs)
        return y

    def _correlate_countsketch(self, y: Tensor) -> Tensor:
        pairs = zip(self._parts["rows"], self._parts["signs"], strict=True)
        return sum((y[:, rows] * signs for rows, signs in pairs), y.new_zeros(()))


def _hadamard(n: int) -> Tensor:
    matrix = torch.ones(1, 1)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(matrix) < n:
        matrix = torch.kron(block, matrix)
    return matrix


def top_entries(x: Tensor, s: int) -> Tensor:
    """Places of the `s` entries of largest magnitude of each chunk, `(C, N)` to `(C, S)`."""
    return x.abs().topk(s, dim=1, sorted=False).indices


def solve_on_support(gram: Tensor, support: Tensor, correlations: Tensor, ridge: float) -> Tensor:
    """Least squares with the columns of a support: `argmin |y - A_I c|^2 + ridge |c|^2`.

    Args:
        gram (`Tensor`): `(N, N)`, `A^T A`.
        support (`Tensor`): `(C, S)`, places, none twice in a chunk.
        correlations (`Tensor`): `(C, N, M)`, `A^T y` of `M` measured vectors.
        ridge (`float`): Added to the diagonal.

    Returns:
        `Tensor`: `(C, S, M)`
    """
    normal = gram[support[:, :, None], support[:, None, :]]
    normal.diagonal(dim1=1, dim2=2).add_(ridge)
    right = correlations.gather(1, support[:, :, None].expand(-1, -1, correlations.shape[2]))
    factor, failed = torch.linalg.cholesky_ex(normal)
    if bool(failed.any()):
        # Columns that rounding made dependent: a search goes on choosing where a chunk is explained already.
        normal.diagonal(dim1=1, dim2=2).add_(torch.where(failed > 0, SAFE_RIDGE, 0.0)[:, None])
        factor = torch.linalg.cholesky(normal)
    return torch.cholesky_solve(right, factor)


def omp(
    measurement: Measurement, y: Tensor, atoms: int, tol: float = 1e-6, ridge: float = 1e-7
) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit for all chunks at once.

    A chunk whose residual fell under `tol` of its measurements goes on choosing columns with the others; their coefficients are
    zero.

    Args:
        measurement (`Measurement`): `A`.
        y (`Tensor`): `(C, K)`.
        atoms (`int`): Columns to choose, at most `K`.
        tol (`float`, defaults to 1e-6): Stop when all residuals are below this share.
        ridge (`float`, defaults to 1e-7): Keeps the normal equations solvable.

    Returns:
        `tuple[Tensor, Tensor]`: places and coefficients, `(C, S)` each with `S <= atoms`. Where `y` is zero they are zero.
    """
    atoms = min(atoms, measurement.k)
    gram = measurement.gram()
    # Scales of 1e-30 would vanish in the squares below.
    scale = y.abs().amax(1, keepdim=True)
    unit = y / scale.clamp_min(torch.finfo(y.dtype).tiny)
    correlations = measurement.correlate(unit)
    goal = tol * unit.norm(dim=1)
    support = torch.zeros(len(y), 0, dtype=torch.long, device=y.device)
    taken = torch.zeros_like(correlations, dtype=torch.bool)
    left, values = correlations, unit.new_zeros(len(y), atoms)
    done = torch.zeros_like(goal, dtype=torch.bool)
    for chosen_so_far in range(1, atoms + 1):
        chosen = left.abs().masked_fill(taken, -1.0).argmax(1, keepdim=True)
        taken.scatter_(1, chosen, True)
        support = torch.cat([support, chosen], dim=1)
        found = solve_on_support(gram, support, correlations[:, :, None], ridge)[:, :, 0]
        found = torch.nn.functional.pad(found, (0, atoms - chosen_so_far))
        # What is explained stays as it is; further columns would only share in it.
        values = torch.where(done[:, None], values, found)
        guess = torch.zeros_like(correlations).scatter_(1, support, values[:, :chosen_so_far])
        residual = unit - measurement.project(guess)
        done = done | (residual.norm(dim=1) <= goal)
        if bool(done.all()):
            break
        left = measurement.correlate(residual)
    return support, values[:, : support.shape[1]] * scale
