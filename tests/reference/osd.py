"""A slow and obvious OSD: loops, Python integers, one row at a time, float64.

Nothing is shared with the library. `read_blob` is a second reader of the file format, written from its description.
"""

import struct
import zlib

import numpy as np
import torch
from torch import Tensor


def importance(score: str, left: Tensor, right: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores entry by entry; `left` `(n, k)`, `right` `(d, k)`, `gradient` `(n, d)`."""
    found = []
    for own, other, g in ((left, right, gradient), (right, left, None if gradient is None else gradient.T)):
        scores = torch.zeros(own.shape, dtype=torch.float64)
        for i in range(own.shape[0]):
            for c in range(own.shape[1]):
                entry, column = float(own[i, c]), [float(value) for value in other[:, c]]
                if score == "magnitude":
                    scores[i, c] = abs(entry)
                elif score == "energy":
                    scores[i, c] = abs(entry) * sum(value**2 for value in column) ** 0.5
                elif score == "taylor1":
                    scores[i, c] = abs(entry * sum(float(g[i, j]) * value for j, value in enumerate(column)))
                elif score == "taylor":
                    scores[i, c] = abs(entry) * sum(float(g[i, j]) ** 0.5 * abs(v) for j, v in enumerate(column))
                elif score == "fisher":
                    scores[i, c] = entry**2 * sum(float(g[i, j]) * value**2 for j, value in enumerate(column))
        found.append(scores)
    return found[0], found[1]


def select(left: Tensor, right: Tensor, count: int, joint: bool) -> tuple[Tensor, Tensor]:
    """Masks of the best entries, by a sort of `(-score, factor, column, row)`."""
    entries = [
        (-float(scores[i, c]), side, c, i)
        for side, scores in enumerate((left, right))
        for i in range(scores.shape[0])
        for c in range(scores.shape[1])
    ]
    masks = torch.zeros(left.shape, dtype=torch.bool), torch.zeros(right.shape, dtype=torch.bool)
    if joint:
        kept = sorted(entries)[:count]
    else:
        n, d = len(left), len(right)
        share = round(count * n / (n + d))
        kept = sorted(e for e in entries if e[1] == 0)[:share]
        kept += sorted(e for e in entries if e[1] == 1)[: count - share]
    for _, side, c, i in kept:
        masks[side][i, c] = True
    return masks


def refit_left(delta: Tensor, right: Tensor, mask: Tensor, ridge: float = 1e-6) -> Tensor:
    """Each row by a library least-squares solver, the ridge as extra rows."""
    delta, right = delta.double(), right.double()
    lam = ridge * float((right**2).sum(0).mean())
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for i in range(len(mask)):
        support = torch.nonzero(mask[i])[:, 0]
        if len(support):
            system = torch.cat([right[:, support], lam**0.5 * torch.eye(len(support), dtype=torch.float64)])
            target = torch.cat([delta[i], torch.zeros(len(support), dtype=torch.float64)])
            result[i, support] = torch.linalg.lstsq(system, target[:, None], driver="gelsd").solution[:, 0]
    return result


def index_bits(places: int) -> int:
    """Bits that number `places` places: the smallest b with 2**b >= places."""
    bits = 0
    while 2**bits < places:
        bits += 1
    return bits


def paper_bits(n: int, d: int, rank: int, kept_left: int, kept_right: int) -> int:
    total = 0
    for side, kept in ((n, kept_left), (d, kept_right)):
        total += kept * (32 + index_bits(side * rank))
    return total


def pack(values: list[int], bits: int) -> bytes:
    """One long integer, the first value in its lowest bits."""
    whole = 0
    for at, value in enumerate(values):
        whole |= value << (at * bits)
    return whole.to_bytes((len(values) * bits + 7) // 8, "little")


def unpack(data: bytes, count: int, bits: int) -> list[int]:
    whole = int.from_bytes(data, "little")
    return [(whole >> (at * bits)) & (2**bits - 1) for at in range(count)]


def gap_words(mask: list[bool], bits: int) -> list[int]:
    """Words of the gap code, counted place by place."""
    words, gap = [], 0
    for kept in mask:
        if kept:
            while gap >= 2**bits - 1:
                words.append(2**bits - 1)
                gap -= 2**bits - 1
            words.append(gap)
            gap = 0
        else:
            gap += 1
    return words


def mask_bytes(mask: list[bool]) -> int:
    """Bytes of the shortest of all codes, the tag included."""
    if all(mask):
        return 1
    sizes = [1 + (len(mask) + 7) // 8]
    sizes += [5 + (len(gap_words(mask, bits)) * bits + 7) // 8 for bits in range(1, 10)]
    return min(sizes)


def splitmix(state: int) -> int:
    """The published SplitMix64 output function of an already advanced state."""
    top = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & top
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & top
    return state ^ (state >> 31)


def seeded_places(seed: int, count: int, size: int) -> list[int]:
    places = []
    for i in range(count):
        low, high = i * size // count, (i + 1) * size // count
        state = ((i + 1 + (seed << 32)) * 0x9E3779B97F4A7C15) % 2**64
        places.append(low + splitmix(state) % (high - low))
    return places


def bfloat16(value: float) -> int:
    """Bits of the nearest bfloat16, ties to even."""
    (raw,) = struct.unpack("<I", struct.pack("<f", value))
    low, rest = raw >> 16, raw & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low % 2 == 1))


class _Bytes:
    def __init__(self, data: bytes):
        self.data = data

    def next(self, count: int) -> bytes:
        assert len(self.data) >= count
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def number(self, layout: str):
        return struct.unpack("<" + layout, self.next(struct.calcsize("<" + layout)))[0]


def read_blob(blob: bytes) -> dict[str, np.ndarray]:
    """Dense deltas, float64, of a blob that is known to be good."""
    reader = _Bytes(blob)
    assert reader.next(4) == b"OSD1"
    assert reader.number("B") == 1
    assert reader.next(3) == b"\0\0\0"
    packed, inflated, length, check = (reader.number(layout) for layout in "IIQI")
    assert zlib.crc32(reader.data) == check
    header = zlib.decompress(reader.next(packed))
    assert len(header) == inflated
    assert len(reader.data) == length
    header = _Bytes(header)
    count, size = header.number("I"), header.number("I")
    names = header.next(size).decode().split("\n")[:count]
    axes = [header.number("B") for _ in range(count)]
    shapes = [tuple(header.number("I") for _ in range(number)) for number in axes]
    terms = [header.number("B") for _ in range(count)]
    assert not header.data
    found = {}
    for name, shape, number in zip(names, shapes, terms):
        n = shape[0]
        d = 1
        for side in shape[1:]:
            d *= side
        dense = np.zeros((n, d))
        for _ in range(number):
            dense += _read_term(reader, n, d)
        found[name] = dense.reshape(shape)
    assert not reader.data
    return found


def _read_term(reader: _Bytes, n: int, d: int) -> np.ndarray:
    if reader.number("B") == 1:
        seed, count, magnitude = reader.number("I"), reader.number("I"), reader.number("f")
        signs = unpack(reader.next((count + 7) // 8), count, 1)
        flat = np.zeros(n * d)
        for place, sign in zip(seeded_places(seed, count, n * d), signs):
            flat[place] += -magnitude if sign else magnitude
        return flat.reshape(n, d)
    k = reader.number("H")
    left, right = _read_factor(reader, k, n), _read_factor(reader, k, d)
    return sum(np.outer(a, b) for a, b in zip(left, right))


def _read_factor(reader: _Bytes, k: int, m: int) -> np.ndarray:
    bits = reader.number("B")
    steps = [1.0] * k if bits >= 16 else [reader.number("e") for _ in range(k)]
    mask = _read_mask(reader, k * m)
    kept = sum(mask)
    if bits == 32:
        values = [reader.number("f") for _ in range(kept)]
    elif bits == 16:
        values = [struct.unpack("<f", b"\0\0" + reader.next(2))[0] for _ in range(kept)]
    else:
        values = [q - 2 ** (bits - 1) + 0.5 for q in unpack(reader.next((kept * bits + 7) // 8), kept, bits)]
    rest = iter(values)
    flat = [next(rest) * steps[at // m] if here else 0.0 for at, here in enumerate(mask)]
    return np.array(flat).reshape(k, m)


def _read_mask(reader: _Bytes, count: int) -> list[bool]:
    tag = reader.number("B")
    if tag == 0:
        return [True] * count
    if tag == 1:
        return [bool(bit) for bit in unpack(reader.next((count + 7) // 8), count, 1)]
    bits = tag - 1
    words = reader.number("I")
    mask, at = [False] * count, 0
    for word in unpack(reader.next((words * bits + 7) // 8), words, bits):
        at += word
        if word != 2**bits - 1:
            mask[at] = True
            at += 1
    return mask
