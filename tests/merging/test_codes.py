"""Numbers and masks must survive their bytes, masks must cost little more than their entropy."""

import numpy as np
import pytest

from hf_ext.errors import BlobError
from hf_ext.merging.codes import (
    ALL,
    BITMASK,
    LARGEST_GAP,
    SPARSEST,
    Reader,
    decode_mask,
    dequantize,
    encode_mask,
    levels,
    pack,
    packed_size,
    quantize,
    to_bfloat16,
    unpack,
)
from tests.reference import osd as reference


DENSITIES = np.geomspace(0.02, 0.5, 25)


def _mask(density, count, seed=0):
    return np.random.default_rng(seed).random(count) < density


@pytest.mark.parametrize("bits", range(1, 10))
def test_packing_is_that_of_one_long_integer(bits):
    rng = np.random.default_rng(bits)
    for count in (0, 1, 2, 7, 8, 9, 31, 257):
        values = rng.integers(0, 2**bits, count).astype(np.uint16)
        packed = pack(values, bits)
        assert packed == reference.pack(values.tolist(), bits)
        assert len(packed) == packed_size(count, bits)
        assert unpack(memoryview(packed), count, bits).tolist() == values.tolist()


@pytest.mark.parametrize("density", [0.005, 0.01, 0.02, 0.1, 0.37, 0.5, 0.9, 0.999, 1.0])
def test_a_mask_comes_back_and_takes_the_shortest_code(density):
    mask = _mask(density, 4099)
    coded = encode_mask(mask)
    reader = Reader(coded + b"after")
    assert np.array_equal(decode_mask(reader, len(mask)), mask)
    assert bytes(reader.take(reader.left)) == b"after"
    assert len(coded) == reference.mask_bytes(mask.tolist())
    assert encode_mask(mask) == coded


@pytest.mark.parametrize(
    "places", [[0], [255], [100], [0, 255], [0, 1, 2], [254, 255], [*range(0, 256, 7)], [*range(255)]], ids=str
)
def test_masks_with_few_places_or_odd_ends_come_back(places):
    for count in (256, 257, 300, 511):
        mask = np.zeros(count, dtype=bool)
        mask[places] = True
        assert np.array_equal(decode_mask(Reader(encode_mask(mask)), count), mask)


@pytest.mark.parametrize("places", [[], [0], [9_999], [17, 5000]], ids=str)
def test_a_mask_sparser_than_a_reader_accepts_in_gaps_is_written_as_bits(places):
    mask = np.zeros(10_000, dtype=bool)
    mask[places] = True
    coded = encode_mask(mask)
    assert coded[0] == BITMASK
    assert np.array_equal(decode_mask(Reader(coded), len(mask)), mask)


def test_mask_tags_name_their_code():
    assert encode_mask(np.ones(64, dtype=bool)) == bytes([ALL])
    assert encode_mask(_mask(0.5, 1024))[0] == BITMASK
    for bits in (3, 5, 8):
        assert encode_mask(np.arange(2**15) % (2**bits - 1) == 0)[0] == bits + 1


def test_mask_code_stays_near_the_entropy():
    count = 262_144
    for density in DENSITIES:
        mask = _mask(density, count, seed=int(1e6 * density))
        kept = mask.mean()
        bound = -count * (kept * np.log2(kept) + (1 - kept) * np.log2(1 - kept))
        bits = 8 * len(encode_mask(mask))
        assert bits <= 1.10 * bound, f"density {density:.3f}: {bits / bound:.3f} of the entropy"
        # No code of a random mask beats its entropy; what one draw may save is far below this.
        assert bits >= bound - 200, f"density {density:.3f}: {bits / bound:.3f} of the entropy"


