"""The blob: all deltas of a fine-tune as one run of bytes, and back.

A delta is a sum of terms. A `LowRankTerm` is a pair of factors whose values are integers with a step per column, or
floats; masks say which entries exist. A `SignTerm` is one sign at each of `count` places of the matrix, all with one
magnitude; the places follow from a seed, so they cost nothing.

Layout, little endian: magic `OSD1`, format version (u8), three zero bytes, length of the header as stored and as
inflated (u32 each), length of the body (u64), CRC-32 of header and body (u32); the header (zlib: names, shapes, term
counts); the body (for each delta its terms: kind, then counts, steps, masks, values). Values lie column after column,
so leading ranks are a prefix. The same deltas give the same bytes. Whatever the blob declares is checked against its own
length before anything is allocated; nothing in it is executed.

Shapes: a delta is `(n, d)`; k columns; `left` `(k, n)` and `right` `(k, d)`, columns as rows; delta = left^T right.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hf_ext.errors import BlobError
from hf_ext.merging.codes import (
    SPARSEST,
    Reader,
    decode_mask,
    dequantize,
    encode_mask,
    pack,
    packed_size,
    to_bfloat16,
    unpack,
)


MAGIC, VERSION = b"OSD1", 1
_PREFIX = struct.Struct("<4sB3xIIQI")
MAX_HEADER = 16 << 20  # bytes of names and shapes, inflated
MAX_SIDE, MAX_RANK, MAX_TERMS = 1 << 26, 1 << 14, 64
LOW_RANK, SIGNS = 0, 1
FLOATS = (16, 32)


@dataclass(frozen=True)
class Factor:
    """One side of a pair, as stored.

    Args:
        bits (`int`): 1, 2, 3, 4 or 8: `values` are integers; 16 (bfloat16) or 32 (float32): they are bit patterns.
        values (`np.ndarray`): `(k, m)`; what a mask drops is not stored.
        steps (`np.ndarray`): `(k,)` float16, all one for floats.
        mask (`np.ndarray`, *optional*): `(k, m)` bool.
    """

    bits: int
    values: np.ndarray
    steps: np.ndarray
    mask: np.ndarray | None = None

    def decode(self) -> np.ndarray:
        """`(k, m)` float32."""
        if self.bits == 32:
            dense = self.values.view("<f4")
        elif self.bits == 16:
            dense = (self.values.astype("<u4") << 16).view("<f4")
        else:
            dense = dequantize(self.values, self.steps, self.bits)
        return dense if self.mask is None else np.where(self.mask, dense, np.float32(0))

    @classmethod
    def of_floats(cls, dense: np.ndarray, bits: int, mask: np.ndarray | None = None) -> Factor:
        """A factor kept as bfloat16 or float32."""
        values = to_bfloat16(dense) if bits == 16 else np.ascontiguousarray(dense, dtype="<f4").view("<u4")
        return cls(bits, values, np.ones(len(dense), dtype=np.float16), mask)


@dataclass(frozen=True)
class LowRankTerm:
    """`left^T right`, both decoded; `left` `(k, n)`, `right` `(k, d)`."""

    left: Factor
    right: Factor

    def scaled(self, weight: float) -> LowRankTerm:
        """The term times `weight`; integers stay as they are, only steps (or floats) of the left side change."""
        left = self.left
        if left.bits in FLOATS:
            return replace(self, left=Factor.of_floats(left.decode() * np.float32(weight), left.bits, left.mask))
        steps = (left.steps.astype(np.float32) * weight).astype(np.float16)
        return replace(self, left=replace(left, steps=steps))


@dataclass(frozen=True)
class SignTerm:
    """`magnitude` with a sign at each of `count` seeded places of an `(n, d)` matrix.

    Args:
        seed (`int`): below 2**32.
        magnitude (`float`): rounded to float32.
        negative (`np.ndarray`): `(count,)` bool.
    """

    seed: int
    magnitude: float
    negative: np.ndarray

    def places(self, size: int) -> np.ndarray:
        """`(count,)` int64 flat indices, increasing."""
        return seeded_places(self.seed, len(self.negative), size)

    def values(self) -> np.ndarray:
        """`(count,)` float32."""
        return np.where(self.negative, np.float32(-self.magnitude), np.float32(self.magnitude))

    def scaled(self, weight: float) -> SignTerm:
        """The term times `weight`."""
        return replace(self, magnitude=float(np.float32(self.magnitude * weight)))


@dataclass(frozen=True)
class Delta:
    """The terms of one tensor. A vector of length n is an `(n, 1)` matrix here, and `shape` says what it is."""

    shape: tuple[int, ...]
    terms: tuple[LowRankTerm | SignTerm, ...] = ()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(n, d)`."""
        return self.shape[0], int(np.prod(self.shape[1:], dtype=np.int64))

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """All low-rank terms side by side: `(k, n)` and `(k, d)` float32; k may be 0."""
        pairs = [(term.left.decode(), term.right.decode()) for term in self.terms if isinstance(term, LowRankTerm)]
        n, d = self.matrix_shape
        left = np.concatenate([np.zeros((0, n), dtype=np.float32), *(pair[0] for pair in pairs)])
        return left, np.concatenate([np.zeros((0, d), dtype=np.float32), *(pair[1] for pair in pairs)])

    def signs(self) -> tuple[np.ndarray, np.ndarray]:
        """All sign terms: flat places, int64, and their float32 values."""
        size = int(np.prod(self.matrix_shape, dtype=np.int64))
        found = [(term.places(size), term.values()) for term in self.terms if isinstance(term, SignTerm)]
        places = np.concatenate([np.zeros(0, dtype=np.int64), *(item[0] for item in found)])
        return places, np.concatenate([np.zeros(0, dtype=np.float32), *(item[1] for item in found)])

    def dense(self) -> np.ndarray:
        """The whole delta, float32, in `shape`."""
        left, right = self.factors()
        whole = left.T @ right
        places, values = self.signs()
        np.add.at(whole.reshape(-1), places, values)
        return whole.reshape(self.shape)


