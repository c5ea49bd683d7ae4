"""Values in the order of tensor-core fragments: what PTX says a register holds, element by element, and the
way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseops.formats.nm24_fragments import pack_fragments, unpack_fragments
from sparseops.formats.nm24_slabs import slab_rows


def numbered(rows, kept):
    """16-bit values that are all different."""
    return torch.arange(1, rows * kept + 1, dtype=torch.int16).view(rows, kept)


def test_address_of_every_value():
    """By PTX ISA 9.7, wgmma.mma_async.m64nNk16: element i of a thread is of row ``group`` where i is 0, 1, 4
    or 5, else 8 below, and of column ``2 * in_group + i % 2``, 8 further from the fourth on."""
    rows, kept = 51, 176
    values = numbered(rows, kept)
    memory = pack_fragments(values).view(-1).view(torch.uint8)
    slots, seen = slab_rows(rows), 0
    for row_tile in range(slots // 16):
        for step in range(-(-kept // 64) * 4):
            for lane in range(32):
                at = (((step // 4 * (slots // 16) + row_tile) * 4 + step % 4) * 32 + lane) * 16
                group, in_group = lane // 4, lane % 4
                for i in range(8):
                    row = row_tile * 16 + group + (0 if i in (0, 1, 4, 5) else 8)
                    column = step * 16 + in_group * 2 + i % 2 + (8 if i >= 4 else 0)
                    found = int.from_bytes(bytes(memory[at + 2 * i : at + 2 * i + 2].tolist()), "little")
                    exists = row < rows and column < kept
                    assert found == (int(values[row, column]) if exists else 0)
                    seen += exists
    assert seen == values.numel()


@given(rows=st.integers(0, 300), pitches=st.integers(0, 14))
@settings(max_examples=60)
def test_there_and_back(rows, pitches):
    values = numbered(rows, 16 * pitches)
    fragments = pack_fragments(values)
    assert fragments.is_contiguous() and fragments.shape == (
        -(-pitches // 4),
        slab_rows(rows) // 16,
        4,
        32,
        8,
    )
    assert torch.equal(unpack_fragments(fragments, rows, 32 * pitches), values)
    assert int((fragments != 0).sum()) == values.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bits_are_kept(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    back = unpack_fragments(pack_fragments(values.view(dtype)), 256, 512)
    assert back.dtype is dtype and torch.equal(back.view(torch.int16), values)
