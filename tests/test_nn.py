"""Sparse layers: the same numbers as the dense layer with zeros, and everything people do to a module."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseops
from sparseops.formats import NM24
from sparseops.nn import SparseConv1d, SparseConv2d, SparseLinear

LAYERS = {
    "linear": (lambda: nn.Linear(64, 24), (5, 64)),
    "linear_tail_no_bias": (lambda: nn.Linear(37, 19, bias=False), (2, 3, 37)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3, stride=2, padding=1, dilation=2), (2, 16, 21)),
    "conv1d_same_even": (lambda: nn.Conv1d(16, 8, 4, padding="same"), (2, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 7)),
    "conv2d_tail": (
        lambda: nn.Conv2d(18, 11, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        (2, 18, 9, 7),
    ),
    "conv2d_groups": (lambda: nn.Conv2d(32, 16, 3, groups=2, dilation=2), (1, 32, 9, 9)),
    "conv2d_same": (lambda: nn.Conv2d(16, 8, (4, 3), padding="same", dilation=(1, 2)), (1, 16, 8, 9)),
    "conv2d_valid": (lambda: nn.Conv2d(16, 8, 3, padding="valid"), (1, 16, 8, 9)),
}
SPARSE = {nn.Linear: SparseLinear, nn.Conv1d: SparseConv1d, nn.Conv2d: SparseConv2d}


def make(name):
    """A dense layer with a 2:4 weight, its sparse form, and an input."""
    torch.manual_seed(0)
    dense, shape = LAYERS[name][0](), LAYERS[name][1]
    with torch.no_grad():
        dense.weight.copy_(NM24.from_dense(dense.weight, prune="magnitude").to_dense())
    return dense, SPARSE[type(dense)].from_dense(dense), torch.randn(shape)


def assert_same(found, expected, rounding=1):
    """Equal but for the order of a sum: a few hundred products of numbers near 1."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    bound = rounding * 16 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_equals_dense(name):
    dense, sparse, x = make(name)
    assert_same(sparse(x), dense(x))
    assert torch.equal(sparse.weight, dense.weight)


@pytest.mark.parametrize("name", LAYERS)
def test_unbatched_input_equals_dense(name):
    dense, sparse, x = make(name)
    assert_same(sparse(x[0]), dense(x[0]))


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name):
    dense, sparse, x = make(name)
    assert sparse(x[:0]).shape == dense(x[:0]).shape


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"])
def test_padding_mode_equals_dense(mode, padding):
    torch.manual_seed(0)
    dense = nn.Conv2d(16, 8, (4, 3), padding=padding, padding_mode=mode, dilation=(1, 2))
    sparse = SparseConv2d.from_dense(dense, prune="magnitude")
    x = torch.randn(2, 16, 9, 8)
    assert_same(sparse(x), sparse.to_dense()(x))
    assert sparse.to_dense().padding_mode == mode
    line = nn.Conv1d(16, 8, 4, padding=padding if padding == "same" else 3, padding_mode=mode)
    thin = SparseConv1d.from_dense(line, prune="magnitude")
    assert_same(thin(x[:, :, 0]), thin.to_dense()(x[:, :, 0]))


