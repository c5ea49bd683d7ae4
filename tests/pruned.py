"""What tests of compaction share: networks with dropped channels, and the comparison with the masked one."""

import torch
from torch import nn

import sparseops
from sparseops.compact import compact, explain_compact
from sparseops.formats import Keep
from sparseops.nn import SparseConv1d, SparseConv2d, SparseEmbedding, SparseLinear

HALF = range(8, 16)

SPARSE = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
}


def drop(layer, outputs=None, inputs=None, nm24=False):
    """The layer in the channel format, keeping these outputs and inputs."""
    if isinstance(layer, nn.Embedding):
        return SparseEmbedding.from_dense(layer, prune=Keep(torch.as_tensor(outputs)))
    lists = [None if index is None else torch.as_tensor(index) for index in (inputs, outputs)]
    cls = SPARSE[type(layer)]
    return cls.from_dense(layer, prune=Keep(*lists, nm24=nm24), format="channel")


def prune(model, ratio=0.5, block=8, seed=0):
    """``model`` itself with random blocks of the outputs of every layer but the last and the grouped ones
    dropped; in float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name, layer in layers[:-1]:
        if getattr(layer, "groups", 1) > 1:
            continue
        blocks = -(-layer.weight.shape[0] // block)
        kept = torch.randperm(blocks, generator=generator)[: max(1, round(blocks * (1 - ratio)))]
        outputs = (kept[:, None] * block + torch.arange(block)).flatten().sort().values
        model.set_submodule(name, drop(layer, outputs[outputs < layer.weight.shape[0]]))
    return model


@torch.no_grad()
def assert_same(small, model, *args):
    """``small`` computes what ``model`` does, and what the masked dense model does, element by element."""
    masked = sparseops.to_dense(model).eval()
    found, expected = small(*args), masked(*args)
    scale = expected.abs().max()
    bound = 1e-9 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=float(scale) * bound)
    assert scale > 0


@torch.no_grad()
def randomise(model, seed=0):
    """``model`` itself in evaluation mode and float64, every number of it random."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    for name, tensor in model.named_buffers():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.double().eval()


class Fn(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


class Net(nn.Module):
    """Layers by name and a forward over them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.fn = forward

    def forward(self, *args):
        return self.fn(self, *args)


def image(*shape):
    return torch.randn(shape or (2, 3, 9, 7), generator=torch.Generator().manual_seed(1)).double()


def check(model, *args):
    """The compacted model, equal to the masked one, and its report."""
    small = compact(randomise(model), args)
    report = explain_compact(small)
    assert report.reason == ""
    assert_same(small, model, *args)
    return small, report


def conv(inputs=3, outputs=16, kernel=3, kept=HALF, **options):
    return drop(nn.Conv2d(inputs, outputs, kernel, **options), kept)


def outputs_of(report, name):
    return report[name].outputs
