"""Channel-pruned layers: what is read from their lists, the copies, and the weight in oneDNN's order."""

import gc
import importlib
import warnings

import pytest
import torch
from conftest import DTYPES, assert_result, bits, case_of, every_dtype, layout
from torch.nn.functional import conv2d, linear

from sparseops import _native
from sparseops.ops import REGISTRY, channels, onednn
from sparseops.ops.channels import Copy, channels_of, copy_images, copy_rows
from sparseops.ops.common import blocks, make_pruned

OPS = [REGISTRY["channel_linear"], REGISTRY["channel_conv"]]
LINEAR, CONV = OPS
every_channel_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_channel_case = pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases]
)
pytestmark = pytest.mark.skipif(_native.emulated is not None, reason="the CPU stands for a GPU")


def int32(*listed):
    return torch.tensor(listed, dtype=torch.int32)


def of(in_index, out_index, inputs, outputs, groups=1, width=None):
    if width is None:
        width = max(sum(i // (inputs // groups) == g for i in in_index.tolist()) for g in range(groups))
    return channels_of("op", in_index, out_index, inputs, outputs, width, groups)


def test_a_side():
    lists = of(int32(*range(8, 24), 40), int32(0, 1, 2, 5), 41, 6)
    assert lists.inputs.granularity == 8 and lists.inputs.total == 41 and lists.inputs.most == 17
    assert lists.inputs.table.tolist() == [1, 2, 5, 0, 3, 4]
    assert lists.outputs.granularity == 1 and lists.outputs.table.tolist() == [0, 1, 2, 5, 3, 4]
    assert lists.outputs.starts.tolist() == [0, 4]
    whole = of(int32(0, 1), int32(*range(16, 32)), 2, 64)
    assert whole.inputs.granularity == 0 and whole.inputs.table is None and whole.gather is None
    assert whole.outputs.granularity == 16 and whole.outputs.table.tolist() == [1, 0, 2, 3]


def test_a_side_of_several_groups():
    lists = of(int32(0, 3, 4, 9), int32(1, 2, 5, 7), 12, 8, groups=4)
    assert lists.inputs.counts == (1, 2, 0, 1) and lists.inputs.starts.tolist() == [0, 1, 3, 3, 4]
    assert lists.outputs.counts == (1, 1, 1, 1) and lists.groups == 4 and lists.rows is None
    # blocks of 8 count only where no group has a part of one
    assert of(int32(*range(8)), int32(*range(8)), 16, 16, groups=2).outputs.granularity == 8
    assert of(int32(*range(8)), int32(*range(8)), 24, 24, groups=2).outputs.granularity == 1


def test_groups_that_vanish_or_are_ragged():
    lists = of(int32(0, 3, 4, 9), int32(2, 3, 7), 12, 8, groups=4)
    assert lists.groups == 2 and lists.padded_rows == 4
    assert lists.gather.runs.tolist() == [[0, 2, 3], [2, 1, 9], [3, 1, -1]]
    assert lists.scatter.runs.tolist() == [[0, 2, -1], [2, 2, 0], [4, 3, -1], [7, 1, 2]]
    assert lists.rows == (0, 1, 2)
    padded = lists.pad_rows(torch.ones(3, 5))
    assert padded.tolist() == [[1] * 5] * 3 + [[0] * 5]


def test_runs_are_merged():
    assert Copy.of([3, 4, 5, -1, -1, 0, 6]).runs.tolist() == [[0, 3, 3], [3, 2, -1], [5, 1, 0], [6, 1, 6]]
    assert Copy.of([]).runs.shape == (0, 3)


@pytest.fixture
def reads(monkeypatch):
    """Notes every list that is read."""
    found = []
    made = channels.Side.of

    def note(*args):
        found.append(args[1])
        return made(*args)

    monkeypatch.setattr(channels.Side, "of", note)
    return found


def test_lists_are_read_once(reads):
    in_index, out_index = int32(0, 2), int32(1, 3)
    first = of(in_index, out_index, 4, 4)
    assert of(in_index, out_index, 4, 4) is first and len(reads) == 2
    assert of(in_index, out_index, 5, 4) is not first and len(reads) == 4
    assert of(in_index, out_index, 4, 4) is first and len(reads) == 4


def test_a_changed_list_is_read_again(reads):
    in_index, out_index = int32(0, 2), int32(1, 3)
    of(in_index, out_index, 4, 4)
    in_index[0] = 1
    assert of(in_index, out_index, 4, 4).inputs.kept == (1, 2)
    out_index[0] = 0
    assert of(in_index, out_index, 4, 4).outputs.kept == (0, 3)
    in_index.data = int32(2, 3)
    assert of(in_index, out_index, 4, 4).inputs.kept == (2, 3)
    base = int32(0, 1, 2, 3)
    assert of(base[:2], out_index, 4, 4).inputs.kept == (0, 1)
    assert of(base[::2], out_index, 4, 4).inputs.kept == (0, 2), "another view of the same memory"
    assert len(reads) == 12


def test_a_list_without_a_version_is_compared(reads):
    with torch.inference_mode():
        in_index, out_index = int32(0, 2), int32(1, 3)
        first = of(in_index, out_index, 4, 4)
        assert of(in_index, out_index, 4, 4) is first and len(reads) == 2
        in_index[1] = 3
        assert of(in_index, out_index, 4, 4).inputs.kept == (0, 3)


def test_what_was_read_goes_with_the_list():
    before = len(channels._known)
    in_index, out_index = int32(0, 2), int32(1, 3)
    of(in_index, out_index, 4, 4)
    of(out_index, out_index, 4, 4)  # one tensor for both
    assert len(channels._known) == before + 1
    del in_index, out_index
    gc.collect()
    assert len(channels._known) == before


@every_channel_op
def test_prepare_reads_the_lists(op, reads):
    (x, values, in_index, out_index, *_), kwargs = case_of(op).make(torch.float32)
    options = {"channels": x.shape[-1 if op is LINEAR else 1], "outputs": kwargs["outputs"]}
    op.prepare(values, in_index, out_index, meta=None, **options)
    assert len(reads) == 2
    op.fn(x, values, in_index, out_index, **kwargs)
    assert len(reads) == 2
    op.prepare(values, in_index.to("meta"), out_index.to("meta"), **options)


DTYPES_TO_COPY = {**DTYPES, "f64": torch.float64}
CHANNELS = [1, 3, 8, 17, 40]
IMAGES = [(1, 1, 1), (3, 1, 2), (2, 3, 5), (1, 7, 7), (2, 9, 16), (1, 12, 13)]


def drawn(generator, inputs, outputs):
    """Where each of ``outputs`` channels comes from: a few in order, others anywhere or constants."""
    sources = torch.randperm(inputs, generator=generator).tolist()[: outputs // 2 + 1]
    if outputs % 2:
        sources.sort()
    at = torch.randperm(outputs, generator=generator)[: len(sources)].sort().values.tolist()
    found = [-1] * outputs
    for place, source in zip(at, sources, strict=True):
        found[place] = source
    return found


def copied(x, sources, constants):
    """What a copy is to give, channel by channel of dimension 1."""
    columns = []
    for channel, source in enumerate(sources):
        if source >= 0:
            columns.append(x[:, source])
        else:
            value = 0 if constants is None else constants[channel]
            columns.append(torch.zeros_like(x[:, 0]) + value)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("dtype", DTYPES_TO_COPY.values(), ids=DTYPES_TO_COPY)
@pytest.mark.parametrize("with_constants", [False, True])
def test_copies(dtype, with_constants, isa):
    generator = torch.Generator().manual_seed(0)
    for inputs in CHANNELS:
        for outputs in CHANNELS:
            sources = drawn(generator, inputs, outputs)
            copy = Copy.of(sources)
            constants = torch.randn(outputs, generator=generator).to(dtype) if with_constants else None
            for batch, *size in IMAGES:
                x = torch.randn(batch, inputs, *size, generator=generator).to(dtype)
                expected = copied(x, sources, constants)
                for given in (x, x.contiguous(memory_format=torch.channels_last)):
                    for last in (False, True):
                        y = copy_images(copy, given, constants, last)
                        order = torch.channels_last if last else torch.contiguous_format
                        assert torch.equal(y, expected) and y.is_contiguous(memory_format=order)
            rows = torch.randn(11, inputs + 3, generator=generator).to(dtype)[:, :inputs]
            assert torch.equal(copy_rows(copy, rows, constants), copied(rows, sources, constants))


@pytest.mark.parametrize("dtype", DTYPES_TO_COPY.values(), ids=DTYPES_TO_COPY)
def test_copies_keep_every_bit(dtype, isa):
    """Signalling NaNs, negative zeros and denormals too."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(kind)
    x = torch.randint(info.min, info.max, (2, 40, 6, 6), dtype=kind)
    constants = torch.randint(info.min, info.max, (80,), dtype=kind)
    copy = Copy.of([i // 2 if i % 2 else -1 for i in range(80)])
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        for last in (False, True):
            y = copy_images(copy, given.view(dtype), constants.view(dtype), last)
            assert torch.equal(bits(y), copied(x, [i // 2 if i % 2 else -1 for i in range(80)], constants))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "shape", [(1, 64, 40, 40), (3, 96, 14, 14), (40, 64, 5, 5), (1, 1024, 7, 7)], ids=str
)
def test_copies_by_several_threads(shape, threads, isa):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(shape)
        sources = [i // 16 * 8 + i % 8 if i % 16 < 8 else -1 for i in range(2 * shape[1])]
        constants = torch.randn(2 * shape[1])
        expected = copied(x, sources, constants)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            for last in (False, True):
                assert torch.equal(copy_images(Copy.of(sources), given, constants, last), expected)
        rows = x.permute(0, 2, 3, 1).reshape(-1, shape[1]).contiguous()
        assert torch.equal(copy_rows(Copy.of(sources), rows, constants), copied(rows, sources, constants))
    finally:
        torch.set_num_threads(before)


def test_a_copy_into_a_part():
    x, y = torch.randn(4, 8, 3, 3), torch.zeros(4, 8, 3, 3)
    copy_images(Copy.of(range(8)), x[1:3], None, False, y[1:3])
    assert torch.equal(y[1:3], x[1:3]) and not y[0].any() and not y[3].any()


@pytest.fixture
def large(monkeypatch):
    """Every product is large enough for oneDNN."""
    monkeypatch.setattr(onednn, "_LEAST_LINEAR", 1)
    monkeypatch.setattr(onednn, "_LEAST_CONV", 1)


def orders(values):
    return onednn._known.get(values) or {}


@every_dtype
@every_channel_case
def test_a_weight_in_another_order(op, case, dtype, large):
    """Found there by a second call."""
    args, kwargs = case.make(dtype)
    y = op.fn(*args, **kwargs)
    assert_result(op, y, args, kwargs)
    known = {key: found[2] for key, found in orders(args[1]).items()}
    assert torch.equal(op.fn(*args, **kwargs), y)
    again = {key: found[2] for key, found in orders(args[1]).items()}
    assert again.keys() == known.keys() and all(again[key] is known[key] for key in known)


@every_channel_op
def test_a_changed_weight_is_seen(op, large):
    args, kwargs = case_of(op).make(torch.float32)
    op.fn(*args, **kwargs)
    assert len(orders(args[1])) == 1, "oneDNN is called"
    args[1].mul_(-2)
    assert_result(op, op.fn(*args, **kwargs), args, kwargs)
    args[1].data = args[1] * 3
    assert_result(op, op.fn(*args, **kwargs), args, kwargs)
    leaf = args[1].requires_grad_()
    op.fn(args[0], leaf, *args[2:], **kwargs)
    assert not orders(leaf), "a write through .data may follow"
    leaf.data.mul_(2)
    assert_result(op, op.fn(*args, **kwargs), args, kwargs)


@every_channel_op
def test_a_weight_made_in_inference_mode(op, large):
    with torch.inference_mode():
        args, kwargs = case_of(op).make(torch.float32)
        for _ in range(2):
            assert_result(op, op.fn(*args, **kwargs), args, kwargs)
            args[1].mul_(-2)
        assert not orders(args[1])


def test_other_lists_of_the_same_weight(large):
    """Which say what rows of zeros lie between its own."""
    values, x = torch.randn(3, 1, 1, 2), torch.randn(1, 4, 5, 5)
    for outputs in ((0, 1, 2), (0, 2, 3), (0, 1, 3)):
        args, kwargs = (x, values, int32(0, 1, 2, 3), int32(*outputs)), {"outputs": 4, "groups": 2}
        y = CONV.fn(*args, kernel_size=1, **kwargs)
        assert_result(CONV, y, args, {"kernel_size": 1, **kwargs})
    flat, x = torch.randn(16, 3, 8), torch.randn(1, 16, 5, 5)
    for taps in ((1, 3), (3, 1)):
        args, kwargs = (x, flat, int32(*range(8)), int32(*range(16))), {"outputs": 16, "kernel_size": taps}
        assert_result(CONV, CONV.fn(*args, **kwargs), args, kwargs)


def test_images_of_many_sizes(large):
    args, kwargs = case_of(CONV).make(torch.float32)
    for size in range(3, 3 + 2 * onednn._MOST_ORDERS):
        given = (torch.randn(1, args[0].shape[1], size, size), *args[1:])
        assert_result(CONV, CONV.fn(*given, **kwargs), given, kwargs)
    assert len(orders(args[1])) == onednn._MOST_ORDERS


@pytest.mark.parametrize("name", ["_IS_THERE", "_is_on"])
@every_channel_op
def test_without_onednn(op, name, large, monkeypatch):
    monkeypatch.setattr(onednn, name, False if name == "_IS_THERE" else lambda: False)
    args, kwargs = case_of(op).make(torch.float32)
    assert_result(op, op.fn(*args, **kwargs), args, kwargs)
    assert not orders(args[1])


def test_small_products_stay_with_torch():
    for op in OPS:
        args, kwargs = case_of(op).make(torch.float32)
        op.fn(*args, **kwargs)
        assert not orders(args[1])


@pytest.mark.parametrize("name", ["tail", "channels_last_tail", "groups_tail", "residual_silu", "pointwise"])
def test_a_few_images_at_a_time(name, monkeypatch):
    """As many as fit into a cache: here one."""
    args, kwargs = case_of(CONV, name).make(torch.float32)
    y = CONV.fn(*args, **kwargs)
    monkeypatch.setattr(importlib.import_module("sparseops.ops.channel_conv"), "_BYTES_AT_ONCE", 1)
    one_by_one = CONV.fn(*args, **kwargs)
    assert_result(CONV, one_by_one, args, kwargs)
    assert layout(one_by_one) == layout(y)


PLAIN_ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
}


@every_channel_case
def test_the_references_are_torch(op, case):
    """Of a dense weight whose zeros are written where the lists do not say, one by one."""
    (x, values, in_index, out_index, bias, *residual), kwargs = case.make(torch.float64)
    outputs, groups = kwargs["outputs"], kwargs.get("groups", 1)
    in_group = (x.shape[-1] if op is LINEAR else x.shape[-3]) // groups
    dense = torch.zeros(outputs, in_group, *values.shape[1:-1], dtype=torch.float64)
    for row, out in enumerate(out_index.tolist()):
        group = out // (outputs // groups)
        own = [i % in_group for i in in_index.tolist() if i // in_group == group]
        for column, channel in enumerate(own):
            dense[out, channel] = values[row, ..., column]
    options = {
        name: value for name, value in kwargs.items() if name not in ("outputs", "kernel_size", "activation")
    }
    plain = linear if op is LINEAR else conv2d
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it pads a copy for even kernels
        z = sum(residual, plain(x, dense, bias, **options))
    expected = PLAIN_ACTIVATIONS[kwargs.get("activation", "none")](z)
    torch.testing.assert_close(
        op.reference(x, values, in_index, out_index, bias, *residual, **kwargs), expected
    )


@every_channel_op
def test_what_is_dropped_is_not_read(op):
    """Its weight is zero, and a dense layer would make NaN of it."""
    args, kwargs = case_of(op).make(torch.float32)
    x, dim = args[0], -1 if op is LINEAR else 1
    y = op.fn(*args, **kwargs)
    others = [i for i in range(x.shape[dim]) if i not in args[2].tolist()]
    hit = x.index_fill(dim, torch.tensor(others), torch.nan)
    assert torch.equal(op.fn(hit, *args[1:], **kwargs), y)
    leaves = [arg.requires_grad_() if arg.is_floating_point() else arg for arg in (hit, *args[1:])]
    op.fn(*leaves, **kwargs).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.requires_grad)


def test_values_of_a_1d_convolution():
    args, kwargs = case_of(CONV, "one_dimensional").make(torch.float32)
    x, values, *rest = args
    flat = values.flatten(1, 2).clone().requires_grad_()
    y = CONV.fn(x, flat, *rest, **kwargs)
    torch.testing.assert_close(y, CONV.fn(x, values, *rest, **kwargs))
    torch.testing.assert_close(y, CONV.reference(x, flat, *rest, **kwargs))
    values.requires_grad_()
    (found,) = torch.autograd.grad(y.square().sum(), flat)
    (expected,) = torch.autograd.grad(CONV.fn(x, values, *rest, **kwargs).square().sum(), values)
    torch.testing.assert_close(found, expected.flatten(1, 2))


def test_make_pruned_keeps_what_it_is_told():
    weight = make_pruned((24, 20), torch.float32, torch.Generator(), [1, 5], blocks(8, 0, 2))
    assert weight.in_index.tolist() == [1, 5]
    assert weight.out_index.tolist() == [*range(8), *range(16, 24)]
