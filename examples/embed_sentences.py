"""Language: MiniLM's sentence embeddings with every linear layer of its encoder 2:4, by three criteria.

The network comes trained out of a package. How good its embeddings are says a linear layer that reads the
department out of reviews of clothes: fitted to some, judged on others. It is pruned at once by magnitude, by
Wanda and by SparseGPT, which look at other reviews, and is then retrained to give the dense network's
embeddings of those. At the root of a clone::

    pip install -e ".[examples]" && python examples/embed_sentences.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from support import data, pretrained
from support.results import Results, run
from support.training import Batches, linear_probe, one_cycle, outputs
from torch import Tensor, nn

from sparseops import Plan, Pruner, convert, explain, fit_sparse

PLAN = Plan({"layers.*": "2:4", "*": None})
SIZE = 32


def loss(model: nn.Module, batch: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
    inputs, wanted = batch
    return 1 - F.cosine_similarity(model(*inputs), wanted).mean()


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 2e-4)


def embed(options: argparse.Namespace) -> Results:
    fitted, judged, others, epochs = (60, 40, 64, 1) if options.quick else (400, 400, 1200, 2)
    criteria = ("l1", "wanda") if options.quick else ("l1", "wanda", "sparsegpt")
    texts, y = data.reviews(fitted + judged + others)
    tokens, mask = pretrained.tokenized(texts)
    known = fitted + judged
    example = (tokens[:SIZE], mask[:SIZE])
    results = Results("MiniLM, all linear layers 2:4", "departments right", example)

    def evaluate(model: nn.Module) -> float:
        x = outputs(model, tokens[:known], mask[:known], size=100)
        return linear_probe(x[:fitted], y[:fitted], x[fitted:], y[fitted:known])

    def add(name: str, model: nn.Module) -> nn.Module:
        shipped = model if model is dense else convert(model, prune=None)
        results.add(name, evaluate(shipped), shipped)
        return shipped

    dense = pretrained.minilm()
    add("dense", dense)
    unread = slice(known, None)
    wanted = outputs(dense, tokens[unread], mask[unread], size=100)
    batches = Batches(tokens[unread], mask[unread], wanted, size=SIZE, seed=options.seed)
    calibration = list(batches)[:8]
    for criterion in criteria:
        pruner = Pruner(copy.deepcopy(dense), PLAN, criterion=criterion, calibration=calibration)
        add(f"{criterion}, one-shot", pruner.finalize())
    found = fit_sparse(
        dense,
        PLAN,
        loss,
        evaluate,
        batches=batches,
        rounds=1,
        steps=epochs * len(batches),
        criterion="wanda",
        calibration=calibration,
        schedule="oneshot",
        optimizer=adam,
        lr_schedule=one_cycle,
        max_drop=0.05,
        seed=options.seed,
    )
    found.print()
    explain(add("wanda, distilled", found.model)).print()
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the shares of departments right that it prints."""
    return run(embed, __doc__, argv)


if __name__ == "__main__":
    main()
