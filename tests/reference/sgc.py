"""A slow and obvious SGC, one chunk and one matrix at a time, float64. Nothing is shared with the library.

Matrices `A` are `(K, N)`, chunks are vectors of `N` entries, measurements vectors of `K`.
"""

import torch
from torch import Tensor


def largest(vector: Tensor, s: int) -> list[int]:
    """Places of the `s` largest magnitudes, by a sort."""
    return sorted(range(len(vector)), key=lambda i: -abs(float(vector[i])))[:s]


def keep(vector: Tensor, places: list[int]) -> Tensor:
    kept = torch.zeros_like(vector)
    for i in places:
        kept[i] = vector[i]
    return kept


def chunks_of(vector: Tensor, size: int) -> list[Tensor]:
    """Zeros fill the last one."""
    parts = []
    for start in range(0, len(vector), size):
        part = torch.zeros(size, dtype=torch.float64)
        piece = vector[start : start + size].double()
        part[: len(piece)] = piece
        parts.append(part)
    return parts


def least_squares(matrix: Tensor, y: Tensor, places: list[int], ridge: float = 0.0) -> Tensor:
    """`argmin |y - A_I c|^2 + ridge |c|^2`, the ridge as extra rows of a library solver."""
    columns = matrix[:, places]
    rows = torch.cat([columns, ridge**0.5 * torch.eye(len(places), dtype=torch.float64)])
    target = torch.cat([y, torch.zeros(len(places), dtype=torch.float64)])
    return torch.linalg.lstsq(rows, target[:, None]).solution[:, 0]


def omp(matrix: Tensor, y: Tensor, atoms: int, tol: float = 1e-6) -> tuple[list[int], Tensor]:
    """Textbook orthogonal matching pursuit of one vector."""
    matrix, y = matrix.double(), y.double()
    places: list[int] = []
    values = torch.zeros(0, dtype=torch.float64)
    residual = y
    while len(places) < atoms and float(residual.norm()) > tol * float(y.norm()):
        products = [0.0 if i in places else abs(float(matrix[:, i] @ residual)) for i in range(matrix.shape[1])]
        places.append(products.index(max(products)))
        values = least_squares(matrix, y, places)
        residual = y - matrix[:, places] @ values
    return places, values


class DenseMoments:
    """Both moments of Adam fed the `s` largest entries of every chunk, kept dense."""

    def __init__(self, n: int, s: int, betas: tuple[float, float]):
        self.s, self.betas, self.step = s, betas, 0
        self.first = torch.zeros(n, dtype=torch.float64)
        self.second = torch.zeros(n, dtype=torch.float64)

    def feed(self, gradient: Tensor) -> list[int]:
        places = largest(gradient, self.s)
        kept = keep(gradient.double(), places)
        self.step += 1
        for name, value, beta in (("first", kept, self.betas[0]), ("second", kept**2, self.betas[1])):
            setattr(self, name, beta * getattr(self, name) + (1 - beta) * value)
        return places

    def corrected(self) -> tuple[Tensor, Tensor]:
        return self.first / (1 - self.betas[0] ** self.step), self.second / (1 - self.betas[1] ** self.step)


def adam_bound(step: int, betas: tuple[float, float]) -> float:
    """The largest quotient Adam can have at a step: gradients in proportion to the ratio of their weights."""
    first = [(1 - betas[0]) * betas[0] ** (step - t) / (1 - betas[0] ** step) for t in range(1, step + 1)]
    second = [(1 - betas[1]) * betas[1] ** (step - t) / (1 - betas[1] ** step) for t in range(1, step + 1)]
    gradients = [a / b for a, b in zip(first, second)]
    mean = sum(a * g for a, g in zip(first, gradients))
    return mean / sum(b * g**2 for b, g in zip(second, gradients)) ** 0.5


class MeasuredChunk:
    """One chunk of SGC: state of `K` numbers a moment, section 2 of the notes on the method."""

    def __init__(
        self, matrix: Tensor, s: int, betas=(0.9, 0.999), eps=1e-8, recover="known", residual="none", ridge=1e-6
    ):
        self.matrix, self.s, self.betas, self.eps = matrix.double(), s, betas, eps
        self.recover, self.residual, self.ridge, self.step = recover, residual, ridge, 0
        self.first = torch.zeros(len(matrix), dtype=torch.float64)
        self.second = torch.zeros(len(matrix), dtype=torch.float64)

    def direction(self, gradient: Tensor) -> Tensor:
        gradient = gradient.double()
        places = largest(gradient, self.s)
        kept = keep(gradient, places)
        self.step += 1
        b1, b2 = self.betas
        self.first = b1 * self.first + (1 - b1) * (self.matrix @ kept)
        self.second = b2 * self.second + (1 - b2) * (self.matrix @ kept**2)
        mean, variance = self.first / (1 - b1**self.step), self.second / (1 - b2**self.step)
        if self.recover == "omp":
            places, values = omp(self.matrix, mean, self.s)
        else:
            values = least_squares(self.matrix, mean, places, self.ridge)
        spread = least_squares(self.matrix, variance, places, self.ridge)
        positive = [float(v) for v in spread if v > 0]
        result = torch.zeros_like(gradient)
        if self.residual == "chunk":
            result = gradient / ((gradient**2).mean() ** 0.5 + self.eps)
        for i, m, v in zip(places, values, spread):
            floor = sum(positive) / len(positive) if positive else float(m) ** 2
            quotient = float(m / ((float(v) if v > 0 else floor) ** 0.5 + self.eps))
            bound = adam_bound(self.step, self.betas)
            result[i] = max(-bound, min(bound, quotient))
        return result


