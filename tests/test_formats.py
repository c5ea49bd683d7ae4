"""The 2:4 format bit by bit: golden vectors, round trips, what is refused and why."""

import dataclasses
import math

import pytest
import torch

from sparseops.formats import FORMATS, NM24, SparseFormat
from sparseops.formats.nm24 import (
    NIBBLES,
    column_index,
    expand,
    gather,
    is_24,
    pack_columns,
    packed_cols,
    unpack_columns,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = (
    (1, 1),
    (3, 4),
    (5, 32),
    (2, 33),
    (7, 37),
    (4, 130),
    (0, 40),
    (4, 0),
    (3, 5, 3),
    (2, 8, 1),
    (4, 6, 3, 2),
    (3, 16, 1, 1),
    (2, 1, 5, 5),
    (2, 33, 3, 3),
)
# the columns each legal nibble keeps, in the order of the format's table
KEPT = {0x4: (0, 1), 0x8: (0, 2), 0x9: (1, 2), 0xC: (0, 3), 0xD: (1, 3), 0xE: (2, 3)}


def golden_weight(rows=16, cols=64):
    """Row r, group j keeps pair number (r + j) mod 6 of the nibbles 4, 8, C, 9, D, E."""
    order = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
    w = torch.zeros(rows, cols)
    for row in range(rows):
        for group in range(cols // 4):
            for slot, column in enumerate(KEPT[order[(row + group) % 6]]):
                w[row, 4 * group + column] = 1 + row + 16 * group + slot / 2
    return w


def words(meta, size):
    """A row of meta as little-endian words of ``size`` bytes."""
    raw = bytes(meta.tolist())
    return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]


def random_24(shape, dtype=torch.float32):
    return NM24.from_dense(torch.randn(shape).to(dtype), prune="magnitude").to_dense()


def test_golden_metadata_words():
    w = golden_weight()
    packed = NM24.from_dense(w)
    u16 = [words(row, 2) for row in packed.meta]
    assert [f"{word:04X}" for word in u16[0]] == ["9C84", "84ED", "ED9C", "9C84"]
    assert [f"{word:04X}" for word in u16[1]] == ["D9C8", "C84E", "4ED9", "D9C8"]
    assert [f"{word:04X}" for word in u16[8]] == ["ED9C", "9C84", "84ED", "ED9C"]
    assert [f"{word:04X}" for word in u16[9]] == ["4ED9", "D9C8", "C84E", "4ED9"]
    # what the lanes of mma.sp m16n8k32 hold: row g in the low half, row g + 8 in the high half
    lanes = {0: (0, 0), 1: (0, 1), 4: (1, 0), 5: (1, 1)}
    lane_words = {lane: u16[row][half] | u16[row + 8][half] << 16 for lane, (row, half) in lanes.items()}
    assert lane_words == {0: 0xED9C9C84, 1: 0x9C8484ED, 4: 0x4ED9D9C8, 5: 0xD9C8C84E}
    # and of the 8-bit m16n8k64: one row per lane, 32 columns per word
    u32 = [words(row, 4) for row in packed.meta]
    assert (u32[0], u32[1]) == ([0x84ED9C84, 0x9C84ED9C], [0xC84ED9C8, 0xD9C84ED9])
    assert (u32[8], u32[9]) == ([0x9C84ED9C, 0xED9C84ED], [0xD9C84ED9, 0x4ED9C84E])


def test_golden_values_ascend_with_their_columns():
    w = golden_weight()
    packed = NM24.from_dense(w)
    for row in range(16):
        assert torch.equal(packed.values[row], w[row][w[row] != 0])
    assert torch.equal(packed.to_dense(), w)


@pytest.mark.parametrize("nibble", NIBBLES)
def test_each_nibble_in_each_position(nibble):
    w = torch.zeros(8, 32)
    for group in range(8):
        for column in KEPT[nibble]:
            w[group, 4 * group + column] = -1.5 - column
    packed = NM24.from_dense(w)
    for group in range(8):
        found = int(packed.meta[group, group // 2]) >> 4 * (group % 2) & 15
        assert found == nibble
        rest = [int(byte) for b, byte in enumerate(packed.meta[group]) if b != group // 2]
        assert set(rest) == {0x44}
    assert torch.equal(packed.to_dense(), w)


@pytest.mark.parametrize(("column", "nibble"), [(0, 0x4), (1, 0x4), (2, 0x8), (3, 0xC)])
def test_a_lone_value_takes_the_lowest_free_column(column, nibble):
    w = torch.zeros(1, 4)
    w[0, column] = 2.0
    packed = NM24.from_dense(w)
    assert int(packed.meta[0, 0]) & 15 == nibble
    assert sorted(packed.values[0, :2].tolist()) == [0.0, 2.0]
    assert torch.equal(packed.to_dense(), w)


def test_zero_weights_store_0x4():
    packed = NM24.from_dense(torch.zeros(3, 40))
    assert (packed.meta == 0x44).all()
    assert not packed.values.any()
    assert (packed.energy_kept, packed.density, packed.nonfinite) == (1.0, 0.0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, dtype):
    w = random_24(shape, dtype)
    packed = NM24.from_dense(w)
    packed.validate()
    back = packed.to_dense()
    assert torch.equal(back, w)
    assert (back.dtype, back.is_contiguous()) == (dtype, True)
    assert packed.shape == shape
    assert packed.energy_kept == 1.0
    assert packed.values.shape == (shape[0], packed_cols(shape) // 2)
    assert packed.meta.shape == (shape[0], packed_cols(shape) // 8)
    assert packed.packed_cols % 32 == 0
    assert packed.nbytes == packed.values.numel() * w.element_size() + packed.meta.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_columns_is_inverted(shape):
    w = torch.randn(shape)
    packed = pack_columns(w)
    assert packed.shape == (shape[0], packed_cols(shape))
    assert torch.equal(unpack_columns(packed, shape), w)
    assert packed.count_nonzero() == w.count_nonzero()


def test_conv_columns_are_tap_row_tap_column_channel():
    w = torch.arange(2 * 6 * 3 * 2).reshape(2, 6, 3, 2).float() + 1
    packed = pack_columns(w)
    assert packed_cols(w.shape) == 64  # 6 taps of 8 columns are 48
    for r in range(3):
        for s in range(2):
            first = (r * 2 + s) * 8
            assert torch.equal(packed[:, first : first + 6], w[:, :, r, s])
            assert not packed[:, first + 6 : first + 8].any()
    assert not packed[:, 48:].any()


def test_conv_groups_run_along_the_channels():
    w = torch.zeros(1, 8, 3, 3)
    w[0, :2], w[0, 6:] = 1, 2  # two of each four channels in every tap, all nine taps of one channel
    packed = NM24.from_dense(w)
    assert is_24(w)
    assert torch.equal(packed.to_dense(), w)
    assert not is_24(w.transpose(0, 1).reshape(1, 8, 9).transpose(1, 2).contiguous())


def test_conv_of_one_channel_keeps_all():
    w = torch.randn(5, 1, 3, 3)
    assert torch.equal(NM24.from_dense(w).to_dense(), w)


def test_from_a_channels_last_weight():
    w = random_24((6, 12, 3, 3))
    last = NM24.from_dense(w.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last.to_dense(), w)
    assert last.values.is_contiguous() and last.meta.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_keeps_the_two_largest(dtype):
    w = torch.randn(9, 50).to(dtype)
    packed = NM24.from_dense(w, prune="magnitude")
    expected = torch.zeros_like(w)
    for row in range(9):
        for first in range(0, 50, 4):
            group = w[row, first : first + 4].tolist()
            ranked = sorted(range(len(group)), key=lambda i: (-abs(group[i]), i))
            for i in ranked[:2]:
                expected[row, first + i] = group[i]
    assert torch.equal(packed.to_dense(), expected)
    share = float(expected.double().square().sum() / w.double().square().sum())
    assert packed.energy_kept == pytest.approx(share, rel=1e-12)
    assert 0.5 < packed.energy_kept < 1


def test_ties_go_to_the_lower_column():
    w = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.5, 1.0, -1.0, 1.0]])
    kept = NM24.from_dense(w, prune="magnitude").to_dense()
    assert kept.tolist() == [[1.0, -1.0, 0.0, 0.0], [0.0, 1.0, -1.0, 0.0]]


def test_nonfinite_weights_are_the_largest_and_counted():
    nan, inf = math.nan, math.inf
    w = torch.tensor([[1e30, nan, 2.0, -inf], [nan, inf, nan, 1.0], [1.0, 2.0, 3.0, nan]])
    packed = NM24.from_dense(w, prune="magnitude")
    expected = torch.tensor([[0.0, nan, 0.0, -inf], [nan, inf, 0.0, 0.0], [0.0, 0.0, 3.0, nan]])
    torch.testing.assert_close(packed.to_dense(), expected, rtol=0, atol=0, equal_nan=True)
    assert packed.nonfinite == 6
    assert 0 <= packed.energy_kept <= 1
    packed.validate()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e38), (torch.float64, 1e300), (torch.float16, 6e-8)]
)
def test_energy_does_not_overflow(dtype, size):
    w = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=dtype) * size
    assert NM24.from_dense(w, prune="magnitude").energy_kept == pytest.approx(0.5)


