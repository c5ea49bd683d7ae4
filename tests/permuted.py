"""What tests of permuted channels share: networks with something to gain, and checks that hold for all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from torch import nn

from sparseops.train.permute import explain_permutation, permute_channels
from sparseops.train.permute_report import Code

NOTHING = pytest.mark.filterwarnings("ignore:permute_channels. nothing was permuted")


@torch.no_grad()
def uneven(model, seed=0):
    """``model`` itself in evaluation mode, every number of it random, and the channels of each weight of very
    different sizes: there is something to gain."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            if tensor.ndim > 1:
                sizes = torch.randn(tensor.shape[1], generator=generator).exp() / tensor[0].numel() ** 0.5
                tensor.transpose(1, -1).mul_(sizes)
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


@torch.no_grad()
def assert_same(new, model, *args):
    """Element by element in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in args]
    found, expected = (copy.deepcopy(m).double()(*wide) for m in (new, model))
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)


def share_kept(module):
    """Of the squared weight what 2:4 keeps, one four at a time, in float64."""
    kept = total = 0.0
    for weight in (p for p in module.parameters() if p.ndim >= 2):
        for row in weight.detach().double().movedim(1, -1).flatten(0, -2).square().tolist():
            total += sum(row)
            for start in range(0, len(row), 4):
                kept += sum(sorted(row[start : start + 4], reverse=True)[:2])
    return kept / total


def checked(model, *args, plan="2:4"):
    """The permuted model, after the checks that hold for any, and its report."""
    before = state(model)
    new = permute_channels(model, args, plan)
    assert_untouched(model, before)
    assert_same(new, model, *args)
    old_modules, new_modules = dict(model.named_modules()), dict(new.named_modules())
    assert {n: type(m) for n, m in old_modules.items()} == {n: type(m) for n, m in new_modules.items()}
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    for name, tensor in new.state_dict(keep_vars=True).items():
        old = model.state_dict(keep_vars=True)[name]
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (old.shape, old.stride(), old.dtype)
        assert tensor.requires_grad == old.requires_grad and type(tensor) is type(old)
        assert not tensor.numel() or tensor.data_ptr() not in theirs
    report = explain_permutation(new)
    assert report.energy[1] >= report.energy[0]
    for row in report.layers:
        if row.energy is not None:
            assert row.energy[0] == pytest.approx(share_kept(old_modules[row.name]))
            assert row.energy[1] == pytest.approx(share_kept(new_modules[row.name]))
        assert (row.code is Code.DENSE) == (row.energy is None)
    return new, report


def codes(report):
    return {row.name: row.code for row in report.layers}


def image(*shape):
    return torch.randn(shape or (2, 3, 9, 7), generator=torch.Generator().manual_seed(1))


def stack(*layers, start=3):
    """A convolution, these layers over 32 channels, and two convolutions that read them."""
    return uneven(
        nn.Sequential(nn.Conv2d(start, 32, 3), *layers, nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 8, 1))
    )


class Block(nn.Module):
    """Of a transformer without attention between the heads' views: normalised, and scaled per channel."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(32, 64), nn.Linear(64, 32)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt())


class Language(nn.Module):
    def __init__(self, norm=lambda: nn.LayerNorm(32), heads=1):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 32), nn.Parameter(torch.ones(1, 6, 32))
        self.blocks = nn.Sequential(*[Block(norm()) for _ in range(2)])
        self.query, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.heads, self.norm, self.head = heads, norm(), nn.Linear(32, 40)

    def forward(self, tokens):
        x = self.blocks(self.embed(tokens) + self.place)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        x = x + self.out(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))
        return self.head(self.norm(x))


TOKENS = torch.arange(12).view(2, 6) % 11
