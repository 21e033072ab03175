"""Bits for numbers and for masks: how the values of a factor and the places of its survivors become bytes.

Values of a column share one float16 step and are stored as `bits`-wide integers `q` in offset binary; the value is
`(q - 2**(bits - 1) + 0.5) * step`, so that one bit is a sign, and no level is spent on zero, which a mask can say for
less. The step is the one of a grid that loses least of the column (clip search); where weights are given, least of the
weighted column.

A mask over N places is one of three codes, whichever is shortest: nothing (all kept), one bit a place, or gaps of b bits
between survivors, where the word of all ones means "skip 2**b - 1 places and keep none". Measured within 1.10 of the
entropy of the mask from density 0.02 to 0.5. Everything here is numpy on little-endian bytes, free of any random
generator, and gives the same bytes for the same input.

Shapes: N places of a column or of all columns, R columns (ranks), M rows.
"""

from __future__ import annotations

import struct

import numpy as np

from hf_ext.errors import BlobError


VALUE_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "int3": 3, "int2": 2, "int1": 1}
ALL, BITMASK = 0, 1  # mask tags; a tag t >= 2 is a code of gaps of t - 1 bits
LARGEST_GAP = 9
# A mask in gaps keeps at least one place in so many: what a blob decodes to stays in proportion to its length.
SPARSEST = 256
# Step of the grid, in standard deviations, that loses least of a normal column; the search goes around it.
_STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 8: 0.0308}
_SEARCH = np.array([0.55, 0.65, 0.75, 0.85, 0.92, 1.0, 1.08, 1.17, 1.3, 1.5, 1.8, 2.2], dtype=np.float32)


class Reader:
    """Bytes read from front to back; asking for more than there are is a `BlobError`, never a short answer."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if not 0 <= count <= self.left:
            raise BlobError(f"the blob ends after {self.left} more bytes where {count} are due: it is truncated.")
        self._at += count
        return self._data[self._at - count : self._at]

    def unpack(self, layout: str) -> tuple:
        """The next values of a `struct` layout, little endian."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def array(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` numbers of a little-endian dtype such as `"u4"`."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype="<" + dtype)


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` integers of `bits` bits."""
    return (count * bits + 7) // 8


def pack(values: np.ndarray, bits: int) -> bytes:
    """Integers below `2**bits`, one after the other, lowest bit first."""
    if bits == 8:
        return values.astype(np.uint8).tobytes()
    planes = np.empty((len(values), bits), dtype=np.uint8)
    for bit in range(bits):
        planes[:, bit] = (values >> bit) & 1
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def unpack(data: memoryview, count: int, bits: int) -> np.ndarray:
    """The inverse of `pack`: `(count,)`, uint8 up to eight bits and uint16 beyond."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if bits == 8:
        return raw[:count]
    if bits in (2, 4):
        parts = np.empty((len(raw), 8 // bits), dtype=np.uint8)
        for part in range(8 // bits):
            parts[:, part] = (raw >> (bits * part)) & (2**bits - 1)
        return parts.reshape(-1)[:count]
    planes = np.unpackbits(raw, bitorder="little", count=count * bits)
    values = planes[0::bits].astype(np.uint16 if bits > 8 else np.uint8)
    for bit in range(1, bits):
        values |= planes[bit::bits].astype(values.dtype) << bit
    return values


def encode_mask(mask: np.ndarray) -> bytes:
    """One tag byte and the shortest of the codes that `decode_mask` accepts, for a `(N,)` bool mask."""
    if mask.all():
        return bytes([ALL])
    best = bytes([BITMASK]) + np.packbits(mask, bitorder="little").tobytes()
    places = np.flatnonzero(mask)
    if len(places) * SPARSEST < len(mask):
        return best  # gaps would be refused: what they decode to is out of proportion
    gaps = np.diff(places, prepend=-1) - 1
    for bits in range(1, LARGEST_GAP + 1):
        escape = 2**bits - 1
        skips = gaps // escape
        words = len(gaps) + int(skips.sum())
        if 5 + packed_size(words, bits) >= len(best):
            continue
        stream = np.full(words, escape, dtype=np.uint16)
        stream[np.cumsum(skips + 1) - 1] = gaps % escape
        best = bytes([bits + 1]) + struct.pack("<I", words) + pack(stream, bits)
    return best


def decode_mask(reader: Reader, count: int, bits: int = 0) -> np.ndarray:
    """The `(count,)` bool mask that comes next, before values of `bits` bits."""
    (tag,) = reader.unpack("B")
    if tag == ALL:
        if count * bits > 8 * reader.left:
            raise BlobError(f"{count} values are due and {reader.left} bytes are left: the blob is truncated.")
        return np.ones(count, dtype=bool)
    if tag == BITMASK:
        return np.unpackbits(reader.array("u1", packed_size(count, 1)), bitorder="little", count=count).view(bool)
    gap = tag - 1
    if gap > LARGEST_GAP:
        raise BlobError(f"mask tag {tag} is unknown; the newest this version reads is {LARGEST_GAP + 1}.")
    (words,) = reader.unpack("I")
    stream = unpack(reader.take(packed_size(words, gap)), words, gap).astype(np.int64)
    kept = stream != 2**gap - 1
    places = (np.cumsum(stream + kept) - 1)[kept]
    if len(places) * SPARSEST < count:
        raise BlobError(
            f"a mask keeps {len(places)} of {count} places; at least one in {SPARSEST} is due: it is damaged."
        )
    if len(places) and places[-1] >= count:
        raise BlobError(f"a mask of {count} places keeps place {places[-1]}; the blob is damaged.")
    mask = np.zeros(count, dtype=bool)
    mask[places] = True
    return mask


def levels(bits: int) -> np.ndarray:
    """What the integers of `bits` bits stand for, in steps: `(2**bits,)`, symmetric, without zero."""
    return np.arange(2**bits, dtype=np.float32) - (2 ** (bits - 1) - 0.5)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to bfloat16, to even, as uint16."""
    raw = values.astype("<f4").view("<u4").astype(np.uint64)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype("<u2")


def quantize(columns: np.ndarray, bits: int, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Integers and steps of columns, each with the step that loses least.

    Args:
        columns (`np.ndarray`): `(R, M)` float32, a column of a factor in each row.
        bits (`int`): 1, 2, 3, 4 or 8.
        mask (`np.ndarray`, *optional*): `(R, M)` bool; only where it holds do values count.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: `(R, M)` uint8 and `(R,)` float16 steps.
    """
    half = 2 ** (bits - 1)
    weight = np.ones_like(columns) if mask is None else mask.astype(np.float32)
    count = weight.sum(1).clip(1)
    deviation = np.sqrt((weight * columns**2).sum(1) / count)
    best = np.zeros(len(columns), dtype=np.float16)
    lowest = np.full(len(columns), np.inf)
    for factor in _SEARCH:
        step = (deviation * (_STEPS[bits] * factor)).clip(6e-8, 6e4).astype(np.float16)
        wide = step.astype(np.float32)[:, None]
        rounded = (np.floor(columns / wide).clip(-half, half - 1) + 0.5) * wide
        loss = (weight * (rounded - columns) ** 2).sum(1)
        better = loss < lowest
        best[better], lowest[better] = step[better], loss[better]
    wide = best.astype(np.float32)[:, None]
    return (np.floor(columns / wide).clip(-half, half - 1) + half).astype(np.uint8), best


def dequantize(codes: np.ndarray, steps: np.ndarray, bits: int) -> np.ndarray:
    """`(R, M)` float32 from integers and `(R,)` steps."""
    return levels(bits)[codes] * steps.astype(np.float32)[:, None]