def test_prune_does_not_change_a_24_weight():
    w = random_24((8, 64))
    packed = NM24.from_dense(w, prune="magnitude")
    assert torch.equal(packed.to_dense(), w)
    assert (packed.energy_kept, packed.density) == (1.0, 0.5)


def test_refused_weight_is_located():
    w = random_24((6, 64))
    w[4, 20:24] = torch.tensor([0.5, 0.0, -2.0, 1.0])
    assert not is_24(w)
    with pytest.raises(ValueError) as refused:
        NM24.from_dense(w)
    assert str(refused.value) == (
        "NM24.from_dense: w must have at most two non-zeros in each group of four "
        '(prune="magnitude" drops the smallest), got [0.5, 0.0, -2.0, 1.0] '
        "in row 4, group 5 (columns 20-23)"
    )


def test_refused_conv_weight_is_located():
    w = random_24((2, 8, 3, 2))
    w[1, 4:8, 2, 1] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(
        ValueError, match=r"\[1.0, 2.0, 3.0, 0.0\] in row 1, group 11 \(tap 2, 1, channels 4-7\)"
    ):
        NM24.from_dense(w)
    with pytest.raises(ValueError, match=r"in row 1, group 11 \(tap 5, channels 4-7\)"):
        NM24.from_dense(w.flatten(2))


