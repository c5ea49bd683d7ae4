"""Speech: which of nine people said the vowel? An LSTM on JapaneseVowels, 2:4 and with half of its states.

It trains the dense network, prunes it at once, and retrains it while it is pruned, on the labels and on the
dense network's answers: to 2:4, which no kernel gains from in a layer that reads twelve numbers, with half of
the hidden units of each layer, by which three quarters of the recurrent weights go, and to 80 % zeros. The
recordings come out of a package. At the root of a clone::

    pip install -e ".[examples]" && python examples/tell_speakers.py
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

from sparseops import Channels, Distiller, Plan, Pruner, Unstructured, convert, fit_sparse

PLANS = {
    "2:4": Plan({"lstm": "2:4", "*": None}),
    "half the states": Plan({"lstm": Channels(ratio=0.5, keep_last=False), "*": None}),
    "80 % zeros": Unstructured(ratio=0.8),
}


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 2e-3)


def tell(options: argparse.Namespace) -> Results:
    vowels = data.vowels()
    epochs, retraining = (4, 2) if options.quick else (30, 15)
    batches = Batches(vowels.x, vowels.y, size=16, seed=options.seed)
    example = vowels.test_x[:64]
    results = Results("LSTM on JapaneseVowels", "speakers right", example)

    def evaluate(model: nn.Module) -> float:
        return accuracy(outputs(model, vowels.test_x), vowels.test_y)

    def add(name: str, model: nn.Module, plan: Plan | Unstructured | None = None) -> None:
        shipped = convert(model, prune=None) if isinstance(plan, Plan) else model
        results.add(name, evaluate(shipped), shipped)

    dense = nets.SeriesClassifier()
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
                optimizer=adam,
                lr_schedule=one_cycle,
                distill=teacher,
                seed=options.seed,
            )
            found.print()
            add(f"{name}, {kind}", found.model, plan)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the shares of speakers right that it prints."""
    return run(tell, __doc__, argv)


if __name__ == "__main__":
    main()
