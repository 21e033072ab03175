"""Peers of the delta codecs, re-implemented small and plainly: what a fine-tune weighs when others store its change.

A delta `dW = W_tuned - W_base` is given for every 2-D weight of the transformer blocks (`block_deltas`); changes of
embeddings and norms are dropped by all peers alike. A peer writes real bytes and reads nothing else when it decodes, so
sizes are measured, not computed. Names and shapes are taken as known to the decoder (it has the base model), which
favours the peers: no blob holds a table of names. Nothing is shared with the product code, on purpose: a fault in one
cannot hide in the other.

    spectra = Spectra(deltas)                                   # one SVD a matrix for all peers and budgets
    blob = PEERS["dense SVD int4"].encode(deltas, 100_000, seed=0, spectra=spectra)
    decoded = PEERS["dense SVD int4"].decode(blob, {name: tuple(d.shape) for name, d in deltas.items()})

Budgets are bytes for the whole model, `len(blob) <= budget`. A budget that a peer cannot meet raises `ValueError`.

Shapes: dW `(n, d)`, U `(n, k)`, V `(d, k)`; the singular values are split evenly, `U = U' S^1/2` and `V = V' S^1/2`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


EXACT_SVD = 256  # matrices whose shorter side is at most this get a full SVD
POWER_STEPS, OVERSAMPLE = 4, 16
CLIPS = torch.linspace(1.0, 0.1, 46)  # shares of a column's largest magnitude
RIDGE = 1e-6  # of the mean diagonal
RELAXATION = (1, 2, 4)  # c / r of MagTruncSVD
SCALE, SEED, COUNT, RANK = 16, 32, 32, 8  # bits of header fields


def block_deltas(base, tuned) -> dict[str, Tensor]:
    """Changes of all 2-D weights `(n, d)` inside the transformer blocks of two models, in float32."""
    before = dict(base.named_parameters())
    return {
        name: (after.detach().float() - before[name].detach().float())
        for name, after in tuned.named_parameters()
        if ".layers." in name and after.ndim == 2
    }


class BitWriter:
    """Unsigned integers of any width, one behind the other, most significant bit first."""

    def __init__(self):
        self._parts: list[np.ndarray] = []

    def put(self, values, width: int) -> None:
        values = np.atleast_1d(np.asarray(values)).astype(np.uint32).ravel()
        if width == 1:
            self._parts.append(values.astype(np.uint8))
        elif width:
            shifts = np.arange(width - 1, -1, -1, dtype=np.uint32)
            self._parts.append((values[:, None] >> shifts & 1).astype(np.uint8).ravel())

    def blob(self, budget: int) -> bytes:
        blob = np.packbits(np.concatenate(self._parts)).tobytes()
        if len(blob) > budget:
            raise ValueError(f"the smallest blob takes {len(blob)} bytes, more than the budget of {budget}.")
        return blob


class BitReader:
    """Reads what a `BitWriter` has written."""

    def __init__(self, blob: bytes):
        self._bits, self._at = np.unpackbits(np.frombuffer(blob, dtype=np.uint8)), 0

    def take(self, count: int, width: int) -> np.ndarray:
        bits = self._bits[self._at : self._at + count * width].reshape(count, width)
        self._at += count * width
        values = np.zeros(count, dtype=np.uint32)
        for column in bits.T:
            values = values << 1 | column
        return values

    def one(self, width: int) -> int:
        return int(self.take(1, width)[0])


def float_codes(values: Tensor, width: int) -> np.ndarray:
    """Bit patterns of float32 (width 32) or bfloat16 (width 16)."""
    if width == 32:
        return values.contiguous().numpy().view(np.uint32)
    return values.contiguous().bfloat16().view(torch.int16).numpy().view(np.uint16)


def from_float_codes(codes: np.ndarray, width: int) -> Tensor:
    """Float32 values of the patterns of `float_codes`."""
    if width == 32:
        return torch.from_numpy(codes.astype(np.uint32).view(np.float32).copy())
    return torch.from_numpy(codes.astype(np.uint16).view(np.int16).copy()).view(torch.bfloat16).float()


def put_scales(writer: BitWriter, scales: Tensor) -> None:
    writer.put(scales.half().numpy().view(np.uint16), SCALE)


def take_scales(reader: BitReader, count: int) -> Tensor:
    return torch.from_numpy(reader.take(count, SCALE).astype(np.uint16).view(np.float16).astype(np.float32))


class Spectra:
    """Truncated SVDs of all deltas, computed once and cut by the peers.

    Args:
        deltas: `(n, d)` each.
        rank: most columns kept of matrices with a shorter side beyond `EXACT_SVD`; smaller ones keep all.
        seed: of the randomised SVD; the global generator is left as it was.
    """

    def __init__(self, deltas: dict[str, Tensor], rank: int = 64, seed: int = 0):
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in sorted(deltas):
                delta = deltas[name].float()
                if min(delta.shape) <= EXACT_SVD:
                    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
                    self.parts[name] = u, s, vt.mT
                else:
                    u, s, v = torch.svd_lowrank(delta, q=min(rank + OVERSAMPLE, *delta.shape), niter=POWER_STEPS)
                    self.parts[name] = u[:, :rank], s[:rank], v[:, :rank]

    def energies(self, name: str) -> Tensor:
        """Squared singular values, largest first."""
        return self.parts[name][1].square()

    def factors(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """`(n, rank)` and `(d, rank)`, each with the square root of the singular values."""
        u, s, v = self.parts[name]
        if rank > len(s):
            raise ValueError(f"rank {rank} of {name} is asked for and {len(s)} are known; raise Spectra(rank=...).")
        root = s[:rank].sqrt()
        return u[:, :rank] * root, v[:, :rank] * root


def _greedy(energies: list[Tensor], costs: list[int], bits: int, most: int, uniform: bool) -> tuple[list[int], float]:
    """Ranks that fit into `bits`, and the energy they hold.

    Components are taken in the order of energy per bit. With `uniform` all matrices get the same rank first, as high as
    it goes, and only the rest is given out that way, one more rank at most.
    """
    limits = [min(len(e), most) for e in energies]
    ranks = [0] * len(costs)
    if uniform:
        while any(r < limit for r, limit in zip(ranks, limits, strict=True)):
            higher = [min(r + 1, limit) for r, limit in zip(ranks, limits, strict=True)]
            if sum(r * cost for r, cost in zip(higher, costs, strict=True)) > bits:
                break
            ranks = higher
        limits = [min(r + 1, limit) for r, limit in zip(ranks, limits, strict=True)]
    left = bits - sum(r * cost for r, cost in zip(ranks, costs, strict=True))
    offers = [(-float(energies[i][j]) / costs[i], j, i) for i in range(len(costs)) for j in range(ranks[i], limits[i])]
    for _, j, i in sorted(offers):
        if ranks[i] == j and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return ranks, sum(float(e[:r].sum()) for e, r in zip(energies, ranks, strict=True))


def _allocate(energies: list[Tensor], costs: list[int], bits: int, uniform: bool) -> list[int]:
    """Ranks for `bits` bits with the table of ranks counted; the table's width is chosen for the most energy."""
    best, most_energy = None, -1.0
    for width in range(RANK + 1):
        rest = bits - 2 * RANK - width * len(costs)
        # Ranks of a global allocation may start at 0; those of a uniform one hardly differ.
        cap = 2**RANK - 1 if uniform else 2**width - 1
        ranks, energy = _greedy(energies, costs, max(rest, 0), cap, uniform)
        fits = rest >= 0 and (max(ranks) - min(ranks)).bit_length() <= width
        if fits and energy > most_energy:
            best, most_energy = ranks, energy
    if best is None or max(best) == 0:
        raise ValueError(f"no rank fits into {bits // 8} bytes.")
    return best


