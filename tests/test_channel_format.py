"""The channel-pruned format: golden lists and values, round trips, what is refused and why."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseops import formats
from sparseops.formats import FORMATS, NM24, ChannelPruned, Keep
from sparseops.formats.channel_pruned import compact_weight, expand_channels, granularity

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def index(*channels):
    return torch.tensor(channels, dtype=torch.int64)


def masked(w, inputs, outputs, groups=1):
    """``w`` with zeros in all but the given input (through all groups) and output channels."""
    kept = torch.zeros_like(w)
    rows, channels = w.shape[:2]
    for o in outputs:
        for c in inputs:
            if c // channels == o // (rows // groups):
                kept[o, c % channels] = w[o, c % channels]
    return kept


def test_golden_values_and_lists():
    w = torch.arange(1.0, 25.0).view(4, 3, 2)
    packed = ChannelPruned.from_dense(masked(w, (0, 2), (1, 3)))
    assert packed.in_index.tolist() == [0, 2] and packed.out_index.tolist() == [1, 3]
    assert packed.in_index.dtype is packed.out_index.dtype is torch.int32
    # [O', taps, C']: w[1] is 7 8, 9 10, 11 12 and w[3] is 19 20, 21 22, 23 24, a channel at a time
    assert packed.values.tolist() == [[[7, 11], [8, 12]], [[19, 23], [20, 24]]]
    assert packed.shape == (4, 3, 2) and packed.energy_kept == 1.0


def test_golden_ragged_groups():
    w = torch.arange(1.0, 13.0).view(4, 3)[..., None]
    keep = Keep(index(0, 2, 4), index(0, 2, 3))
    packed = ChannelPruned.from_dense(w, prune=keep, groups=2)
    # group 0 keeps channels 0 and 2 of row 0, group 1 its channel 1 of rows 2 and 3
    assert packed.values.tolist() == [[[1, 3]], [[8, 0]], [[11, 0]]]
    assert torch.equal(packed.to_dense(), masked(w, (0, 2, 4), (0, 2, 3), groups=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((5, 7), 1), ((24, 40), 1), ((9, 12, 3), 1), ((16, 20, 3, 2), 1), ((12, 5, 3, 3), 3), ((8, 1, 3, 3), 8)],
)
def test_round_trips(shape, groups, dtype):
    w = torch.randn(shape).to(dtype)
    inputs = torch.arange(shape[1] * groups)[torch.rand(shape[1] * groups) < 0.6]
    inputs = inputs if len(inputs) else index(0)
    outputs = torch.arange(0, shape[0], 2)
    dense = masked(w, inputs.tolist(), outputs.tolist(), groups)
    for packed in (
        ChannelPruned.from_dense(dense, groups=groups),
        ChannelPruned.from_dense(w, prune=Keep(inputs, outputs), groups=groups),
    ):
        packed.validate()
        assert torch.equal(packed.to_dense(), dense)
        assert packed.to_dense().is_contiguous() and packed.values.is_contiguous()
        again = compact_weight(dense, packed.in_index, packed.out_index, groups)
        assert torch.equal(again, packed.values)
        assert packed.density == pytest.approx(float((dense != 0).sum() / dense.numel()))


def test_all_channels_of_one_side_kept():
    w = torch.randn(8, 6)
    packed = ChannelPruned.from_dense(w, prune=Keep(inputs=index(1, 4)))
    assert packed.out_index.tolist() == list(range(8)) and packed.granularities == (1, 0)
    packed = ChannelPruned.from_dense(w, prune=Keep(outputs=index(3)))
    assert packed.in_index.tolist() == list(range(6)) and packed.granularities == (0, 1)


def test_inputs_that_only_dropped_outputs_read_are_dropped():
    packed = ChannelPruned.from_dense(torch.randn(4, 2, 1), prune=Keep(outputs=index(2, 3)), groups=2)
    assert packed.in_index.tolist() == [2, 3]
    packed.validate()


def test_inputs_and_outputs_of_different_groups_are_refused():
    keep = Keep(inputs=index(0, 1), outputs=index(2, 3))
    with pytest.raises(
        ValueError, match="inputs of prune must hold a channel of a group that keeps an output"
    ):
        ChannelPruned.from_dense(torch.randn(4, 2, 1), prune=keep, groups=2)


def test_a_weight_of_zeros_keeps_one_block():
    packed = ChannelPruned.from_dense(torch.zeros(20, 12))
    packed.validate()
    assert packed.in_index.tolist() == packed.out_index.tolist() == list(range(8))


def test_magnitude_keeps_the_half_of_the_blocks_with_the_largest_norm():
    w = torch.ones(32, 24)
    w[8:16] = 3
    w[:, 16:24] = 2
    packed = ChannelPruned.from_dense(w, prune="magnitude")
    assert packed.out_index.tolist() == [*range(16)], "of equal blocks the lower"
    assert packed.in_index.tolist() == [*range(8), *range(16, 24)]
    kept = w[:16].square().sum() - w[:16, 8:16].square().sum()
    assert packed.energy_kept == pytest.approx(float(kept / w.square().sum()))
    w[31, 0] = torch.nan
    packed = ChannelPruned.from_dense(w, prune="magnitude")
    assert packed.out_index.tolist() == [*range(8, 16), *range(24, 32)] and packed.nonfinite == 1
    assert packed.in_index.tolist()[:8] == [*range(8)]


def test_magnitude_takes_a_share_of_each_group():
    w = torch.ones(32, 16, 1)
    w[:16] = 100
    packed = ChannelPruned.from_dense(w, prune="magnitude", groups=2)
    assert packed.out_index.tolist() == [*range(8), *range(16, 24)]
    assert packed.in_index.tolist() == [*range(8), *range(16, 24)]


@pytest.mark.parametrize(
    ("kept", "total", "expected"),
    [
        (range(40), 40, 0),
        (range(16, 32), 40, 16),
        ([*range(16), *range(32, 40)], 40, 16),
        ([*range(8, 24)], 40, 8),
        ([*range(8), *range(32, 37)], 37, 8),
        ([*range(16), *range(32, 37)], 37, 16),
        ([*range(8, 16), *range(32, 36)], 37, 1),
        ([*range(8, 16), 36], 37, 1),
        ([*range(1, 9)], 40, 1),
        ([*range(8, 15)], 40, 1),
        ([*range(0, 8), *range(9, 16)], 40, 1),
        ([3], 40, 1),
        ([32, 33], 34, 16),
    ],
)
def test_granularity(kept, total, expected):
    assert granularity(list(kept), total) == expected
    assert granularity(torch.tensor([*kept], dtype=torch.int32), total) == expected


@given(st.integers(1, 5), st.integers(1, 60), st.sampled_from((8, 16)), st.data())
def test_whole_blocks_have_their_granularity(_, total, block, data):
    blocks = -(-total // block)
    chosen = data.draw(st.sets(st.integers(0, blocks - 1), min_size=1))
    kept = [c for c in range(total) if c // block in chosen]
    assert granularity(kept, total) in (0, 8, 16)
    if block == 16:
        assert granularity(kept, total) in (0, 16)


def test_an_inner_pattern_of_two_of_four():
    w = torch.randn(32, 48, 3, 3)
    keep = Keep(torch.arange(8, 40), torch.arange(16), nm24=True)
    packed = ChannelPruned.from_dense(w, prune=keep)
    packed.validate()
    inner = NM24.from_dense(w[:16, 8:40], prune="magnitude")
    assert packed.compact_shape == (16, 32, 3, 3)
    assert torch.equal(packed.values, inner.values) and torch.equal(packed.meta, inner.meta)
    expected = torch.zeros_like(w)
    expected[:16, 8:40] = inner.to_dense()
    assert torch.equal(packed.to_dense(), expected)
    kept = inner.to_dense().square().sum() / w.square().sum()
    assert packed.energy_kept == pytest.approx(float(kept), rel=1e-5)
    assert packed.nbytes == inner.nbytes + 4 * (32 + 16)


def test_expanding_is_differentiable_in_values():
    for shape, groups in (((6, 5, 2), 1), ((6, 4, 2), 2)):
        keep = Keep(index(0, 1, 3), index(0, 2, 3, 5))
        packed = ChannelPruned.from_dense(torch.randn(shape).double(), prune=keep, groups=groups)
        values = packed.values.clone().requires_grad_()

        def dense(values, packed=packed):
            return expand_channels(values, packed.in_index, packed.out_index, packed.shape, packed.groups)

        assert torch.autograd.gradcheck(dense, values)


def refused(message, call, error=ValueError):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_what_from_dense_refuses():
    w = torch.randn(8, 6)
    name = "ChannelPruned.from_dense: "
    refused(name + "w must be a dense floating-point tensor, got list", lambda: pack([1.0]), TypeError)
    refused(
        name + "w must be a dense floating-point tensor, got torch.int64", lambda: pack(index(1)), TypeError
    )
    refused(name + "w must hold data, got a tensor on the meta device", lambda: pack(w.to("meta")))
    refused(name + "w must have 2, 3 or 4 dimensions, got shape (8,)", lambda: pack(w[:, 0]))
    refused(
        name + 'w must have a channel that is all zero (prune="magnitude" or a Keep drops some), '
        "got none in a weight of shape (8, 6)",
        lambda: pack(w),
    )
    refused(name + "groups must be at least 1 and divide the outputs, got 3 for 8", lambda: pack(w, groups=3))
    refused(name + "prune must be None, \"magnitude\" or a Keep, got 'half'", lambda: pack(w, prune="half"))
    for wrong, message in (
        (index(), "must hold at least one of 6 channels, got none"),
        (index(3, 2), "must be ascending without repetition, got 3 before 2"),
        (index(2, 2), "must be ascending without repetition, got 2 before 2"),
        (index(1, 6), "must hold channels from 0 to 5, got 6"),
        (index(-1, 2), "must hold channels from 0 to 5, got -1"),
        (index(1, 2).view(2, 1), "must have one dimension, got shape (2, 1)"),
    ):
        refused(name + "inputs of prune " + message, lambda i=wrong: pack(w, prune=Keep(inputs=i)))
    refused(
        name + "outputs of prune must hold channels from 0 to 7", lambda: pack(w, prune=Keep(None, index(8)))
    )


def pack(w, **options):
    return ChannelPruned.from_dense(w, **options)


def test_what_validate_refuses():
    good = pack(torch.randn(12, 4, 3), prune=Keep(index(0, 1, 3, 6, 7), index(0, 5, 9)), groups=2)
    good.validate()
    list_32 = torch.tensor([0, 5], dtype=torch.int32)
    for change, message in (
        ({"values": good.values.tolist()}, "values must be a tensor, got list"),
        ({"values": good.values.int()}, "values must have dtype torch.float16 or"),
        ({"in_index": good.in_index.long()}, "in_index must have dtype torch.int32, got torch.int64"),
        (
            {"out_index": torch.arange(6, dtype=torch.int32)[::2]},
            "out_index must be contiguous, got strides (2,)",
        ),
        (
            {"out_index": good.out_index.to("meta")},
            "out_index must be on the device of values (cpu), got meta",
        ),
        ({"shape": (12, -4, 3)}, "shape must be 2, 3 or 4 sizes of at least 0, got (12, -4, 3)"),
        ({"groups": 5}, "groups must be at least 1 and divide the outputs, got 5 for 12"),
        ({"in_index": list_32.flip(0)}, "in_index must be ascending without repetition, got 5 before 0"),
        ({"in_index": list_32[:0]}, "in_index must hold at least one of 8 channels, got none"),
        ({"out_index": list_32 + 8}, "out_index must hold channels from 0 to 11, got 13"),
        (
            {"out_index": list_32},
            "values must have shape (2, 3, 3) for 2 outputs and 5 inputs of a weight of",
        ),
        ({"values": good.values[..., :2].contiguous()}, "values must have shape (3, 3, 3)"),
        (
            {"values": good.values + 1},
            "values must be 0 behind the inputs of a ragged group, got 1.0 in row 2, column 2",
        ),
        ({"meta": good.values}, "meta must have dtype torch.uint8, got torch.float32"),
    ):
        refused("ChannelPruned: " + message, replace(good, **change).validate)


def test_the_inner_pattern_is_validated():
    packed = pack(torch.randn(8, 32), prune=Keep(None, None, True))
    packed.meta[0, 0] = 0
    refused("NM24: meta must hold only the nibbles", packed.validate)
    refused(
        "NM24: values must have shape", replace(packed, values=packed.values[:, :8].contiguous()).validate
    )


def test_meta_tensors_are_validated_as_far_as_they_go():
    good = pack(torch.randn(12, 4, 3), prune=Keep(index(0, 1, 3), index(0, 5, 9)))
    there = {name: getattr(good, name).to("meta") for name in ("values", "in_index", "out_index")}
    replace(good, **there).validate()
    refused(
        "values must have shape (2, 3, 3)",
        replace(good, **(there | {"out_index": there["out_index"][:2]})).validate,
    )


def test_it_is_a_listed_format():
    assert FORMATS["channel"] is ChannelPruned is formats.ChannelPruned
    assert isinstance(pack(torch.randn(8, 32), prune=Keep(index(1))), formats.SparseFormat)
