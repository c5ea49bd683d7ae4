"""Pitch: CREPE, 22 million parameters in convolutions, 2:4 sparse and without half of its channels.

It comes trained out of a package, and is judged on made tones of known pitch: how many are found within 50
cents, a quarter of a tone. 2:4 costs it nothing here. Without half of the channels that its convolutions read
it is lost until its batch norms are measured afresh, and is then retrained on a few hundred tones.
``compact`` leaves those channels out, with the filters that made them, and gives an ordinary smaller network.
At the root of a clone::

    pip install -e ".[examples]" && python examples/track_pitch.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from support import data, pretrained
from support.results import Results, run
from support.training import Batches, one_cycle, outputs
from torch import Tensor, nn

from sparseops import Channels, Plan, Pruner, compact, convert, explain, fit_sparse, recalibrate

QUARTETS = Plan({"conv1": None, "classifier": None, "*": "2:4"})
# Not the filters: each would leave a constant behind its batch norm, which padding breaks at the ends. What
# the others read is dropped, and with it the filters that made it; conv1 reads the one channel of sound.
CHANNELS = Plan({"conv1": None, "conv*": Channels(ratio=0.5, side="inputs"), "*": None})


def wanted(hertz: Tensor) -> Tensor:
    """What CREPE was taught: a bell of 25 cents about the pitch, over its 360 bins [N, 360]."""
    cents = 1200 * (hertz / 10).log2()
    bins = pretrained.FIRST_BIN + pretrained.BIN * torch.arange(360)
    return (-((bins - cents[:, None]) ** 2) / (2 * 25**2)).exp()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, bells = batch
    return F.binary_cross_entropy_with_logits(model(x), bells)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 2e-4)


def track(options: argparse.Namespace) -> Results:
    judged, learned, steps = (24, 32, 3) if options.quick else (200, 640, 60)
    x, hertz = data.tones(judged, seed=options.seed)
    tones, known = data.tones(learned, seed=options.seed + 1)
    batches = Batches(tones, wanted(known), size=16, seed=options.seed)
    statistics = tones[:128].split(32)
    example = x[:2]
    results = Results("CREPE, 2:4 and half of the channels", "pitches right", example)

    def evaluate(model: nn.Module) -> float:
        cents = 1200 * (pretrained.pitch(outputs(model, x, size=50)) / hertz).log2()
        return (cents.abs() < 50).double().mean().item()

    def add(name: str, shipped: nn.Module) -> None:
        results.add(name, evaluate(shipped), shipped)

    dense = pretrained.crepe()
    add("dense", dense)
    sparse = convert(Pruner(copy.deepcopy(dense), QUARTETS).finalize(), prune=None, example_inputs=example)
    explain(sparse).print()
    add("2:4, one-shot", sparse)

    pruned = Pruner(copy.deepcopy(dense), CHANNELS).finalize()
    add("channels, one-shot", compact(pruned, example))
    add("channels, recalibrated", compact(recalibrate(pruned, statistics), example))
    found = fit_sparse(
        dense,
        CHANNELS,
        loss,
        evaluate,
        batches=batches,
        rounds=1,
        max_drop=float("inf"),
        steps=steps,
        optimizer=adam,
        schedule="oneshot",
        lr_schedule=one_cycle,
        recalibrate=statistics,
        seed=options.seed,
    )
    found.print()
    add("channels, retrained", compact(found.model, example))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the shares of pitches right that it prints."""
    return run(track, __doc__, argv)


if __name__ == "__main__":
    main()
