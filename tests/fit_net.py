"""A small model and its training, for the tests of ``fit_sparse``."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from sparseops.prune import Unstructured
from sparseops.train.fit import fit_sparse
from sparseops.train.loggers import Callback

PLAN_OF_80 = Unstructured(0.8)
SGD = partial(torch.optim.SGD, lr=0.05)


def net():
    return nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))


def data(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 10, generator=generator) for _ in range(count)]


def train(model, x):
    return F.mse_loss(model(x), x.flip(1))


def zeros(model):
    """The share of zeros of the weights, biases left aside."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def density(model):
    """A metric that falls with the zeros alone."""
    return 1.0 - zeros(model)


def fit(model=None, plan=PLAN_OF_80, train=train, evaluate=density, **options):
    options = {"batches": data(), "optimizer": SGD, "max_drop": 1.0, **options}
    return fit_sparse(net() if model is None else model, plan, train, evaluate, **options)


class Recorder(Callback):
    def __init__(self, every=1):
        self.every = every
        self.calls, self.values = [], []

    def on_start(self, options):
        self.calls.append(("start", options["rounds"]))

    def on_round(self, step, number, strength):
        self.calls.append(("round", step, number, strength))

    def on_step(self, step, values):
        self.calls.append(("step", step))
        self.values.append(values)

    def on_evaluate(self, step, stage, metrics):
        self.calls.append((stage, step))

    def on_end(self, result):
        self.calls.append(("end", result))
