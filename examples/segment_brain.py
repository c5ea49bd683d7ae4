"""Segmentation: a U-Net for grey and white matter, 2:4 sparse and without half of its channels, retrained.

It trains the dense network on slices of the averaged brain MNI152, prunes it at once, measures the batch
norms afresh, and retrains it while it is pruned, on the labels and on the dense network's answers. The 2:4
network is shipped with sparse kernels; the one without channels is compacted, through the U's
concatenations, and is an ordinary smaller network. The slices come out of a package. ``--picture FILE``
draws what each network finds. At the root of a clone::

    pip install -e ".[examples]" && python examples/segment_brain.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from support import data, nets
from support.pictures import draw_rows
from support.results import Results, run
from support.training import Batches, cross_entropy, dice, one_cycle, outputs, train
from torch import nn

from sparseops import Channels, Distiller, Plan, Pruner, compact, convert, fit_sparse, recalibrate

QUARTETS = Plan({"down.0.0": None, "output": None, "*": "2:4"})
CHANNELS = Plan({"output": None, "*": Channels(ratio=0.5, criterion="l1")})
SHOWN = 6


def adam(parameters: list[nn.Parameter], rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, rate)


def segment(options: argparse.Namespace) -> Results:
    brain = data.brain()
    if options.quick:
        # a quarter of the slices and of their pixels
        x, y, test_x, test_y = brain.x, brain.y, brain.test_x, brain.test_y
        x, test_x = x[::4, :, ::2, ::2], test_x[::4, :, ::2, ::2]
        brain = data.Split(x, y[::4, ::2, ::2], test_x, test_y[::4, ::2, ::2])
    epochs, retraining = 6, 2 if options.quick else 3
    batches = Batches(brain.x, brain.y, size=2 if options.quick else 4, seed=options.seed)
    example = brain.test_x[:4]
    results = Results("U-Net on slices of a brain, 2:4 and half of the channels", "dice", example)
    shown = torch.linspace(0, len(brain.test_x) - 1, SHOWN).long()
    rows = {"slice": brain.test_x[shown, 0], "grey and white matter": brain.test_y[shown] / 2}

    def evaluate(model: nn.Module) -> float:
        return dice(outputs(model, brain.test_x, size=28), brain.test_y)

    def add(name: str, model: nn.Module, plan: Plan | None = None) -> None:
        shipped = convert(model, prune=None, example_inputs=example) if plan else model
        if plan is CHANNELS:
            shipped = compact(shipped, example)
        results.add(name, evaluate(shipped), shipped)
        rows[f"{name}: dice {results.rows[-1].value:.3f}"] = (
            outputs(shipped, brain.test_x[shown]).argmax(1) / 2
        )

    dense = nets.UNet()
    train(dense, adam(list(dense.parameters()), 3e-3), batches, cross_entropy, epochs)
    add("dense", dense)
    for name, plan in {"2:4": QUARTETS, "channels": CHANNELS}.items():
        pruned = Pruner(copy.deepcopy(dense), plan).finalize()
        add(f"{name}, one-shot", pruned, plan)
        add(f"{name}, recalibrated", recalibrate(pruned, [brain.x]), plan)
        for kind, teacher in {"retrained": None, "distilled": Distiller(dense)}.items():
            found = fit_sparse(
                dense,
                plan,
                cross_entropy,
                evaluate,
                batches=batches,
                rounds=1,
                max_drop=float("inf"),
                schedule="oneshot",
                recalibrate=[brain.x],
                steps=retraining * len(batches),
                optimizer=adam,
                lr_schedule=one_cycle,
                distill=teacher,
                seed=options.seed,
            )
            found.print()
            add(f"{name}, {kind}", found.model, plan)
    if options.picture is not None:
        draw_rows(options.picture, rows)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the dice it prints."""
    return run(segment, __doc__, argv, picture="draw a picture there")


if __name__ == "__main__":
    main()
