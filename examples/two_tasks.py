"""Two tasks on one trunk: what garment is it, and how is it turned? Pruned with a budget for each task.

It trains a small VGG with two heads on Fashion-MNIST, pictures turned by a random number of quarters, and
prunes its convolutions and its trunk's linear layer to 2:4 at the summed losses of both heads, within a
budget of one point for garments and half a point for turns. Fashion-MNIST comes from Debian's package, or
from where docs/env.md says. At the root of a clone::

    pip install -e ".[examples]" && python examples/two_tasks.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from support import data, nets
from support.results import Results, run
from support.training import Batches, accuracy, one_cycle, outputs, sgd, train
from torch import Tensor, nn

from sparseops import Plan, Pruner, convert, fit_sparse, recalibrate

PLAN = Plan({"trunk.conv1": None, "trunk.*": "2:4", "*": None})
BUDGETS = {"kind": 0.01, "turn": 0.005}


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    x, y = batch
    kind, turn = model(x)
    return {"kind": F.cross_entropy(kind, y[:, 0]), "turn": F.cross_entropy(turn, y[:, 1])}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack(list(losses(model, batch).values())).sum()


def judge(options: argparse.Namespace) -> Results:
    images = data.images(small=options.quick)
    x, y = data.turned(images.x, images.y)
    test_x, test_y = data.turned(images.test_x, images.test_y)
    epochs, retraining = (2, 1) if options.quick else (4, 2)
    batches = Batches(x, y, size=128, seed=options.seed)
    example, statistics = test_x[:64], [x[:1000]]
    pictures = "MNIST" if options.quick else "Fashion-MNIST"
    results = Results(f"Two tasks on {pictures}, 2:4", "accuracy: kind", example)

    def evaluate(model: nn.Module) -> dict[str, float]:
        kind, turn = outputs(model, test_x)
        return {"kind": accuracy(kind, test_y[:, 0]), "turn": accuracy(turn, test_y[:, 1])}

    def add(name: str, shipped: nn.Module) -> None:
        found = evaluate(shipped)
        results.add(name, found["kind"], shipped, turn=found["turn"])

    dense = nets.TwoTasks()
    train(dense, sgd(list(dense.parameters()), 0.1), batches, loss, epochs)
    add("dense", dense)

    pruned = Pruner(copy.deepcopy(dense), PLAN).finalize()
    add("one-shot", convert(pruned, prune=None, example_inputs=example))
    recalibrate(pruned, statistics)
    add("recalibrated", convert(pruned, prune=None, example_inputs=example))
    found = fit_sparse(
        dense,
        PLAN,
        losses,
        evaluate,
        batches=batches,
        max_drop=BUDGETS,
        rounds=1,
        steps=retraining * len(batches),
        optimizer=sgd,
        schedule="oneshot",
        lr_schedule=one_cycle,
        recalibrate=statistics,
        seed=options.seed,
    )
    found.print()
    add("retrained", convert(found.model, prune=None, example_inputs=example))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the accuracies it prints, of each network for both tasks."""
    return run(judge, __doc__, argv)


if __name__ == "__main__":
    main()