def test_nan_counts_as_non_zero():
    with pytest.raises(ValueError, match="at most two non-zeros"):
        NM24.from_dense(torch.tensor([[1.0, math.nan, 1.0, 0.0]]))


@pytest.mark.parametrize(
    ("w", "error", "match"),
    [
        ([1.0], TypeError, "w must be a dense floating-point tensor, got list"),
        (
            torch.ones(4, 4, dtype=torch.int32),
            TypeError,
            "w must be a dense floating-point tensor, got torch.int32",
        ),
        (torch.ones(4, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
        (torch.eye(4).to_sparse(), TypeError, "got torch.float32, torch.sparse_coo"),
        (torch.ones(4), ValueError, r"w must have 2, 3 or 4 dimensions, got shape \(4,\)"),
        (torch.ones(1, 1, 1, 1, 1), ValueError, "w must have 2, 3 or 4 dimensions"),
        (torch.ones(4, 4, device="meta"), ValueError, "w must hold data, got a tensor on the meta device"),
    ],
)
def test_from_dense_refuses(w, error, match):
    with pytest.raises(error, match=f"^NM24.from_dense: .*{match}"):
        NM24.from_dense(w, prune="magnitude")


def test_from_dense_refuses_an_unknown_criterion():
    with pytest.raises(
        ValueError, match="^NM24.from_dense: prune must be None or \"magnitude\", got 'wanda'"
    ):
        NM24.from_dense(torch.ones(4, 4), prune="wanda")


def replaced(**changes):
    return dataclasses.replace(NM24.from_dense(random_24((3, 37))), **changes)


def test_validate_accepts_every_legal_byte():
    legal = [low | high << 4 for low in NIBBLES for high in NIBBLES]
    NM24(
        torch.randn(36, 16), torch.tensor(legal, dtype=torch.uint8).repeat(4, 1).t().contiguous(), (36, 32)
    ).validate()


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(NIBBLES)))
@pytest.mark.parametrize("group", [6, 7])
def test_validate_locates_an_illegal_nibble(nibble, group):
    packed = replaced()
    packed.meta[2, group // 2] = nibble << 4 | 0x4 if group % 2 else 0x40 | nibble
    with pytest.raises(ValueError) as refused:
        packed.validate()
    assert str(refused.value) == (
        "NM24: meta must hold only the nibbles 0x4 0x8 0x9 0xC 0xD 0xE, "
        f"got 0x{nibble:X} in row 2, group {group}"
    )


def test_validate_refuses_a_value_in_padding():
    packed = replaced()
    packed.values[1, 31] = 3.0
    with pytest.raises(ValueError, match="values must be 0 in padding columns, got 3.0 in row 1, group 15"):
        packed.validate()


def test_validate_refuses_a_value_in_the_padding_of_a_tap():
    packed = NM24.from_dense(random_24((2, 6, 3, 3)))
    packed.meta[1, 1] = (
        0xC4  # group 3 is the second of tap 1, channels 4-7, and there are six: 0 and 3 are kept
    )
    packed.values[1, 7] = 5.0
    with pytest.raises(ValueError, match="values must be 0 in padding columns, got 5.0 in row 1, group 3"):
        packed.validate()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"values": None}, "values must be a tensor, got NoneType"),
        ({"meta": [1]}, "meta must be a tensor, got list"),
        (
            {"values": torch.zeros(3, 32, dtype=torch.int32)},
            "values must have dtype .*float32.*, got torch.int32",
        ),
        (
            {"meta": torch.full((3, 8), 0x44, dtype=torch.int8)},
            "meta must have dtype torch.uint8, got torch.int8",
        ),
        ({"shape": (3,)}, r"shape must be 2, 3 or 4 sizes of at least 0, got \(3,\)"),
        ({"shape": (3, -37)}, "shape must be 2, 3 or 4 sizes of at least 0"),
        (
            {"meta": torch.zeros(3, 8, dtype=torch.uint8, device="meta")},
            r"meta must be on the device of values",
        ),
        ({"values": torch.zeros(3, 31)}, r"values must have shape \(3, 32\) for a weight of shape \(3, 37\)"),
        ({"values": torch.zeros(96)}, r"values must have shape \(3, 32\) .*, got \(96,\)"),
        (
            {"meta": torch.full((4, 8), 0x44, dtype=torch.uint8)},
            r"meta must have shape \(3, 8\) .*, got \(4, 8\)",
        ),
        ({"shape": (3, 65)}, r"values must have shape \(3, 48\)"),
        ({"values": torch.zeros(32, 3).t()}, r"values must be contiguous, got strides \(1, 3\)"),
        ({"meta": torch.full((8, 3), 0x44, dtype=torch.uint8).t()}, r"meta must be contiguous"),
    ],
)
def test_validate_refuses(changes, match):
    with pytest.raises(ValueError, match=f"^NM24: .*{match}"):
        replaced(**changes).validate()


