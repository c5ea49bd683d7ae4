"""Layers with a channel-pruned weight: they compute what the masked dense layer does, and their checkpoints
load whatever channels they keep."""

import copy
import io
import pickle
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from sparseops import SparseConv1d, SparseConv2d, SparseLinear
from sparseops.formats import ChannelPruned, Keep


def blocks(total, *chosen):
    return torch.tensor([c for c in range(total) if c // 8 in chosen])


KEEPS = {
    "both": lambda i, o: Keep(blocks(i, 0, 2), blocks(o, 1, 2)),
    "outputs": lambda i, o: Keep(None, blocks(o, 0, 3)),
    "inputs": lambda i, o: Keep(blocks(i, 1), None),
    "single": lambda i, o: Keep(torch.arange(0, i, 3), torch.arange(1, o, 2)),
    "nm24": lambda i, o: Keep(blocks(i, 0, 1, 3), blocks(o, 0, 2), nm24=True),
}
LAYERS = {
    "linear": (SparseLinear, lambda: nn.Linear(36, 28), (5, 36)),
    "conv1d": (SparseConv1d, lambda: nn.Conv1d(36, 28, 3, stride=2, padding=1), (2, 36, 17)),
    "conv2d": (SparseConv2d, lambda: nn.Conv2d(36, 28, 3, padding="same", bias=False), (2, 36, 9, 8)),
    "reflect": (SparseConv2d, lambda: nn.Conv2d(36, 28, 3, padding=1, padding_mode="reflect"), (2, 36, 9, 8)),
    "groups": (SparseConv2d, lambda: nn.Conv2d(72, 28, 3, padding=1, groups=2), (2, 72, 6, 5)),
}
every_keep = pytest.mark.parametrize("keep", KEEPS)
every_layer = pytest.mark.parametrize("kind", LAYERS)


def make(kind, keep="both", seed=0):
    """The sparse layer, the dense layer with the same zeros, and an input."""
    torch.manual_seed(seed)
    cls, dense, shape = LAYERS[kind]
    dense = dense()
    inputs = shape[-1] if kind == "linear" else shape[1]
    sparse = cls.from_dense(dense, prune=KEEPS[keep](inputs, 28), format="channel")
    masked = copy.deepcopy(dense)
    masked.weight.data = sparse.weight.detach()
    return sparse, masked, torch.randn(shape)


def buffer_of(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@every_keep
@every_layer
def test_it_computes_what_the_masked_layer_does(kind, keep):
    sparse, masked, x = make(kind, keep)
    assert 0 < sparse.packed.energy_kept and float((masked.weight == 0).float().mean()) > 0.3
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x), masked(x), rtol=1e-4, atol=1e-5)
    y, expected = sparse(x), masked(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    kept = sparse.packed
    if kept.meta is None:
        zeros = ChannelPruned(kept.values.grad, kept.in_index, kept.out_index, kept.shape, kept.groups)
        pattern = masked.weight.detach() != 0
        torch.testing.assert_close(
            zeros.to_dense() * pattern, masked.weight.grad * pattern, rtol=1e-3, atol=1e-4
        )
    if sparse.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, masked.bias.grad, rtol=1e-3, atol=1e-4)


@every_layer
def test_training_keeps_the_pattern(kind):
    sparse, masked, x = make(kind)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse(x).square().sum().backward()
    optimizer.step()
    dense = sparse.to_dense()
    assert type(dense) is type(masked) and torch.equal(dense.weight == 0, masked.weight == 0)
    assert not torch.equal(dense.weight, masked.weight)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("theirs", KEEPS)
@pytest.mark.parametrize("ours", KEEPS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_checkpoint_with_other_channels_loads(kind, ours, theirs):
    source, masked, x = make(kind, theirs, seed=1)
    target, _, _ = make(kind, ours)
    values = target.values
    target(x)
    loaded = torch.load(buffer_of(source.state_dict()), weights_only=True)
    target.load_state_dict(loaded)
    assert target.values is values, "an optimizer goes on holding it"
    assert target.state_dict().keys() == source.state_dict().keys()
    with torch.inference_mode():
        torch.testing.assert_close(target(x), masked(x), rtol=1e-4, atol=1e-5)
    assert target.packed.granularities == source.packed.granularities


@pytest.mark.parametrize("keep", ["both", "single", "inputs"])
@every_layer
def test_a_dense_checkpoint_loads(kind, keep):
    _, masked, x = make(kind, keep, seed=1)
    target, _, _ = make(kind, "outputs")
    target.load_state_dict(masked.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(target(x), masked(x), rtol=1e-4, atol=1e-5)


def test_a_dense_checkpoint_without_zero_channels_is_refused():
    target, _, x = make("linear")
    before = target(x)
    with pytest.raises(
        RuntimeError, match="weight must fit format channel: .*must have a channel that is all zero"
    ):
        target.load_state_dict(nn.Linear(36, 28).state_dict())
    torch.testing.assert_close(target(x), before)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("in_index", lambda t: t.flip(0), "in_index must be ascending without repetition"),
        ("in_index", lambda t: t + 30, "in_index must hold channels from 0 to 35"),
        ("out_index", lambda t: t[:8], r"values must have shape \(8, 16\)"),
        ("values", lambda t: t[:, :8], r"values must have shape \(16, 16\)"),
        ("in_index", lambda t: t.long(), "in_index must have dtype torch.int32"),
        ("in_index", lambda t: t.tolist(), "in_index must be a tensor, got list"),
    ],
)
def test_a_bad_checkpoint_changes_nothing(name, change, message):
    target, _, x = make("linear")
    before, state = target(x), target.state_dict()
    state = {key: value.clone() for key, value in state.items()}
    state[name] = change(state[name])
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    torch.testing.assert_close(target(x), before)


@every_keep
def test_copies_and_files(keep, tmp_path):
    sparse, masked, x = make("conv1d", keep)
    copies = [copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))]
    safetensors.torch.save_model(sparse, tmp_path / "layer.safetensors")
    other, _, _ = make("conv1d", "inputs", seed=3)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    for twin in (*copies, other):
        torch.testing.assert_close(twin(x), sparse(x), rtol=0, atol=0)


