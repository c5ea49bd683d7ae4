"""Models for the tests of checkpoints, and how their tensors are compared."""

import torch
from torch import nn

import sparseops
from sparseops.nn import SparseModule


class Net(nn.Module):
    """One layer of every kind there is a sparse module of, and others."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(24, 64)
        self.lstm = nn.LSTM(64, 32, bidirectional=True)
        self.gru = nn.GRU(64, 64)
        self.line = nn.Conv1d(64, 16, 3)
        self.conv = nn.Conv2d(16, 16, 3, groups=1)
        self.norm = nn.BatchNorm2d(16)
        self.twice = nn.Linear(36, 36)
        self.again = self.twice
        self.head = nn.Linear(36, 5)

    def forward(self, x):
        x = self.gru(self.lstm(self.embedding(x))[0])[0]
        x = self.norm(self.conv(self.line(x.transpose(1, 2)).unflatten(2, (4, -1))))
        return self.head(self.again(self.twice(nn.functional.pad(x.flatten(1), (0, 300))[:, :36])))


PLAN = sparseops.Plan({"embedding": sparseops.Channels(), "gru": sparseops.Channels(), "*": "2:4"})


def make_sparse(net):
    """Net with a sparse layer of every kind."""
    model = sparseops.convert(net, PLAN)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, SparseModule)}
    assert len(kinds) == 6, kinds
    return model


def two_of_four(*size):
    quads = torch.randn(*size).unflatten(1, (-1, 4))
    return torch.zeros_like(quads).scatter(2, quads.abs().topk(2, 2).indices, quads).flatten(1)


def make_mlp():
    """Two 2:4 layers, one that is not, and one whose rows are no multiple of 4."""
    model = nn.Sequential(nn.Linear(36, 64), nn.Linear(64, 46), nn.Linear(46, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.copy_(two_of_four(64, 36))
        model[1].weight.copy_(two_of_four(46, 64))
    return model


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
