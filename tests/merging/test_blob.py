"""A blob must come back bit for bit, stay readable for ever, and never surprise whoever opens a foreign one."""

import hashlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.errors import BlobError
from hf_ext.merging import blob as blobs
from hf_ext.merging.blob import Delta, Factor, LowRankTerm, SignTerm, decode, encode, seeded_places, term_size
from hf_ext.merging.codes import SPARSEST, quantize
from tests.reference import osd as reference


WIDTHS = [1, 2, 3, 4, 8, 16, 32]
PREFIX = struct.Struct("<4sB3xIIQI")


def factor(k, m, bits, density=1.0, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((k, m)).astype(np.float32)
    mask = rng.random((k, m)) < density if density < 1 else None
    if bits >= 16:
        return Factor.of_floats(dense, bits, mask)
    codes, steps = quantize(dense, bits, mask)
    return Factor(bits, codes, steps, mask)


def low_rank(n, d, k, bits, density=1.0, seed=0):
    return LowRankTerm(factor(k, n, bits, density, seed), factor(k, d, bits, density, seed + 1))


def signs(count, seed=0, magnitude=0.5):
    return SignTerm(seed, float(np.float32(magnitude)), np.random.default_rng(seed).random(count) < 0.5)


def example():
    """A blob with one of everything, small enough to try every length of it."""
    return {
        "h.0.weight": Delta((5, 7), (low_rank(5, 7, 2, 4), low_rank(5, 7, 1, 2, seed=3))),
        "h.0.bias": Delta((6,), (low_rank(6, 1, 1, 8),)),
        "conv.weight": Delta((4, 3, 2), (signs(9, seed=77),)),
        "x.weight": Delta(
            (8, 20), (low_rank(8, 20, 3, 16, 0.3), signs(16, seed=5, magnitude=2), low_rank(8, 20, 1, 1))
        ),
        "unchanged": Delta((2, 2)),
        "full": Delta((3, 3), (low_rank(3, 3, 1, 32), low_rank(3, 3, 2, 3, 0.6))),
    }


def repacked(header, body, magic=b"OSD1", version=1, inflated=None, packed=None):
    """A blob with lengths and checksum of its own content, whatever that is."""
    packed = zlib.compress(header, 1) if packed is None else packed
    check = zlib.crc32(body, zlib.crc32(packed))
    inflated = len(header) if inflated is None else inflated
    return PREFIX.pack(magic, version, len(packed), inflated, len(body), check) + packed + body


def parts(blob):
    packed = PREFIX.unpack_from(blob)[2]
    return zlib.decompress(blob[PREFIX.size : PREFIX.size + packed]), blob[PREFIX.size + packed :]


def header_of(names, shapes, terms, count=None):
    text = "\n".join(names).encode() if not isinstance(names, bytes) else names
    return b"".join(
        [
            struct.pack("<II", len(shapes) if count is None else count, len(text)),
            text,
            bytes(len(shape) for shape in shapes),
            b"".join(struct.pack("<I", side) for shape in shapes for side in shape),
            bytes(terms),
        ]
    )


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, delta in expected.items():
        assert found[name].shape == delta.shape
        assert len(found[name].terms) == len(delta.terms)
        for one, other in zip(found[name].terms, delta.terms):
            assert type(one) is type(other)
            if isinstance(one, SignTerm):
                assert (one.seed, one.magnitude) == (other.seed, other.magnitude)
                assert np.array_equal(one.negative, other.negative)
                continue
            for a, b in ((one.left, other.left), (one.right, other.right)):
                assert a.bits == b.bits
                assert a.steps.tobytes() == b.steps.tobytes()
                assert a.decode().dtype == np.float32
                assert a.decode().tobytes() == b.decode().tobytes(), "not bit for bit"
        assert found[name].dense().tobytes() == delta.dense().tobytes()


# Round trip


@pytest.mark.parametrize("density", [0.005, 0.02, 0.1, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_value_type_comes_back_bit_for_bit_at_every_density(bits, density):
    term = low_rank(331, 257, 3, bits, density, seed=bits)
    deltas = {"w": Delta((331, 257), (term,))}
    blob = encode(deltas)
    assert encode(deltas) == blob
    found = decode(blob)
    assert_same(found, deltas)
    assert encode(found) == blob
    assert len(parts(blob)[1]) == term_size(term)


def test_masks_with_nothing_or_next_to_nothing_come_back():
    for kept in (0, 1, 3):
        one, other = factor(2, 1000, 4), factor(2, 30, 4)
        mask = np.zeros((2, 1000), dtype=bool)
        mask.reshape(-1)[777 : 777 + kept] = True
        deltas = {"w": Delta((1000, 30), (LowRankTerm(Factor(4, one.values, one.steps, mask), other),))}
        assert_same(decode(encode(deltas)), deltas)


def test_several_terms_vectors_signs_and_higher_orders_come_back():
    deltas = example()
    blob = encode(deltas)
    found = decode(blob)
    assert_same(found, deltas)
    assert encode(found) == blob
    assert decode(encode({})) == {}


def test_a_second_reader_written_from_the_description_agrees():
    blob = encode(example())
    for name, dense in reference.read_blob(blob).items():
        np.testing.assert_allclose(decode(blob)[name].dense(), dense, rtol=1e-5, atol=1e-5)


def test_the_format_is_frozen():
    """Blobs of format 1 must be read, and written, the same by every later version and on every machine."""
    deltas = {
        "a.weight": Delta(
            (3, 4),
            (
                LowRankTerm(
                    Factor(4, np.array([[0, 15, 7]], dtype=np.uint8), np.array([0.5], dtype=np.float16)),
                    Factor(
                        4,
                        np.array([[1, 0, 3, 9]], dtype=np.uint8),
                        np.array([0.25], dtype=np.float16),
                        np.array([[True, False, True, True]]),
                    ),
                ),
                SignTerm(123, 0.75, np.array([True, False, True, True, False])),
            ),
        ),
        "b.bias": Delta((2,), (LowRankTerm(*(Factor.of_floats(np.ones((1, m)) * 1.5, 16) for m in (2, 1))),)),
    }
    _, body = parts(encode(deltas))
    assert body.hex() == (
        "00" "0100" "04" "0038" "00" "f007" "04" "0034" "01" "0d" "3109"  # factors of 4 bits, the right one masked
        "01" "7b000000" "05000000" "0000403f" "0d"  # signs
        "00" "0100" "10" "00" "c03fc03f" "10" "00" "c03f"  # bfloat16
    )  # fmt: skip
    header = header_of(["a.weight", "b.bias"], [(3, 4), (2,)], [2, 1])
    assert parts(encode(deltas))[0] == header
    # The stored header depends on the zlib at hand; its content does not.
    assert hashlib.sha256(repacked(header, body, packed=_stored(header))).hexdigest() == GOLDEN_DIGEST
    assert_same(decode(repacked(header, body, packed=_stored(header))), deltas)


def _stored(data):
    """A zlib stream without compression, the same under every library."""
    head = b"\x78\x01\x01" + struct.pack("<HH", len(data), len(data) ^ 0xFFFF)
    return head + data + struct.pack(">I", zlib.adler32(data))


GOLDEN_DIGEST = "74b03f9411d494f2f7463b3fbf7463b9a113b538223b684f6bb0bfb81f003d03"


def test_order_of_names_is_kept_and_changes_the_bytes():
    deltas = example()
    turned = dict(reversed(deltas.items()))
    assert list(decode(encode(turned))) == list(turned)
    assert encode(turned) != encode(deltas)


def test_names_of_any_alphabet_come_back():
    deltas = {"модель.слой.weight": Delta((2,), (signs(1),)), "層.0": Delta((2,), (signs(2),))}
    assert_same(decode(encode(deltas)), deltas)


# What a delta means


def test_dense_is_the_sum_of_its_terms():
    deltas = example()
    delta = deltas["x.weight"]
    left, right = delta.factors()
    assert (left.shape, right.shape) == ((4, 8), (4, 20))
    expected = np.zeros((8, 20))
    for a, b in zip(left, right):
        expected += np.outer(a.astype(np.float64), b)
    places, values = delta.signs()
    for place, value in zip(places, values):
        expected[place // 20, place % 20] += value
    np.testing.assert_allclose(delta.dense(), expected, rtol=0, atol=1e-5)
    assert (deltas["unchanged"].dense() == 0).all()
    assert deltas["conv.weight"].dense().shape == (4, 3, 2)
    assert deltas["h.0.bias"].dense().shape == (6,)


@pytest.mark.parametrize("weight", [2.0, -0.5, 0.3, 0.0])
def test_a_scaled_term_is_the_term_times_the_weight(weight):
    for bits in WIDTHS:
        before = Delta((9, 11), (low_rank(9, 11, 2, bits, 0.5), signs(20)))
        after = Delta((9, 11), tuple(term.scaled(weight) for term in before.terms))
        coarse = {16: 2**-8, 32: 1e-6}.get(bits, 2**-11)
        size = np.abs(before.dense()).max()
        np.testing.assert_allclose(after.dense(), weight * before.dense(), rtol=0, atol=3 * coarse * size)
        assert_same(decode(encode({"w": after})), {"w": after})


# Seeded places


def test_seeded_places_equal_python_integers():
    for seed, count, size in (
        (0, 1, 1),
        (1, 7, 7),
        (5, 10, 97),
        (2**32 - 1, 100, 1000),
        (9, 64, 2**40),
        (3, 999, 1000),
    ):
        assert seeded_places(seed, count, size).tolist() == reference.seeded_places(seed, count, size)


def test_seeded_places_increase_differ_and_lie_in_range():
    for seed in range(20):
        for count, size in ((1, 5), (5, 5), (300, 1000), (999, 1000), (4096, 65536)):
            places = seeded_places(seed, count, size)
            assert len(places) == count
            assert (np.diff(places) > 0).all()
            assert 0 <= places[0] <= places[-1] < size
    assert len(seeded_places(3, 0, 100)) == 0
    assert not np.array_equal(seeded_places(0, 300, 1000), seeded_places(1, 300, 1000))


def test_seeded_places_reach_every_place_evenly():
    hits = np.zeros(100)
    for seed in range(4000):
        hits[seeded_places(seed, 10, 100)] += 1
    assert hits.sum() == 40_000
    assert abs(hits - 400).max() < 5 * np.sqrt(400 * 0.9)


def test_seeded_places_of_huge_tensors_do_not_wrap_around():
    places = seeded_places(1, 1 << 12, 1 << 55)
    assert (np.diff(places) > 0).all()
    assert places.tolist() == reference.seeded_places(1, 1 << 12, 1 << 55)


def test_the_generator_of_places_is_frozen():
    """A file must decode the same under every version of every library."""
    assert seeded_places(0, 8, 1000).tolist() == GOLDEN_PLACES[0]
    assert seeded_places(4_000_000_000, 8, 1 << 33).tolist() == GOLDEN_PLACES[1]


GOLDEN_PLACES = [
    [35, 200, 304, 444, 622, 715, 788, 940],
    [504837527, 1227134826, 2700723661, 3798786437, 4624036401, 6192647228, 7018911861, 8170700650],
]


def test_signs_at_seeded_places_keep_the_inner_product_on_average():
    rng = np.random.default_rng(0)
    delta = (rng.standard_normal(6400) * np.linspace(0.1, 2, 6400)).astype(np.float32)
    energy = float((delta.astype(np.float64) ** 2).sum())
    for count in (320, 3200):
        magnitude = float((delta**2).mean() / np.abs(delta).mean() / (count / 6400))
        found = []
        for seed in range(400):
            negative = delta[seeded_places(seed, count, 6400)] < 0
            dense = Delta((80, 80), (SignTerm(seed, magnitude, negative),)).dense()
            found.append(float(dense.reshape(-1) @ delta))
        spread = np.std(found) / np.sqrt(len(found))
        assert abs(np.mean(found) - energy) < 4 * spread + 1e-4 * energy
        # The mean of |d| alone, as one-bit codes take it, keeps less.
        plain = np.array(found) * (np.abs(delta).mean() * 6400 / count) / magnitude
        assert plain.mean() < energy - 10 * spread


# Damage


def test_foreign_data_is_named():
    for data in (b"", b"OSD", b"PK\x03\x04" + bytes(100), bytes(28)):
        with pytest.raises(BlobError, match="not with b'OSD1': it holds no OSD delta"):
            decode(data)
    with pytest.raises(BlobError, match="not with"):
        decode(encode({})[: PREFIX.size - 1])


def test_a_later_format_asks_for_an_upgrade():
    header, body = parts(encode(example()))
    with pytest.raises(BlobError, match=r"format 2; this version of hf-ext reads 1: upgrade"):
        decode(repacked(header, body, version=2))


def test_every_truncation_is_refused():
    blob = encode(example())
    for end in range(len(blob)):
        with pytest.raises(BlobError):
            decode(blob[:end])
    with pytest.raises(BlobError, match="truncated or damaged"):
        decode(blob + b"\0")


def test_every_flipped_bit_is_noticed():
    blob = encode(example())
    reserved = range(5, 8)
    for at in range(len(blob)):
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[at] ^= 1 << bit
            if at in reserved:
                continue
            with pytest.raises(BlobError):
                decode(bytes(damaged))


def test_every_truncation_with_a_correct_checksum_is_refused():
    header, body = parts(encode(example()))
    for end in range(len(body)):
        with pytest.raises(BlobError, match="truncated|damaged"):
            decode(repacked(header, body[:end]))
    for end in range(len(header)):
        with pytest.raises(BlobError, match="truncated|damaged"):
            decode(repacked(header[:end], body))
    with pytest.raises(BlobError, match="1 bytes after its last term"):
        decode(repacked(header, body + b"\0"))


TERM = struct.pack("<BH", 0, 1)


@pytest.mark.parametrize(
    ("header", "body", "match"),
    [
        (header_of(["w"], [(2, 2)], [1]), struct.pack("<BIIf", 1, 0, 5, 1.0) + bytes(9), "5 of 4 places"),
        (header_of(["w"], [(9, 9)], [1]), struct.pack("<BIIf", 1, 0, 5, np.nan) + bytes(9), "magnitude nan"),
        (header_of(["w"], [(9, 9)], [1]), struct.pack("<BIIf", 1, 0, 5, np.inf) + bytes(9), "magnitude inf"),
        (header_of(["w"], [(9, 9)], [1]), b"\x07" + bytes(50), "kind 7.*upgrade"),
        (header_of(["w"], [(9, 9)], [1]), struct.pack("<BH", 0, 0) + bytes(50), "0 columns"),
        (header_of(["w"], [(9, 9)], [1]), struct.pack("<BH", 0, 65535) + bytes(50), "65535 columns"),
        (header_of(["w"], [(9, 9)], [1]), TERM + b"\x05" + bytes(50), "values of 5 bits"),
        (header_of(["w"], [(9, 9)], [1]), TERM + b"\x04" + struct.pack("<e", np.inf) + bytes(50), "step"),
        (header_of(["w"], [(1, 1)], [1]), TERM + b"\x20\0" + struct.pack("<f", np.nan) + bytes(9), "value"),
        (header_of(["w"], [(1, 1)], [1]), TERM + b"\x10\0" + b"\x80\x7f" + bytes(9), "value that is not finite"),
        (header_of(["w"], [(1 << 26, 9)], [1]), TERM + b"\x01" + bytes(50), "67108864 values and 50 bytes"),
        (header_of(["w"], [(1 << 26, 1 << 26)], [1]), TERM + b"\x01" + bytes(50), "values and 50 bytes"),
        (header_of(["w"], [((1 << 26) + 1,)], [1]), b"", "shape"),
        (header_of(["w"], [(1 << 26,) * 3], [1]), b"", "no such tensor"),
        (header_of(["w"], [(0, 4)], [0]), b"", "shape"),
        (header_of(["w"], [()], [0]), b"", "shape"),
        (header_of(["w"], [(2,)], [65]), b"", "65 terms"),
        (header_of(["w", "w"], [(2,), (2,)], [0, 0]), b"", "'w' twice"),
        (header_of(["w", ""], [(2,), (2,)], [0, 0]), b"", "printable name"),
        (header_of(["w\x00"], [(2,)], [0]), b"", "printable name"),
        (header_of(["w"], [(2,), (2,)], [0, 0]), b"", "declares 2 tensors and names 1"),
        (header_of(["w"], [(2,)], [0], count=1 << 31), b"", "declares"),
        (header_of(b"\xff\xfe\xfd", [(2,)], [0]), b"", "not text"),
        (header_of(["w"], [(2,)], [0]) + b"more", b"", "4 bytes after its last tensor"),
        (b"", b"", "truncated"),
    ],
)
def test_what_a_blob_declares_is_checked(header, body, match):
    with pytest.raises(BlobError, match=match):
        decode(repacked(header, body))


def test_declared_lengths_are_checked_before_anything_else():
    header, body = parts(encode(example()))
    good = repacked(header, body)
    for packed, inflated, length in ((2**32 - 1, 100, 100), (10, 100, 2**63), (10, 2**32 - 1, len(good) - 34)):
        with pytest.raises(BlobError):
            decode(PREFIX.pack(b"OSD1", 1, packed, inflated, length, 0) + good[PREFIX.size :])
    for inflated in (0, 1, len(header) - 1, len(header) + 1):
        with pytest.raises(BlobError, match="does not inflate to"):
            decode(repacked(header, body, inflated=inflated))
    with pytest.raises(BlobError, match="at most 16777216"):
        decode(repacked(header, body, inflated=blobs.MAX_HEADER + 1))
    with pytest.raises(BlobError, match="cannot be inflated"):
        decode(repacked(header, body, packed=b"no zlib at all"))


def _peak(blob):
    """Bytes at the highest point of a decode that must fail."""
    tracemalloc.start()
    try:
        with pytest.raises(BlobError):
            decode(blob)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_bomb_is_refused_in_little_memory():
    """1 GiB of zeros in a megabyte: one flushed piece, repeated."""
    squeezer = zlib.compressobj(9)
    first = squeezer.compress(bytes(1 << 20)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    piece = squeezer.compress(bytes(1 << 20)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    bomb = first + piece * 1023
    assert len(bomb) < 2 << 20
    for inflated in (100, 1 << 20, blobs.MAX_HEADER, 1 << 30, 2**32 - 1):
        peak = _peak(repacked(b"", b"", inflated=inflated, packed=bomb))
        assert peak < 4 * blobs.MAX_HEADER, f"{inflated}: {peak / 2**20:.0f} MiB"


def test_a_header_of_empty_names_is_refused_in_little_memory():
    count = blobs.MAX_HEADER - 100
    header = struct.pack("<II", count, count - 1) + b"\n" * (count - 1)
    peak = _peak(repacked(header, b""))
    assert peak < 5 * blobs.MAX_HEADER, f"{peak / 2**20:.0f} MiB"


def test_large_declared_factors_allocate_in_proportion_to_the_file():
    body = TERM + b"\x01" + bytes(3)
    for side in (1 << 20, 1 << 26):
        assert _peak(repacked(header_of(["w"], [(side, side)], [1]), body)) < 1 << 20
    # The worst that is let through: the limit itself, as a mask of "all".
    body = TERM + b"\x08" + bytes(2) + b"\0" + bytes(2000)
    assert _peak(repacked(header_of(["w"], [(SPARSEST * 8 * 2000, 1)], [1]), body)) < 16 * SPARSEST * 8 * 2000


# Fuzz

EXAMPLES = [
    encode(example()),
    encode({"a": Delta((300, 200), (low_rank(300, 200, 2, 4, 0.05), low_rank(300, 200, 1, 16, 0.02)))}),
    encode({f"l.{i}.weight": Delta((16, 8), (signs(32, seed=i), low_rank(16, 8, 1, i + 1))) for i in range(4)}),
]
_CHANGE = st.tuples(
    st.sampled_from(["flip", "byte", "cut", "splice", "drop", "extreme"]),
    st.integers(0, 2**16),
    st.integers(0, 2**16),
    st.integers(0, 255),
)
tried = {"blobs": 0, "read": 0}


def _mutated(data, change):
    what, at, other, value = change
    if not data:
        return bytes([value])
    at, other, data = at % len(data), other % len(data), bytearray(data)
    if what == "flip":
        data[at] ^= 1 << (value % 8)
    elif what == "byte":
        data[at] = value
    elif what == "cut":
        del data[at:]
    elif what == "splice":
        data[at:at] = data[other : other + value % 32]
    elif what == "drop":
        del data[at : at + 1 + value % 8]
    else:
        data[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x01\0\0\0")[value % 4]
    return bytes(data)


def _try(blob):
    tried["blobs"] += 1
    try:
        deltas = decode(blob)
    except BlobError:
        return
    tried["read"] += 1
    entries = 0
    for delta in deltas.values():
        n, d = delta.matrix_shape
        for term in delta.terms:
            if isinstance(term, SignTerm):
                assert len(term.negative) <= n * d
                assert np.isfinite(term.magnitude)
                entries += len(term.negative)
                continue
            for side, length in ((term.left, n), (term.right, d)):
                dense = side.decode()
                assert dense.shape == side.values.shape == (len(term.left.values), length)
                assert dense.dtype == np.float32
                assert np.isfinite(dense).all()
                entries += dense.size
        if n * d <= 1 << 16 and entries < 1 << 20:
            with np.errstate(over="ignore", invalid="ignore"):
                assert delta.dense().shape == delta.shape
    assert entries <= 8 * SPARSEST * len(blob)
    # What was read can be written, and read again as the same.
    again = encode(deltas)
    assert_same_values(decode(again), deltas)
    assert encode(decode(again)) == again


def assert_same_values(found, expected):
    assert list(found) == list(expected)
    for name, delta in expected.items():
        for one, other in zip(found[name].terms, delta.terms):
            if isinstance(one, LowRankTerm):
                assert one.left.decode().tobytes() == other.left.decode().tobytes()
                assert one.right.decode().tobytes() == other.right.decode().tobytes()


@settings(max_examples=700, derandomize=True, deadline=None, database=None)
@given(st.integers(0, len(EXAMPLES) - 1), st.lists(_CHANGE, min_size=4, max_size=6))
def _fuzz(which, changes):
    blob = EXAMPLES[which]
    header, body = parts(blob)
    all_headers, all_bodies = header, body
    for change in changes:
        _try(_mutated(blob, change))
        # With lengths and checksum repaired, so that the deeper checks are reached.
        _try(repacked(_mutated(header, change), body))
        _try(repacked(header, _mutated(body, change)))
        all_headers, all_bodies = _mutated(all_headers, change), _mutated(all_bodies, change)
    _try(repacked(header, all_bodies))
    _try(repacked(all_headers, body))
    _try(repacked(all_headers, all_bodies))


@pytest.mark.slow
def test_only_blob_errors_leave_the_decoder():
    tried.update(blobs=0, read=0)
    _fuzz()
    assert tried["blobs"] >= 10_000
    assert tried["read"] >= 500, f"only {tried['read']} mutations got past the checks: nothing deep was tried"
