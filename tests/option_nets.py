"""What tests of automatic plans share: a chain of layers, made-up metrics and times by layer and option."""

import torch
from torch import nn

from sparseops import Channels
from sparseops.report import Code, Row

A, B, C = OPTIONS = ["2:4", Channels(0.25, keep_last=False), Channels(0.75, keep_last=False)]
# the share of a weight that each makes zero
SHARES = {0.5: A, 0.25: B, 0.75: C}


def chain(layers=4, width=32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


X = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))


def chosen_in(model):
    """What each pruned layer of a model has got, by name."""
    return {
        name: SHARES[float((layer.weight == 0).float().mean())]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and bool((layer.weight == 0).any())
    }


class Judge:
    """A metric of 1 less the drops of the layers, whose sum ``together`` may change.

    drops: by layer and option. calls: what was pruned in the models that it was asked about, in order.
    """

    def __init__(self, drops, together=lambda total, chosen: total):
        self.drops, self.together, self.calls = drops, together, []

    def __call__(self, model):
        chosen = chosen_in(model)
        self.calls.append(chosen)
        total = sum(self.drops[pair] for pair in chosen.items())
        return 1 - (self.together(total, chosen) if len(chosen) > 1 else total)


def fake_times(times, before=10.0):
    """In place of what ``convert`` measures: ``times`` by layer and option, every layer dense ``before``."""

    def rows_of(donor, example_inputs):
        rows = {}
        for name, option in chosen_in(donor).items():
            after = times[name, option]
            code, reason = (Code.CONVERTED, "") if after < before else (Code.SLOWER, "it is slower")
            rows[name] = Row(name, "Linear", (32, 32), "", "", code, reason, ms_before=before, ms_after=after)
        return rows

    return rows_of