class BlockChunk:
    """One second moment for a chunk."""

    def __init__(self, betas=(0.9, 0.999), eps=1e-8):
        self.betas, self.eps, self.scale, self.step = betas, eps, 0.0, 0

    def divisor(self, gradient: Tensor) -> float:
        self.step += 1
        mean = sum(float(g) ** 2 for g in gradient) / len(gradient)
        self.scale = self.betas[1] * self.scale + (1 - self.betas[1]) * mean
        return (self.scale / (1 - self.betas[1] ** self.step)) ** 0.5 + self.eps

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.double() / self.divisor(gradient)


class HybridChunk(BlockChunk):
    """Measured momentum on the largest entries, the gradient elsewhere, all over one scalar (section 8)."""

    def __init__(self, matrix: Tensor, s: int, betas=(0.9, 0.999), eps=1e-8, ridge=1e-2):
        super().__init__(betas, eps)
        self.matrix, self.s, self.ridge = matrix.double(), s, ridge
        self.first = torch.zeros(len(matrix), dtype=torch.float64)

    def direction(self, gradient: Tensor) -> Tensor:
        gradient = gradient.double()
        divisor = self.divisor(gradient)
        places = largest(gradient, self.s)
        b1 = self.betas[0]
        self.first = b1 * self.first + (1 - b1) * (self.matrix @ keep(gradient, places))
        values = least_squares(self.matrix, self.first / (1 - b1**self.step), places, self.ridge)
        result = gradient.clone()
        for i, value in zip(places, values):
            result[i] = value
        return result / divisor


def leading_basis(gradient: Tensor, rank: int) -> Tensor:
    """Left singular vectors of the largest singular values, `(M, R)`."""
    return torch.linalg.svd(gradient.double(), full_matrices=True).U[:, :rank]


def projected_first_step(gradient: Tensor, rank: int, s: int, size: int) -> Tensor:
    """CESGC's first direction where decoding is exact: signs of the largest entries, in the basis and back."""
    basis = leading_basis(gradient, rank)
    inner = basis.T @ gradient.double()
    signs = [keep(part, largest(part, s)).sign() for part in chunks_of(inner.flatten(), size)]
    return basis @ torch.cat(signs)[: inner.numel()].view(inner.shape)


class FactoredMoment:
    """Adafactor's second moment, `V_ij = R_i C_j / mean(R)`, both averages corrected for their start at zero."""

    def __init__(self, rows: int, columns: int, beta: float):
        self.beta, self.step = beta, 0
        self.rows = [0.0] * rows
        self.columns = [0.0] * columns

    def update(self, gradient: Tensor) -> Tensor:
        squares = gradient.double() ** 2
        self.step += 1
        b, correction = self.beta, 1 - self.beta**self.step
        self.rows = [b * old + (1 - b) * float(squares[i].mean()) for i, old in enumerate(self.rows)]
        self.columns = [b * old + (1 - b) * float(squares[:, j].mean()) for j, old in enumerate(self.columns)]
        rows, columns = [r / correction for r in self.rows], [c / correction for c in self.columns]
        mean = sum(rows) / len(rows)
        result = torch.zeros_like(squares)
        for i, r in enumerate(rows):
            for j, c in enumerate(columns):
                result[i, j] = float(gradient[i, j]) / (r * c / mean) ** 0.5
        return result


def sketched_space(update: Tensor, sketch: Tensor, part: int) -> Tensor:
    """Orthonormal columns on the shorter side, by Gram and Schmidt, of what the sketch finds in a quarter of the longer."""
    wide = update.double() if update.shape[0] < update.shape[1] else update.double().T
    runs = 4 if wide.shape[1] >= 64 else 1
    width = wide.shape[1] // (4 * runs)
    quarter = wide[:, [(4 * run + part % 4) * width + offset for run in range(runs) for offset in range(width)]]
    columns = []
    for column in (quarter @ (sketch.double() @ quarter).T).T:
        for _ in range(2):
            for other in columns:
                column = column - other * (other @ column)
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def cut_directions(update: Tensor, sketch: Tensor, part: int, limit: float) -> Tensor:
    """Each direction of the sketched space cut to `limit` times the root mean square of the singular values outside.

    Those count as no less than a hundredth of an even spread.
    """
    wide = update.double() if update.shape[0] < update.shape[1] else update.double().T
    basis = sketched_space(update, sketch, part)
    outside = wide - basis @ basis.T @ wide
    crowd = max(float((outside**2).sum()) / (len(wide) - len(sketch)), 0.01 * float((wide**2).sum()) / len(wide))
    cut = outside
    for direction in basis.T:
        held = direction @ wide
        cut = cut + torch.outer(direction, held) * min(1.0, limit * crowd**0.5 / float(held.norm()))
    return cut if update.shape[0] < update.shape[1] else cut.T