def seeded_places(seed: int, count: int, size: int) -> np.ndarray:
    """`count` different places below `size`, increasing: one in each of `count` even stretches.

    Within its stretch a place follows from SplitMix64 of seed and stretch. The generator is written out here, because a
    file must decode the same under every version of every library.
    """
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    # i * size // count, in a form that does not overflow.
    index, (whole, part) = np.arange(count + 1, dtype=np.uint64), divmod(size, count)
    edges = index * np.uint64(whole) + index * np.uint64(part) // np.uint64(count)
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (edges[:-1] + x % (edges[1:] - edges[:-1])).astype(np.int64)


def encode(deltas: dict[str, Delta]) -> bytes:
    """All deltas as one blob; the order of the mapping is kept.

    Args:
        deltas (`dict[str, Delta]`): by name of the tensor.

    Returns:
        `bytes`: what `decode` takes; equal for equal deltas.
    """
    shapes = [delta.shape for delta in deltas.values()]
    columns = [
        np.array([len(shape) for shape in shapes], dtype="<u1"),
        np.array([side for shape in shapes for side in shape], dtype="<u4"),
        np.array([len(delta.terms) for delta in deltas.values()], dtype="<u1"),
    ]
    names = "\n".join(deltas).encode()
    header = struct.pack("<II", len(deltas), len(names)) + names + b"".join(column.tobytes() for column in columns)
    packed = zlib.compress(header, 9)
    body = b"".join(_encode_term(term) for delta in deltas.values() for term in delta.terms)
    check = zlib.crc32(body, zlib.crc32(packed))
    return _PREFIX.pack(MAGIC, VERSION, len(packed), len(header), len(body), check) + packed + body


def term_size(term: LowRankTerm | SignTerm) -> int:
    """Bytes a term takes in the body."""
    return len(_encode_term(term))


def decode(blob: bytes) -> dict[str, Delta]:
    """The deltas of a blob.

    Raises:
        `BlobError`: not a blob of ours, of a later format, truncated, or damaged. No other error leaves this function,
            whatever the bytes are.
    """
    if len(blob) < _PREFIX.size or blob[:4] != MAGIC:
        raise BlobError(f"the data begins with {bytes(blob[:4])!r}, not with {MAGIC!r}: it holds no OSD delta.")
    _, version, packed, inflated, length, check = _PREFIX.unpack_from(blob)
    if version != VERSION:
        raise BlobError(f"the delta has format {version}; this version of hf-ext reads {VERSION}: upgrade hf-ext.")
    if _PREFIX.size + packed + length != len(blob):
        raise BlobError(
            f"the delta declares {_PREFIX.size + packed + length} bytes and has {len(blob)}: it is truncated or damaged."
        )
    if zlib.crc32(memoryview(blob)[_PREFIX.size :]) != check:
        raise BlobError("the delta's checksum does not match its content: it is damaged; download it again.")
    if inflated > MAX_HEADER:
        raise BlobError(f"the delta's header declares {inflated} bytes; at most {MAX_HEADER} are accepted.")
    inflater = zlib.decompressobj()
    try:
        header = inflater.decompress(blob[_PREFIX.size : _PREFIX.size + packed], inflated + 1)
    except zlib.error as error:
        raise BlobError(f"the delta's header cannot be inflated ({error}): it is damaged.") from None
    if len(header) != inflated or not inflater.eof:
        raise BlobError(f"the delta's header does not inflate to the {inflated} bytes it declares: it is damaged.")
    body = Reader(blob[_PREFIX.size + packed :])
    deltas = {}
    for name, shape, terms in _read_header(header):
        if name in deltas:
            raise BlobError(f"the delta holds {name!r} twice: it is damaged.")
        sides = shape[0], int(np.prod(shape[1:], dtype=object))
        deltas[name] = Delta(shape, tuple(_decode_term(body, *sides) for _ in range(terms)))
    if body.left:
        raise BlobError(f"the delta has {body.left} bytes after its last term: it is damaged.")
    return deltas


