"""Who is speaking? An LSTM of two layers on JapaneseVowels, 2:4 sparse and without half of its hidden units.

It trains the dense network on 270 recordings of nine men, prunes it at once, and retrains what is left, on the
labels and on the dense network's answers. Dropped hidden units leave every gate and all that reads them.
The recordings come out of a package. At the root of a clone::

    pip install -e ".[examples]" && python examples/tell_speakers.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from support import data, nets
from support.results import Results, run
from support.training import Batches, accuracy, one_cycle, outputs, train
from torch import Tensor, nn

from sparseops import Channels, Distiller, Plan, Pruner, compact, convert, explain, fit_sparse

PLANS = {
    "2:4": Plan({"lstm": "2:4", "*": None}),
    "units": Plan({"lstm": Channels(ratio=0.5), "*": None}),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def adam(parameters: list[nn.Parameter], rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, rate)


def tell(options: argparse.Namespace) -> Results:
    vowels = data.vowels()
    epochs, retraining = (8, 2) if options.quick else (30, 15)
    batches = Batches(vowels.x, vowels.y, size=16, seed=options.seed)
    example = vowels.test_x[:64]
    results = Results("LSTM on JapaneseVowels, 2:4 and half of the units", "accuracy", example)

    def evaluate(model: nn.Module) -> float:
        return accuracy(outputs(model, vowels.test_x), vowels.test_y)

    def add(name: str, model: nn.Module) -> nn.Module:
        shipped = convert(model, prune=None, example_inputs=example)
        results.add(name, evaluate(shipped), shipped)
        return shipped

    dense = nets.SeriesClassifier()
    train(dense, adam(list(dense.parameters()), 2e-3), batches, loss, epochs)
    results.add("dense", evaluate(dense), dense)
    for kind, plan in PLANS.items():
        add(f"{kind}, one-shot", Pruner(copy.deepcopy(dense), plan).finalize())
        for name, teacher in {"retrained": None, "distilled": Distiller(dense)}.items():
            found = fit_sparse(
                dense,
                plan,
                loss,
                evaluate,
                batches=batches,
                rounds=1,
                max_drop=float("inf"),
                steps=retraining * len(batches),
                optimizer=adam,
                schedule="oneshot",
                lr_schedule=one_cycle,
                distill=teacher,
                seed=options.seed,
            )
            found.print()
            shipped = add(f"{kind}, {name}", found.model)
        explain(shipped).print()
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the accuracies it prints."""
    return run(tell, __doc__, argv)


if __name__ == "__main__":
    main()