def test_validate_on_the_meta_device_checks_what_it_can():
    packed = replaced()
    bare = replaced(values=packed.values.to("meta"), meta=packed.meta.to("meta"))
    bare.validate()
    with pytest.raises(ValueError, match="values must have shape"):
        dataclasses.replace(bare, shape=(3, 200)).validate()


def test_column_index_names_the_column_of_each_value():
    w = golden_weight()
    packed = NM24.from_dense(w)
    columns = column_index(packed.meta)
    assert (columns.dtype, columns.shape) == (torch.int64, packed.values.shape)
    assert torch.equal(w.gather(1, columns), packed.values)
    assert (columns.diff(dim=1) > 0).all()


def test_gather_is_the_adjoint_of_expand():
    packed = NM24.from_dense(torch.randn(5, 96, dtype=torch.float64), prune="magnitude")
    values = packed.values.clone().requires_grad_()
    dense = expand(values, packed.meta)
    cotangent = torch.randn_like(dense)
    (grad,) = torch.autograd.grad(dense, values, cotangent)
    assert torch.equal(grad, gather(cotangent, packed.meta))


def test_to_dense_is_differentiable_in_values():
    packed = NM24.from_dense(torch.randn(4, 6, 3, 3, dtype=torch.float64), prune="magnitude")

    def dense(values):
        return dataclasses.replace(packed, values=values).to_dense()

    assert torch.autograd.gradcheck(dense, packed.values.requires_grad_())


def test_from_dense_cuts_the_gradient():
    assert not NM24.from_dense(torch.randn(4, 8, requires_grad=True), prune="magnitude").values.requires_grad


def test_negated_weights():
    w = random_24((4, 8))
    packed = NM24.from_dense(torch._neg_view(w))
    assert not packed.values.is_neg()
    assert torch.equal(packed.to_dense(), -w)


def test_density_counts_non_zeros():
    w = torch.zeros(2, 10)
    w[0, 0] = w[1, 9] = w[1, 8] = 1
    assert NM24.from_dense(w).density == pytest.approx(3 / 20)


def test_every_format_keeps_the_protocol():
    for key, cls in FORMATS.items():
        packed = cls.from_dense(torch.randn(4, 8), prune="magnitude")
        assert cls.key == key
        assert isinstance(packed, SparseFormat)