def test_channels_last_is_kept():
    _, sparse, x = make("conv2d")
    y = sparse(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(y, sparse(x))
    assert sparse(x).is_contiguous()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_dense(name):
    dense, sparse, x = make(name)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    weights = torch.randn(dense(x).shape)  # an all-ones gradient would hide transpositions
    for layer, its in ((dense, xs[0]), (sparse, xs[1])):
        (layer(its) * weights).sum().backward()
    assert_same(xs[1].grad, xs[0].grad, rounding=8)
    packed = sparse.packed
    kept = NM24(sparse.values.grad, sparse.meta, packed.shape).to_dense()
    mask = NM24(torch.ones_like(sparse.values), sparse.meta, packed.shape).to_dense()
    assert_same(kept, dense.weight.grad * mask, rounding=8)
    if dense.bias is not None:
        assert_same(sparse.bias.grad, dense.bias.grad, rounding=8)


def test_training_keeps_the_pattern():
    _, sparse, x = make("conv2d")
    before = sparse.weight != 0
    optimizer = torch.optim.Adam(sparse.parameters(), 0.1, weight_decay=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (sparse(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not (sparse.weight != 0)[~before].any()
    sparse.packed.validate()


def test_weight_is_differentiable_in_values():
    dense, sparse, _ = make("linear")
    target = torch.randn(dense.weight.shape)
    (sparse.weight * target).sum().backward()
    expected = NM24(sparse.values.grad, sparse.meta, sparse.weight_shape).to_dense()
    assert torch.equal(expected, target * (dense.weight != 0))


@pytest.mark.parametrize("name", LAYERS)
def test_attributes_are_those_of_the_dense_layer(name):
    dense, sparse, _ = make(name)
    linear = ("in_features", "out_features")
    conv = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    for attribute in linear if isinstance(dense, nn.Linear) else (*conv, "transposed", "output_padding"):
        assert getattr(sparse, attribute) == getattr(dense, attribute)
    assert (sparse.bias is None) == (dense.bias is None)
    assert sparse.weight.shape == dense.weight.shape
    assert sparse.weight.dtype == dense.weight.dtype


@pytest.mark.parametrize("name", LAYERS)
def test_to_dense_gives_the_layer_back(name):
    dense, sparse, x = make(name)
    back = sparse.eval().to_dense()
    assert type(back) is type(dense)
    assert not back.training
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back(x), dense(x))
    assert back.extra_repr() == dense.extra_repr()
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    assert torch.equal(sparse.weight, dense.weight)
    assert sparse.bias is None or sparse.bias.any()


def test_from_dense_copies():
    dense, sparse, x = make("linear")
    before = sparse(x).clone()
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert torch.equal(sparse(x), before)


def test_from_dense_keeps_requires_grad_and_training():
    dense, _, _ = make("linear")
    dense.weight.requires_grad_(False)
    dense.eval()
    sparse = SparseLinear.from_dense(dense)
    assert not sparse.values.requires_grad
    assert sparse.bias.requires_grad
    assert not sparse.training
    assert not sparse.to_dense().weight.requires_grad


def test_new_layer_is_dense_init_pruned():
    torch.manual_seed(3)
    dense = nn.Conv2d(16, 8, 3, padding="same", groups=1, padding_mode="reflect")
    torch.manual_seed(3)
    sparse = SparseConv2d(16, 8, 3, padding="same", groups=1, padding_mode="reflect")
    assert torch.equal(sparse.weight, NM24.from_dense(dense.weight, prune="magnitude").to_dense())
    assert torch.equal(sparse.bias, dense.bias)
    assert SparseLinear(64, 8, dtype=torch.bfloat16).values.dtype == torch.bfloat16
    assert SparseLinear(64, 8, bias=False).bias is None
    assert SparseConv1d(16, 8, 3)(torch.randn(1, 16, 5)).shape == (1, 8, 3)


def test_extra_repr_shows_format_density_and_kernel():
    _, sparse, _ = make("conv2d")
    text = repr(sparse)
    assert text.startswith("SparseConv2d(16, 24, kernel_size=(3, 3)")
    assert "format=nm24, density=0.5, kernel=" in text
    assert "kernel=reference: there is no kernel for torch.float64" in repr(sparse.double())
    assert "density=unknown" in repr(sparse.to("meta"))


# Checkpoints


def assert_loaded(target, source, x):
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_load_sparse_checkpoint(name, assign):
    dense, sparse, x = make(name)
    assert set(sparse.state_dict()) == {"values", "meta"} | ({"bias"} if dense.bias is not None else set())
    target = SPARSE[type(dense)].from_dense(LAYERS[name][0](), prune="magnitude")
    result = target.load_state_dict(sparse.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_loaded(target, sparse, x)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_load_dense_checkpoint(name, assign):
    dense, sparse, x = make(name)
    target = nn.Sequential(nn.ReLU(), SPARSE[type(dense)].from_dense(LAYERS[name][0](), prune="magnitude"))
    checkpoint = {f"1.{key}": value for key, value in dense.state_dict().items()}
    keys = set(checkpoint)
    target.load_state_dict(checkpoint, assign=assign)
    assert set(checkpoint) == keys, "the caller's dict must not change"
    assert_loaded(target[1], sparse, x)
    assert isinstance(target[1].values, nn.Parameter)
    assert target[1].values.requires_grad


def test_dense_checkpoint_of_another_dtype_is_cast():
    dense, _, _ = make("linear")
    target = SparseLinear(64, 24)
    target.load_state_dict(dense.half().state_dict())
    assert target.values.dtype == torch.float32
    assert torch.equal(target.weight, dense.weight.float())


def test_dense_checkpoint_without_the_pattern_is_refused():
    _, sparse, x = make("linear")
    before = sparse(x).clone()
    model = nn.Sequential(sparse)
    with pytest.raises(
        RuntimeError, match=r"load_state_dict: 0\.weight must fit format nm24: .*row 0, group 0"
    ):
        model.load_state_dict({"0.weight": torch.ones(24, 64), "0.bias": torch.ones(24)})
    assert torch.equal(sparse(x), before), "an error must leave the layer as it was, its bias too"


def test_dense_checkpoint_of_another_shape_is_refused():
    _, sparse, _ = make("linear")
    with pytest.raises(RuntimeError, match=r"weight must have shape \(24, 64\), got \(24, 32\)"):
        sparse.load_state_dict({"weight": torch.zeros(24, 32), "bias": torch.zeros(24)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["meta"].fill_(0xFF), r"nibbles 0x4 .*, got 0xF in row 0, group 0"),
        (lambda s: s.update(meta=s["meta"][:, :-1]), r"meta must have shape \(24, 8\)"),
        (lambda s: s.update(meta=s["meta"].int()), r"meta must have dtype torch.uint8"),
        (lambda s: s.update(values=s["values"][:-1]), r"values must have shape \(24, 32\)"),
        (lambda s: s.update(values=s["values"].long()), r"values must have dtype"),
        (lambda s: s.update(meta=[1, 2]), r"meta must be a tensor, got list"),
        (lambda s: s.pop("values"), r"values must come with meta, got a checkpoint without"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_corrupted_checkpoint_is_refused(damage, message, strict):
    _, sparse, x = make("linear")
    before = sparse(x).clone()
    state = {key: value.clone() for key, value in sparse.state_dict().items()}
    state["bias"] += 1
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        sparse.load_state_dict(state, strict=strict)
    assert torch.equal(sparse(x), before)


def test_strict_and_not_strict():
    _, sparse, x = make("linear")
    state = sparse.state_dict() | {"other": torch.zeros(1)}
    del state["bias"]
    target = SparseLinear(64, 24)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"[\s\S]*Unexpected key.*"other"'):
        target.load_state_dict(state)
    result = target.load_state_dict(state, strict=False)
    assert result.missing_keys == ["bias"]
    assert result.unexpected_keys == ["other"]
    assert torch.equal(target.weight, sparse.weight)
    both = sparse.state_dict() | {"weight": sparse.weight}
    assert target.load_state_dict(both, strict=False).unexpected_keys == ["weight"]
    result = target.load_state_dict({"values": sparse.values.detach() * 2}, strict=False)
    assert sorted(result.missing_keys) == ["bias", "meta"]
    assert torch.equal(target.weight, sparse.weight * 2)
    assert target.load_state_dict({}, strict=False).missing_keys == ["values", "bias", "meta"]


def test_load_into_meta_module_with_assign():
    dense, sparse, x = make("conv2d")
    for state in (sparse.state_dict(), dense.state_dict()):
        target = SparseConv2d(16, 24, 3, padding=1, device="meta")
        assert target.values.is_meta and target.meta.is_meta and target.bias.is_meta
        target.load_state_dict(state, assign=True)
        assert_loaded(target, sparse, x)
    with torch.device("meta"):
        assert SparseLinear(64, 8).values.is_meta


def test_torch_save_and_load_weights_only():
    _, sparse, x = make("conv2d")
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    target = SparseConv2d(16, 24, 3, padding=1)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert_loaded(target, sparse, x)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, sparse, x = make("conv2d")
    safetensors.save_file(sparse.state_dict(), tmp_path / "x.safetensors")
    target = SparseConv2d(16, 24, 3, padding=1)
    target.load_state_dict(safetensors.load_file(tmp_path / "x.safetensors"))
    assert_loaded(target, sparse, x)
    safetensors.save_model(sparse, str(tmp_path / "model.safetensors"))
    other = SparseConv2d(16, 24, 3, padding=1)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert_loaded(other, sparse, x)


@pytest.mark.parametrize("name", LAYERS)
def test_deepcopy_and_pickle(name):
    _, sparse, x = make(name)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert_loaded(twin, sparse, x)
        with torch.no_grad():
            twin.values.zero_()
        assert sparse.values.any()


# Casts and compilers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
@pytest.mark.filterwarnings("ignore:.*plain torch reference:UserWarning")
def test_cast(name, dtype):
    dense, sparse, x = make(name)
    exact = dense.double()(x.double())
    sparse = copy.deepcopy(sparse).to(dtype)
    assert sparse.values.dtype == sparse.bias.dtype == dtype
    assert sparse.meta.dtype == torch.uint8
    found = sparse(x.to(dtype))
    assert found.dtype == dtype
    ours = (found.double() - exact).abs()
    theirs = (dense.to(dtype)(x.to(dtype)).double() - exact).abs()
    assert ours.max() <= 2 * theirs.max() + torch.finfo(dtype).eps


def test_every_way_to_cast_keeps_the_metadata():
    _, sparse, _ = make("linear")
    meta = sparse.meta.clone()
    for cast in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.type(torch.float32),
        lambda m: m.to("cpu"),
        lambda m: m.to(memory_format=torch.channels_last),
    ):
        cast(sparse)
        assert sparse.meta.dtype == torch.uint8
        assert torch.equal(sparse.meta, meta)
        sparse.packed.validate()


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_autocast(name):
    dense, sparse, x = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = sparse(x), dense(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d_same"])
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    dense, sparse, x = make(name)
    model = nn.Sequential(sparse, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (x, torch.cat([x, x, x])):
        assert_same(compiled(batch), F.relu(dense(batch)))
    compiled(x).sum().backward()
    assert sparse.values.grad is not None


def test_compile_with_inductor():
    torch._dynamo.reset()
    dense, sparse, x = make("linear")
    compiled = torch.compile(nn.Sequential(sparse, nn.GELU()), fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(x), F.gelu(dense(x)))


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_export_with_dynamic_batch(name):
    dense, sparse, x = make(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    # In a Sequential: the graph module that torch unpacks has an attribute ``meta`` of its own at its root.
    program = torch.export.export(nn.Sequential(sparse).eval(), (x,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert any("sparseops" in str(node.target) for node in program.graph.nodes)
    assert {"0.values", "0.meta"} <= set(program.state_dict)
    assert_same(loaded(torch.cat([x, x])), dense(torch.cat([x, x])))


# Bad input


def test_wrong_layer_is_refused():
    with pytest.raises(TypeError, match=r"SparseLinear.from_dense: layer must be Linear, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(16, 16, 3))


def test_weight_without_the_pattern_is_refused():
    layer = nn.Linear(64, 8)
    with pytest.raises(ValueError, match=r'at most two non-zeros in each group of four \(prune="magnitude"'):
        SparseLinear.from_dense(layer)


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"SparseLinear: format must be one of nm24, channel, got 'csr'"):
        SparseLinear(64, 8, format="csr")


def test_non_float_weight_is_refused():
    layer = nn.Linear(64, 8)
    layer.weight = nn.Parameter(torch.ones(8, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"w must be a dense floating-point tensor, got torch.int8"):
        SparseLinear.from_dense(layer)


def test_wrong_features_are_refused_even_within_the_padding():
    sparse = SparseLinear(60, 8)  # 60 is stored as 64
    with pytest.raises(ValueError, match=r"SparseLinear: input must have 60 features, got shape \(2, 64\)"):
        sparse(torch.randn(2, 64))


def test_wrong_channels_are_refused_even_within_the_padding():
    sparse = SparseConv2d(18, 8, 3)  # each tap is stored with 20
    with pytest.raises(
        ValueError, match=r"SparseConv2d: input must have 3 or 4 dimensions and 18 channels, got"
    ):
        sparse(torch.randn(1, 20, 5, 5))
    with pytest.raises(ValueError, match=r"SparseConv2d: input must have 3 or 4 dimensions"):
        sparse(torch.randn(18, 5))
    with pytest.raises(ValueError, match=r"SparseConv1d: input must have 2 or 3 dimensions and 16 channels"):
        SparseConv1d(16, 8, 3)(torch.randn(1, 15, 5))


def test_wrong_dtype_is_refused():
    with pytest.raises(TypeError, match=r"values must have the dtype of x"):
        SparseLinear(64, 8)(torch.randn(1, 64, dtype=torch.float16))


def test_weight_cannot_be_assigned():
    sparse = SparseLinear(64, 8)
    with pytest.raises((AttributeError, KeyError)):
        sparse.weight = torch.zeros(8, 64)
    with pytest.raises((AttributeError, KeyError)):
        sparse.weight = nn.Parameter(torch.zeros(8, 64))


def test_public_names():
    for name in sparseops.__all__:
        assert getattr(sparseops, name) is not None
    assert sparseops.SparseLinear is SparseLinear