def test_moving_and_casting():
    sparse, masked, x = make("conv2d")
    half = copy.deepcopy(sparse).half()
    assert half.values.dtype is torch.float16 and half.in_index.dtype is torch.int32
    torch.testing.assert_close(half(x.half()).float(), masked(x), rtol=3e-2, atol=3e-2)
    cast = copy.deepcopy(sparse).type(torch.float64)
    assert cast.values.dtype is torch.float64 and cast.out_index.dtype is torch.int32
    there = copy.deepcopy(sparse).to("meta")
    assert there(x.to("meta")).shape == sparse(x).shape
    there.load_state_dict(sparse.state_dict(), assign=True)
    torch.testing.assert_close(there(x), sparse(x), rtol=0, atol=0)


def test_a_memory_format_is_that_of_images():
    sparse, masked, x = make("conv2d")
    sparse = sparse.to(memory_format=torch.channels_last)
    sparse.packed.validate()
    y = sparse(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, masked(x), rtol=1e-4, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_new_layer():
    layer = SparseLinear(64, 32, format="channel")
    assert layer.packed.granularities[0] in (8, 16) and layer.values.shape == (16, 32)
    assert layer(torch.randn(3, 64)).shape == (3, 32)
    with torch.device("meta"):
        assert SparseConv2d(16, 32, 3, format="channel").values.is_meta


def test_it_says_what_it_is():
    text = repr(make("conv2d")[0])
    assert re.search(r"format=channel, density=0\.\d+, kernel=\w+", text)


def test_export_and_compile():
    for keep in ("both", "nm24"):
        sparse, masked, x = make("conv2d", keep)
        model = nn.Sequential(sparse, nn.ReLU()).eval()
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), masked(x).relu(), rtol=1e-4, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), masked(x).relu(), rtol=1e-4, atol=1e-5)
