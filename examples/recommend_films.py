"""Recommendation: how many stars does a user give a film? Neural matrix factorisation, pruned two ways.

It trains the dense network on MovieLens-100k. Then the MLP becomes 2:4; or both tables of embeddings lose
half of their columns and the MLP half of its neurons, so that the tables, which are most of the bytes, halve.
The ratings may be used for research alone; they come out of a package. It takes a minute on one core. At the
root of a clone::

    pip install -e ".[examples]" && python examples/recommend_films.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from support import data, nets
from support.results import Results, run
from support.training import Batches, one_cycle, outputs, rmse, train
from torch import Tensor, nn

from sparseops import Channels, Plan, Pruner, convert, fit_sparse

PLANS = {
    "2:4": Plan({"mlp.9": None, "mlp.*": "2:4", "*": None}),
    "channels": Plan({"mlp.9": None, "*": Channels(ratio=0.5)}),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pairs, stars = batch
    return F.mse_loss(model(pairs), stars)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 2e-3, weight_decay=1e-5)


def gentle_adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The network over-fits soon."""
    return torch.optim.Adam(parameters, 3e-4, weight_decay=1e-4)


def recommend(options: argparse.Namespace) -> Results:
    ratings = data.ratings()
    epochs = 1 if options.quick else 3
    batches = Batches(ratings.x, ratings.y, size=256, seed=options.seed)
    example = ratings.test_x[:4096]
    results = Results("matrix factorisation on MovieLens-100k", "RMSE, stars", example)

    def error(model: nn.Module) -> float:
        return rmse(outputs(model, ratings.test_x, size=4000), ratings.test_y)

    def add(name: str, model: nn.Module) -> None:
        shipped = model if model is dense else convert(model, prune=None)
        results.add(name, error(shipped), shipped)

    dense = nets.Recommender()
    train(dense, adam(list(dense.parameters())), batches, loss, epochs)
    add("dense", dense)
    for name, plan in PLANS.items():
        add(f"{name}, one-shot", Pruner(copy.deepcopy(dense), plan).finalize())
        found = fit_sparse(
            dense,
            plan,
            loss,
            lambda model: -error(model),
            batches=batches,
            rounds=1,
            steps=len(batches),
            optimizer=gentle_adam,
            lr_schedule=one_cycle,
            seed=options.seed,
        )
        found.print()
        add(f"{name}, retrained", found.model)
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the errors it prints."""
    return run(recommend, __doc__, argv)


if __name__ == "__main__":
    main()
