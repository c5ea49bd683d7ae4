"""Image classification: a small VGG on Fashion-MNIST, 2:4 sparse, retrained, and taught by the dense one.

It trains the dense network (two minutes on two cores), drops two of each four weights at once, measures the
batch norms afresh, and then retrains the network while it is pruned: once on the labels, once on the dense
network's answers too. Fashion-MNIST comes from Debian's package, or from where docs/env.md says. At the root
of a clone::

    pip install -e ".[examples]" && python examples/classify_images.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from support import data, nets
from support.results import Results, run
from support.training import Batches, accuracy, mirrored, one_cycle, outputs, train
from torch import Tensor, nn

from sparseops import Distiller, Plan, Pruner, convert, fit_sparse, recalibrate

# The first layer and the last have few weights, and lose the most by it.
PLAN = Plan({"conv1": None, "classes": None, "*": "2:4"})


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def sgd(parameters: list[nn.Parameter], rate: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


def classify(options: argparse.Namespace) -> Results:
    images = data.images(small=options.quick)
    epochs, retraining = (2, 1) if options.quick else (4, 2)
    batches = Batches(images.x, images.y, size=128, seed=options.seed, change=mirrored)
    example = images.test_x[:64]
    pictures = "MNIST" if options.quick else "Fashion-MNIST"
    results = Results(f"VGG on {pictures}, 2:4", "accuracy", example)

    def evaluate(model: nn.Module) -> float:
        return accuracy(outputs(model, images.test_x), images.test_y)

    def add(name: str, model: nn.Module) -> None:
        results.add(name, evaluate(model), convert(model, prune=None, example_inputs=example))

    dense = nets.vgg()
    train(dense, sgd(list(dense.parameters()), 0.1), batches, loss, epochs)
    results.add("dense", evaluate(dense), dense)

    pruned = Pruner(copy.deepcopy(dense), PLAN).finalize()
    add("one-shot", pruned)
    add("recalibrated", recalibrate(pruned, [images.x[:1000]]))

    for name, teacher in (("retrained", None), ("distilled", Distiller(dense))):
        found = fit_sparse(
            dense,
            PLAN,
            loss,
            evaluate,
            batches=batches,
            rounds=1,
            steps=retraining * len(batches),
            optimizer=sgd,
            lr_schedule=one_cycle,
            distill=teacher,
            seed=options.seed,
        )
        found.print()
        add(name, found.model)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the accuracies it prints."""
    return run(classify, __doc__, argv)


if __name__ == "__main__":
    main()
