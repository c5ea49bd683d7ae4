"""Image classification: a small VGG on Fashion-MNIST, 2:4 sparse and without half of its filters.

It trains the dense network, prunes it at once, measures the batch norms afresh, and retrains what is left, on
the labels and on the dense network's answers. The 2:4 network is shipped with sparse kernels; the one without
filters is compacted, and is an ordinary smaller network. Fashion-MNIST comes from Debian's package, or from
where docs/env.md says. At the root of a clone::

    pip install -e ".[examples]" && python examples/classify_images.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

from support import data, nets
from support.results import Results, run
from support.training import Batches, accuracy, cross_entropy, mirrored, one_cycle, outputs, sgd, train
from torch import nn

from sparseops import Channels, Distiller, Plan, Pruner, compact, convert, fit_sparse, recalibrate

# The first layer and the last have few weights, and lose the most by it.
QUARTETS = Plan({"conv1": None, "classes": None, "*": "2:4"})
FILTERS = Plan({"conv*": Channels(ratio=0.5, criterion="l1"), "*": None})


def classify(options: argparse.Namespace) -> Results:
    images = data.images(small=options.quick)
    epochs, retraining = (2, 1) if options.quick else (4, 2)
    batches = Batches(images.x, images.y, size=128, seed=options.seed, change=mirrored)
    example, statistics = images.test_x[:64], [images.x[:1000]]
    pictures = "MNIST" if options.quick else "Fashion-MNIST"
    results = Results(f"VGG on {pictures}, 2:4 and half of the filters", "accuracy", example)

    def evaluate(model: nn.Module) -> float:
        return accuracy(outputs(model, images.test_x), images.test_y)

    def add(name: str, model: nn.Module, plan: Plan) -> None:
        shipped = convert(model, prune=None, example_inputs=example)
        if plan is FILTERS:
            shipped = compact(shipped, example)
        results.add(name, evaluate(shipped), shipped)

    dense = nets.vgg()
    train(dense, sgd(list(dense.parameters()), 0.1), batches, cross_entropy, epochs)
    results.add("dense", evaluate(dense), dense)

    def retrained(plan: Plan, teacher: Distiller | None) -> nn.Module:
        found = fit_sparse(
            dense,
            plan,
            cross_entropy,
            evaluate,
            batches=batches,
            rounds=1,
            steps=retraining * len(batches),
            optimizer=sgd,
            schedule="oneshot",
            lr_schedule=one_cycle,
            recalibrate=statistics,
            distill=teacher,
            seed=options.seed,
        )
        found.print()
        return found.model

    for name, plan in {"2:4": QUARTETS, "filters": FILTERS}.items():
        pruned = Pruner(copy.deepcopy(dense), plan).finalize()
        add(f"{name}, one-shot", pruned, plan)
        add(f"{name}, recalibrated", recalibrate(pruned, statistics), plan)
        if plan is QUARTETS:
            add(f"{name}, retrained", retrained(plan, None), plan)
        add(f"{name}, distilled", retrained(plan, Distiller(dense)), plan)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the accuracies it prints."""
    return run(classify, __doc__, argv)


if __name__ == "__main__":
    main()