def _read_header(header: bytes) -> Iterator[tuple[str, tuple[int, ...], int]]:
    reader = Reader(header)
    count, length = reader.unpack("II")
    try:
        text = bytes(reader.take(length)).decode()
    except UnicodeDecodeError:
        raise BlobError("the delta's names are not text: it is damaged.") from None
    declared = text.count("\n") + 1 if text else 0
    # A shape and a number of terms take two bytes at least: without them no list of names is made.
    if declared != count or 2 * count > reader.left:
        raise BlobError(f"the delta declares {count} tensors and names {declared}: it is damaged.")
    names = text.split("\n") if count else []
    if not all(name.isprintable() and name for name in names):
        raise BlobError("the delta has a tensor without a printable name: it is damaged.")
    ranks = reader.array("u1", count)
    sides = reader.array("u4", int(ranks.sum()))
    terms = reader.array("u1", count)
    if reader.left:
        raise BlobError(f"the delta's header has {reader.left} bytes after its last tensor: it is damaged.")
    at = 0
    for name, rank, number in zip(names, ranks.tolist(), terms.tolist()):
        shape = tuple(sides[at : at + rank].tolist())
        at += rank
        if not shape or number > MAX_TERMS or not all(0 < side <= MAX_SIDE for side in shape):
            raise BlobError(f"the delta declares {name!r} with shape {shape} and {number} terms: it is damaged.")
        if np.prod(shape, dtype=object) >= 1 << 62:
            raise BlobError(f"the delta declares {name!r} with shape {shape}: no such tensor exists.")
        yield name, shape, number


def _encode_term(term: LowRankTerm | SignTerm) -> bytes:
    if isinstance(term, SignTerm):
        head = struct.pack("<BIIf", SIGNS, term.seed, len(term.negative), term.magnitude)
        return head + np.packbits(term.negative, bitorder="little").tobytes()
    k = len(term.left.values)
    return struct.pack("<BH", LOW_RANK, k) + _encode_factor(term.left) + _encode_factor(term.right)


def _encode_factor(factor: Factor) -> bytes:
    parts = [bytes([factor.bits])]
    if factor.bits not in FLOATS:
        parts.append(factor.steps.astype("<f2").tobytes())
    mask = np.ones(factor.values.size, dtype=bool) if factor.mask is None else factor.mask.reshape(-1)
    parts.append(encode_mask(mask))
    kept = factor.values.reshape(-1)[mask]
    if factor.bits in FLOATS:
        parts.append(kept.astype(f"<u{factor.bits // 8}").tobytes())
    else:
        parts.append(pack(kept, factor.bits))
    return b"".join(parts)


def _decode_term(body: Reader, n: int, d: int) -> LowRankTerm | SignTerm:
    (kind,) = body.unpack("B")
    if kind == SIGNS:
        seed, count, magnitude = body.unpack("IIf")
        if count > n * d or not np.isfinite(magnitude):
            raise BlobError(f"a sign term keeps {count} of {n * d} places with magnitude {magnitude}: it is damaged.")
        bits = body.array("u1", packed_size(count, 1))
        return SignTerm(seed, magnitude, np.unpackbits(bits, bitorder="little", count=count).view(bool))
    if kind != LOW_RANK:
        raise BlobError(
            f"a term has kind {kind}; this version of hf-ext knows {LOW_RANK} and {SIGNS}: upgrade hf-ext."
        )
    (k,) = body.unpack("H")
    if not 0 < k <= MAX_RANK:
        raise BlobError(f"a low-rank term declares {k} columns; 1 to {MAX_RANK} are accepted: it is damaged.")
    return LowRankTerm(_decode_factor(body, k, n), _decode_factor(body, k, d))


def _decode_factor(body: Reader, k: int, m: int) -> Factor:
    (bits,) = body.unpack("B")
    if bits not in (1, 2, 3, 4, 8, *FLOATS):
        raise BlobError(f"a factor has values of {bits} bits, which this version of hf-ext does not know.")
    # Before anything of this size is allocated: no value takes less than a bit, and no mask drops more than this.
    if k * m > 8 * SPARSEST * (body.left + 1):
        raise BlobError(f"a factor declares {k} x {m} values and {body.left} bytes are left: it is damaged.")
    steps = np.ones(k, dtype=np.float16)
    if bits not in FLOATS:
        steps = body.array("f2", k)
        if not np.isfinite(steps).all():
            raise BlobError("a factor has a step that is not finite: it is damaged.")
    mask = decode_mask(body, k * m, bits)
    kept = int(mask.sum())
    if bits in FLOATS:
        stored = body.array(f"u{bits // 8}", kept)
        wide = (stored.astype("<u4") << 16 if bits == 16 else stored).view("<f4")
        if not np.isfinite(wide).all():
            raise BlobError("a factor has a value that is not finite: it is damaged.")
    else:
        stored = unpack(body.take(packed_size(kept, bits)), kept, bits)
    if kept == k * m:
        return Factor(bits, stored.reshape(k, m), steps)
    values = np.zeros(k * m, dtype=stored.dtype)
    values[mask] = stored
    return Factor(bits, values.reshape(k, m), steps, mask.reshape(k, m))