def test_damaged_masks_are_refused():
    with pytest.raises(BlobError, match="tag 11 is unknown"):
        decode_mask(Reader(bytes([LARGEST_GAP + 2]) + bytes(64)), 8)
    with pytest.raises(BlobError, match="truncated"):
        decode_mask(Reader(b""), 8)
    for mask in (_mask(0.5, 999), _mask(0.1, 999)):
        coded = encode_mask(mask)
        for end in range(len(coded)):
            with pytest.raises(BlobError, match="truncated"):
                decode_mask(Reader(coded[:end]), len(mask))
    gaps = encode_mask(_mask(0.1, 999))
    assert gaps[0] > BITMASK
    with pytest.raises(BlobError, match="of 500 places keeps place"):
        decode_mask(Reader(gaps), 500)
    with pytest.raises(BlobError, match=f"one in {SPARSEST}"):
        decode_mask(Reader(gaps), 999 * SPARSEST)


def test_the_reader_never_answers_short():
    reader = Reader(b"abcdef")
    assert bytes(reader.take(2)) == b"ab"
    assert reader.unpack("H") == (0x6463,)
    assert reader.left == 2
    for count in (3, -1, 1 << 60):
        with pytest.raises(BlobError, match="ends after 2 more bytes"):
            reader.take(count)
    assert reader.array("u1", 2).tolist() == [101, 102]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_integers_are_the_nearest_levels_of_a_good_step(bits):
    rng = np.random.default_rng(0)
    columns = (rng.standard_normal((6, 200)) * np.array([1e-4, 1e-2, 0.3, 1, 50, 1e4])[:, None]).astype(np.float32)
    mask = rng.random(columns.shape) < 0.4
    for where in (None, mask):
        codes, steps = quantize(columns, bits, where)
        assert codes.dtype == np.uint8
        assert steps.dtype == np.float16
        assert codes.max() < 2**bits
        decoded = dequantize(codes, steps, bits)
        counted = np.ones_like(mask) if where is None else where
        for row in range(len(columns)):
            grid = levels(bits).astype(np.float64) * float(steps[row])
            nearest = np.abs(columns[row][:, None] - grid).min(1)
            assert np.abs(np.abs(decoded[row] - columns[row]) - nearest).max() <= 1e-6 * np.abs(columns[row]).max()
            # No step of a fine grid does much better than the one that was found.
            kept, best = columns[row][counted[row]].astype(np.float64), np.inf
            for step in np.geomspace(0.02, 4, 120) * kept.std():
                grid = levels(bits) * step
                best = min(best, (np.abs(kept[:, None] - grid).min(1) ** 2).sum())
            found = ((decoded[row] - columns[row])[counted[row]].astype(np.float64) ** 2).sum()
            # Eight bits lose so little that the coarse search is enough.
            assert found <= (1.12 if bits < 8 else 1.5) * best, (
                f"{bits} bits, row {row}: {found / best:.3f} of the best"
            )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_quantised_column_quantises_to_itself(bits):
    """Decoded values lie on levels, so that a second pass over the same step finds the same integers."""
    columns = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    codes, steps = quantize(columns, bits)
    decoded = dequantize(codes, steps, bits)
    half = 2 ** (bits - 1)
    again = np.floor(decoded / steps.astype(np.float32)[:, None]) + half
    assert np.array_equal(again, codes)
    assert np.array_equal(levels(bits), -levels(bits)[::-1])
    assert 0 not in levels(bits)


def test_columns_of_zeros_and_of_one_value_stay_small():
    codes, steps = quantize(np.zeros((2, 16), dtype=np.float32), 4)
    assert np.abs(dequantize(codes, steps, 4)).max() < 1e-7
    ones = np.full((1, 16), 0.25, dtype=np.float32)
    for bits in (1, 2, 3, 4, 8):
        assert np.abs(dequantize(*quantize(ones, bits), bits) - 0.25).max() < 0.02


def test_bfloat16_rounds_to_nearest_even():
    rng = np.random.default_rng(2)
    values = (rng.standard_normal(500) * 10.0 ** rng.integers(-20, 20, 500)).astype(np.float32)
    halves = np.arange(0x3F800000, 0x3F800000 + (1 << 19), 1 << 15, dtype=np.uint32).view(np.float32)
    for value in [*values, *halves, np.float32(0), np.float32(-0.0), np.float32(1e-45)]:
        assert to_bfloat16(np.array([value]))[0] == reference.bfloat16(float(value)), value
