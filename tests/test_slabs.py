"""Metadata as GPU kernels read it: what PTX says an instruction takes, bit for bit, and the way back."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseops.formats import NM24
from sparseops.formats.nm24 import NIBBLES
from sparseops.formats.nm24_slabs import pack_slabs, slab_rows, unpack_slabs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"


def random_meta(rows, cols, seed=0):
    generator = torch.Generator().manual_seed(seed)
    nibbles = torch.tensor(NIBBLES, dtype=torch.uint8)[
        torch.randint(0, 6, (rows, cols // 4), generator=generator)
    ]
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def nibble_of(meta, row, group):
    return int(meta[row, group // 2]) >> 4 * (group % 2) & 15


def words(slot):
    """The four 32-bit words of a slot, little-endian."""
    return [int.from_bytes(bytes(slot[4 * i : 4 * i + 4].tolist()), "little") for i in range(4)]


# Row r keeps pair number (r + j) mod 6 of this list in group j. What the lanes of a warp then hand to
# mma.sp.m16n8k32 (f16; lanes 0, 1, 4, 5, selector 0) and m16n8k64 (s8; lanes 0 to 7), by the figures of
# PTX ISA 9.7.14.6.1.
EXAMPLE = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
F16_WORDS = {0: 0xED9C9C84, 1: 0x9C8484ED, 4: 0x4ED9D9C8, 5: 0xD9C8C84E}
S8_WORDS = {
    0: 0x84ED9C84,
    1: 0x9C84ED9C,
    2: 0x9C84ED9C,
    3: 0xED9C84ED,
    4: 0xC84ED9C8,
    5: 0xD9C84ED9,
    6: 0xD9C84ED9,
    7: 0x4ED9C84E,
}


def example_meta():
    nibbles = torch.tensor([[EXAMPLE[(r + j) % 6] for j in range(32)] for r in range(16)], dtype=torch.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def test_words_of_the_16_bit_instruction():
    (slab,) = pack_slabs(example_meta())
    for lane, word in F16_WORDS.items():
        group, quarter = lane // 4, lane % 4
        assert words(slab[8 * quarter + group])[0] == word, lane


def test_words_of_the_8_bit_instruction():
    (slab,) = pack_slabs(example_meta(), element_bits=8)
    for lane, word in S8_WORDS.items():
        row = lane // 4 + 8 * (lane % 2)
        assert words(slab[row])[lane % 4 // 2] == word, lane


@pytest.mark.parametrize("groups", [1, 3])
def test_address_of_every_byte(groups):
    rows, cols = 51, 352
    meta = random_meta(rows, cols)
    wide, narrow = pack_slabs(meta, groups), pack_slabs(meta, groups, element_bits=8)
    slots = slab_rows(rows, groups)
    assert wide.shape == narrow.shape == (3, slots, 16)
    in_group = rows // groups
    for row in range(rows):
        m = row // in_group * (-(-in_group // 16) * 16) + row % in_group
        for k in range(0, cols, 8):
            at = (
                (k // 128) * 16 * slots
                + (m // 16) * 256
                + ((k >> 4) & 1) * 128
                + (m & 7) * 16
                + ((k >> 5) & 3) * 4
                + ((m >> 3) & 1) * 2
                + ((k >> 3) & 1)
            )
            assert wide.view(-1)[at] == meta[row, k // 8]
            assert narrow.view(-1)[(k // 128 * slots + m) * 16 + k % 128 // 8] == meta[row, k // 8]


@given(
    in_group=st.integers(0, 150),
    groups=st.sampled_from([1, 1, 2, 5]),
    pitches=st.integers(0, 14),
    element_bits=st.sampled_from([8, 16]),
)
@settings(max_examples=60)
def test_there_and_back(in_group, groups, pitches, element_bits):
    rows, cols = in_group * groups, 32 * pitches
    meta = random_meta(rows, cols, seed=rows + cols)
    slabs = pack_slabs(meta, groups, element_bits=element_bits)
    assert slabs.is_contiguous() and slabs.shape[1] % 128 == 0
    assert torch.equal(unpack_slabs(slabs, rows, cols, groups, element_bits=element_bits), meta)
    padding = slabs.numel() - meta.numel()
    assert int((slabs == 0x44).sum()) == padding + int((meta == 0x44).sum())


def test_relation_to_what_torch_packs_for_cutlass():
    """torch's metadata of a 16-bit weight holds the same 16-bit units in the order of CUTLASS 2.x."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    rows, cols = 64, 256
    dense = NM24.from_dense(torch.randn(rows, cols).half(), prune="magnitude").to_dense()
    # torch's own choice of zeros to fill up with must not matter: every group has two non-zeros
    assert (dense.reshape(rows, -1, 4) != 0).sum(-1).eq(2).all()
    packed = NM24.from_dense(dense)
    _, theirs = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    units = unpack_slabs(pack_slabs(packed.meta), rows, cols).view(torch.int16)
    ordered = torch.empty(rows * cols // 16, dtype=torch.int16)
    for r in range(rows):
        for c in range(cols // 16):
            row, col = 32 * (r // 32) + 4 * (r % 8) + r % 32 // 8, c
            if row % 2 != col % 2:
                row, col = row - row % 2 + col % 2, col - col % 2 + row % 2
            ordered[col // 2 * 2 * rows + 2 * row + col % 2] = units[r, c]
    assert torch.equal(theirs.contiguous().view(-1), ordered)


def test_the_page_draws_a_slot():
    """The bytes that docs/formats.md lists for slot 0 of a slab."""
    drawn = re.search(r"^slot 0 *\|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert drawn is not None
    meta = torch.zeros(16, 16, dtype=torch.uint8)
    names = {}
    for row in (0, 8):
        for byte in range(16):
            meta[row, byte] = value = 16 * (row // 8) + byte + 1  # no nibbles, but all different
            names[value] = f"{row}.{byte}"
    (slab,) = pack_slabs(meta)
    assert [names[value] for value in slab[0].tolist()] == drawn[1].replace("|", " ").split()