def _put_ranks(writer: BitWriter, ranks: list[int]) -> None:
    least = min(ranks)
    width = (max(ranks) - least).bit_length()
    writer.put([least, width], RANK)
    writer.put([rank - least for rank in ranks], width)


def _take_ranks(reader: BitReader, count: int) -> list[int]:
    least, width = reader.one(RANK), reader.one(RANK)
    return [least + int(more) for more in reader.take(count, width)]


class Peer:
    """One way to store deltas.

    `encode(deltas, budget, seed, spectra)` gives at most `budget` bytes; `decode(blob, shapes)` gives float32 deltas.
    `spectra` saves an SVD where one is needed; `seed` matters where something is drawn.
    """

    def encode(self, deltas: dict[str, Tensor], budget: int, seed: int, spectra: Spectra | None = None) -> bytes:
        raise NotImplementedError

    def decode(self, blob: bytes, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass
class DenseFloat(Peer):
    """Truncated SVD with factors of 32 (float32) or 16 bits (bfloat16), one rank for all matrices.

    This is the baseline of Optimal Singular Damage (arXiv 2511.02681) and, in 16 bits, what LoRA extraction writes.
    """

    width: int

    def encode(self, deltas, budget, seed, spectra=None):
        names = sorted(deltas)
        spectra = spectra or Spectra(deltas, seed=seed)
        costs = [self.width * sum(deltas[name].shape) for name in names]
        ranks = _allocate([spectra.energies(name) for name in names], costs, 8 * budget, uniform=True)
        writer = BitWriter()
        _put_ranks(writer, ranks)
        for name, rank in zip(names, ranks, strict=True):
            for factor in spectra.factors(name, rank):
                writer.put(float_codes(factor, self.width), self.width)
        return writer.blob(budget)

    def decode(self, blob, shapes):
        names, reader, decoded = sorted(shapes), BitReader(blob), {}
        for name, rank in zip(names, _take_ranks(reader, len(names)), strict=True):
            u, v = (
                from_float_codes(reader.take(side * rank, self.width), self.width).view(side, rank)
                for side in shapes[name]
            )
            decoded[name] = u @ v.mT
        return decoded


def _round_plain(factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers of -q..q and one step a column, from the column's largest magnitude."""
    top = 2 ** (bits - 1) - 1
    step = (factor.abs().amax(0) / top).clamp_min(1e-12)
    return (factor / step).round().clamp(-top, top), step


def _round_clipped(factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Half-integers (all `2^bits` levels, none at zero) and the step a column with the least squared error."""
    half = 2 ** (bits - 1)
    largest = factor.abs().amax(0).clamp_min(1e-12)
    best_error = torch.full_like(largest, float("inf"))
    best_step = largest / half
    for clip in CLIPS:
        step = clip * largest / half
        error = (((factor / step).floor().clamp(-half, half - 1) + 0.5) * step - factor).square().sum(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
    return (factor / best_step).floor().clamp(-half, half - 1) + 0.5, best_step


def _refit(delta: Tensor, fixed: Tensor) -> Tensor:
    """Least-squares partner `(n, k)` of a fixed factor `(d, k)`, with a small ridge."""
    gram = fixed.mT @ fixed
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-20)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)), fixed.mT @ delta.mT).mT


@dataclass
class DenseInteger(Peer):
    """Truncated SVD with factors of a few bits and one float16 scale a rank.

    Only the product of the two columns' steps matters, so its square root is stored. Plain: one rank for all matrices
    and steps from the largest magnitude. Plus: ranks by energy per byte over the whole model, steps by a clip search,
    and the second factor refitted to the quantised first one; both orders are tried and the closer one is kept.
    """

    bits: int
    plus: bool = False

    def encode(self, deltas, budget, seed, spectra=None):
        names = sorted(deltas)
        spectra = spectra or Spectra(deltas, seed=seed)
        costs = [self.bits * sum(deltas[name].shape) + SCALE for name in names]
        ranks = _allocate([spectra.energies(name) for name in names], costs, 8 * budget, uniform=not self.plus)
        writer = BitWriter()
        _put_ranks(writer, ranks)
        for name, rank in zip(names, ranks, strict=True):
            if rank == 0:
                continue
            u, v = spectra.factors(name, rank)
            if self.plus:
                u, v, scale = self._refitted(deltas[name].float(), u, v)
            else:
                (u, step_u), (v, step_v) = _round_plain(u, self.bits), _round_plain(v, self.bits)
                scale = (step_u * step_v).sqrt()
            put_scales(writer, scale)
            for integers in (u, v):
                writer.put((integers + self._offset).numpy(), self.bits)
        return writer.blob(budget)

    @property
    def _offset(self) -> float:
        return 2 ** (self.bits - 1) - (0.5 if self.plus else 1)

    def _refitted(self, delta: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for target, first in ((delta, v), (delta.mT, u)):
            first, step = _round_clipped(first, self.bits)
            second, other = _round_clipped(_refit(target, first * step), self.bits)
            scale = (step * other).sqrt()
            error = (target - (second * scale) @ (first * scale).mT).square().sum().item()
            found.append((error, second, first, scale))
        if found[0][0] <= found[1][0]:
            return found[0][1:]
        _, second, first, scale = found[1]
        return first, second, scale

    def decode(self, blob, shapes):
        names, reader, decoded = sorted(shapes), BitReader(blob), {}
        for name, rank in zip(names, _take_ranks(reader, len(names)), strict=True):
            scale = take_scales(reader, rank)
            u, v = (
                torch.from_numpy(reader.take(side * rank, self.bits).astype(np.float32)).view(side, rank)
                for side in shapes[name]
            )
            decoded[name] = ((u - self._offset) * scale) @ ((v - self._offset) * scale).mT
        return decoded


@dataclass
class MagTrunc(Peer):
    """MagTruncSVD, the sparse baseline of Optimal Singular Damage (arXiv 2511.02681), with its index cost.

    A matrix gets the bits of a dense pair of rank r (r as in `DenseFloat`). Factors of rank `k = r + c` keep their
    largest magnitudes, both ranked together; a survivor costs its value and a flat index of `ceil(log2(n k))` or
    `ceil(log2(d k))` bits. c is the best of r, 2r and 4r by Frobenius error.
    """

    width: int

    def encode(self, deltas, budget, seed, spectra=None):
        names = sorted(deltas)
        spectra = spectra or Spectra(deltas, seed=seed)
        sizes = [self.width * sum(deltas[name].shape) for name in names]
        headers = [2 + sum((side * 256).bit_length() for side in deltas[name].shape) for name in names]
        # Headers of all matrices are reserved here; those of matrices without a rank go to the others below.
        ranks = _allocate([spectra.energies(name) for name in names], sizes, 8 * budget - sum(headers), uniform=True)
        table = 2 * RANK + len(names) * (max(ranks) - min(ranks)).bit_length()
        payload = 8 * budget - table - sum(h for h, rank in zip(headers, ranks, strict=True) if rank)
        share = payload / sum(size * rank for size, rank in zip(sizes, ranks, strict=True))
        writer = BitWriter()
        _put_ranks(writer, ranks)
        left = 0.0  # bits that one matrix could not use go to the next
        for name, size, rank in zip(names, sizes, ranks, strict=True):
            if rank:
                left += share * size * rank
                left -= self._put(writer, deltas[name].float(), rank, int(left), name, spectra)
        return writer.blob(budget)

    @staticmethod
    def _widths(shape, rank: int, choice: int) -> tuple[int, list[int], list[int]]:
        """Rank k, then for U and V the bits of an index and of a count."""
        k = min(rank * (1 + RELAXATION[choice]), *shape)
        return k, [(side * k - 1).bit_length() for side in shape], [(side * k).bit_length() for side in shape]

    def _put(self, writer: BitWriter, delta: Tensor, rank: int, bits: int, name: str, spectra: Spectra) -> int:
        """Write the best choice of c for one matrix and return the bits of its entries."""
        best = None
        for choice in range(len(RELAXATION)):
            k, index, count = self._widths(delta.shape, rank, choice)
            if choice and k > len(spectra.energies(name)):
                continue
            factors = spectra.factors(name, k)
            flat = torch.cat([factor.flatten() for factor in factors])
            is_v = torch.arange(len(flat)) >= factors[0].numel()
            cost = self.width + torch.where(is_v, index[1], index[0])
            order = flat.abs().argsort(descending=True, stable=True)
            spent = cost[order].cumsum(0)
            survivors = int((spent <= bits).sum())
            kept = order[:survivors].sort().values
            sparse = torch.zeros_like(flat)
            sparse[kept] = from_float_codes(float_codes(flat[kept], self.width), self.width)
            u, v = sparse[~is_v].view(-1, k), sparse[is_v].view(-1, k)
            error = (delta - u @ v.mT).square().sum().item()
            if best is None or error < best[0]:
                used = int(spent[survivors - 1]) if survivors else 0
                best = error, choice, index, count, (u, v), used
        _, choice, index, count, factors, used = best
        writer.put(choice, 2)
        for factor, index_bits, count_bits in zip(factors, index, count, strict=True):
            flat = factor.flatten()
            places = flat.nonzero().flatten()
            writer.put(len(places), count_bits)
            writer.put(places.numpy(), index_bits)
            writer.put(float_codes(flat[places], self.width), self.width)
        return used

    def decode(self, blob, shapes):
        names, reader, decoded = sorted(shapes), BitReader(blob), {}
        for name, rank in zip(names, _take_ranks(reader, len(names)), strict=True):
            if rank == 0:
                decoded[name] = torch.zeros(shapes[name])
                continue
            k, index, count = self._widths(shapes[name], rank, reader.one(2))
            factors = []
            for side, index_bits, count_bits in zip(shapes[name], index, count, strict=True):
                entries = reader.one(count_bits)
                flat = torch.zeros(side * k)
                places = torch.from_numpy(reader.take(entries, index_bits).astype(np.int64))
                flat[places] = from_float_codes(reader.take(entries, self.width), self.width)
                factors.append(flat.view(side, k))
            decoded[name] = factors[0] @ factors[1].mT
        return decoded


def _shares(sizes: list[int], total: int) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to the sizes."""
    ends = [total * int(end) // sum(sizes) for end in np.cumsum(sizes)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _places(seed: int, matrix: int, size: int, count: int) -> Tensor:
    """`count` different flat positions out of `size`, ascending; the same for the same numpy."""
    if count >= size:
        return torch.arange(size)
    generator = np.random.Generator(np.random.PCG64([seed, matrix]))
    return torch.from_numpy(np.sort(generator.choice(size, count, replace=False, shuffle=False)))


@dataclass
class RandomMask(Peer):
    """Random entries, kept at the same rate p in all matrices; the mask costs nothing but a seed.

    With `width` 16 this is DARE (arXiv 2311.03099) in bfloat16: survivors are divided by p. With `width` 1 a survivor is
    its sign, and one float16 scale a matrix, `mean |dW| / p`, keeps the expected size of an entry.
    """

    width: int

    def encode(self, deltas, budget, seed, spectra=None):
        names = sorted(deltas)
        sizes = [deltas[name].numel() for name in names]
        scales = SCALE * len(names) if self.width == 1 else 0
        total = min((8 * budget - SEED - COUNT - scales) // self.width, sum(sizes))
        if total <= 0:
            raise ValueError(f"no entry fits into {budget} bytes.")
        rate = total / sum(sizes)
        writer = BitWriter()
        writer.put(seed, SEED)
        writer.put(total, COUNT)
        for matrix, (name, count) in enumerate(zip(names, _shares(sizes, total), strict=True)):
            flat = deltas[name].float().flatten()
            kept = flat[_places(seed, matrix, len(flat), count)]
            if self.width == 1:
                put_scales(writer, flat.abs().mean()[None] / rate)
                writer.put((kept >= 0).numpy(), 1)
            else:
                writer.put(float_codes(kept, self.width), self.width)
        return writer.blob(budget)

    def decode(self, blob, shapes):
        names, reader, decoded = sorted(shapes), BitReader(blob), {}
        seed, total = reader.one(SEED), reader.one(COUNT)
        sizes = [int(np.prod(shapes[name])) for name in names]
        rate = total / sum(sizes)
        for matrix, (name, count) in enumerate(zip(names, _shares(sizes, total), strict=True)):
            flat = torch.zeros(sizes[matrix])
            if self.width == 1:
                scale = take_scales(reader, 1)
                values = (2 * torch.from_numpy(reader.take(count, 1).astype(np.float32)) - 1) * scale
            else:
                values = from_float_codes(reader.take(count, self.width), self.width) / rate
            flat[_places(seed, matrix, len(flat), count)] = values
            decoded[name] = flat.view(shapes[name])
        return decoded


@dataclass
class Sign(Peer):
    """One bit an entry and one float16 scale a matrix, `mean |dW|`: BitDelta (arXiv 2402.10193) without distillation.

    The size is fixed: a smaller budget raises `ValueError`, a larger one is not used up.
    """

    def encode(self, deltas, budget, seed, spectra=None):
        needed = -(-sum(SCALE + delta.numel() for delta in deltas.values()) // 8)
        if needed > budget:
            raise ValueError(f"one bit an entry takes {needed} bytes, more than the budget of {budget}.")
        writer = BitWriter()
        for name in sorted(deltas):
            put_scales(writer, deltas[name].float().abs().mean()[None])
            writer.put((deltas[name] >= 0).flatten().numpy(), 1)
        return writer.blob(budget)

    def decode(self, blob, shapes):
        reader, decoded = BitReader(blob), {}
        for name in sorted(shapes):
            scale = take_scales(reader, 1)
            bits = torch.from_numpy(reader.take(int(np.prod(shapes[name])), 1).astype(np.float32))
            decoded[name] = ((2 * bits - 1) * scale).view(shapes[name])
        return decoded


PEERS: dict[str, Peer] = {
    "dense SVD fp32": DenseFloat(32),
    "dense SVD bf16": DenseFloat(16),
    "dense SVD int8": DenseInteger(8),
    "dense SVD int4": DenseInteger(4),
    "dense SVD int3": DenseInteger(3),
    "dense SVD int4 plus": DenseInteger(4, plus=True),
    "dense SVD int3 plus": DenseInteger(3, plus=True),
    "MagTruncSVD fp32": MagTrunc(32),
    "MagTruncSVD bf16": MagTrunc(16),
    "DARE bf16": RandomMask(16),
    "seeded mask + sign": RandomMask(1),
    "sign (BitDelta)": Sign(),
}
