"""A plan that nobody wrote: which layers of a residual network get 2:4, fewer filters, or nothing.

It trains a small ResNet on Fashion-MNIST, lets ``auto_plan`` measure what each layer loses and wins by each
option, prunes by the plan that it finds, and retrains. 2,000 of the training pictures are kept for the
measurements: neither the plan nor the training sees the pictures that the table is of. Which plan is found
depends on the machine, whose times decide. ``--cache`` keeps the measurements, so that another run with the
same weights goes on from there; ``--plot`` draws them. Fashion-MNIST comes from Debian's package, or from
where docs/env.md says. At the root of a clone::

    pip install -e ".[examples]" && python examples/plan_automatically.py --plot sensitivity.png
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

from support import data, nets
from support.results import Results, run
from support.training import Batches, accuracy, cross_entropy, mirrored, one_cycle, outputs, sgd, train
from torch import nn

from sparseops import Channels, Pruner, auto_plan, convert, fit_sparse, recalibrate

OPTIONS = ("2:4", Channels(ratio=0.25), Channels(ratio=0.5))
# Retraining brings back most of what the plan costs at once.
AT_ONCE, RETRAINED = 0.03, 0.01


def plan(options: argparse.Namespace) -> Results:
    images = data.images(small=options.quick)
    held_out, epochs, retraining = (500, 2, 1) if options.quick else (2000, 4, 2)
    x, y = images.x[:-held_out], images.y[:-held_out]
    batches = Batches(x, y, size=128, seed=options.seed, change=mirrored)
    example, statistics = images.test_x[:64], [x[:500]]
    pictures = "MNIST" if options.quick else "Fashion-MNIST"
    results = Results(f"ResNet on {pictures}, planned automatically", "accuracy", example)

    def evaluate(model: nn.Module) -> float:
        return accuracy(outputs(model, images.x[-held_out:]), images.y[-held_out:])

    def add(name: str, model: nn.Module) -> None:
        results.add(name, accuracy(outputs(model, images.test_x), images.test_y), model)

    dense = nets.resnet()
    train(dense, sgd(list(dense.parameters()), 0.1), batches, cross_entropy, epochs)
    add("dense", dense)

    auto = auto_plan(
        dense,
        evaluate,
        example,
        max_drop=AT_ONCE,
        options=OPTIONS,
        recalibrate=statistics,
        cache=options.cache,
    )
    auto.print()
    print(auto.plan)
    if not auto.chosen:  # on this machine no layer is faster, and auto_plan has said so
        return results
    if options.plot is not None:
        auto.plot(options.plot)

    pruned = Pruner(copy.deepcopy(dense), auto.plan, example_inputs=example).finalize()
    add("one-shot", convert(pruned, prune=None, example_inputs=example))
    recalibrate(pruned, statistics)
    add("recalibrated", convert(pruned, prune=None, example_inputs=example))
    found = fit_sparse(
        dense,
        auto.plan,
        cross_entropy,
        evaluate,
        batches=batches,
        max_drop=RETRAINED,
        rounds=1,
        steps=retraining * len(batches),
        optimizer=sgd,
        schedule="oneshot",
        lr_schedule=one_cycle,
        recalibrate=statistics,
        seed=options.seed,
        example_inputs=example,
    )
    found.print()
    add("retrained", convert(found.model, prune=None, example_inputs=example))
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the accuracies it prints."""
    return run(plan, __doc__, argv, cache="keep the measurements there", plot="draw them there")


if __name__ == "__main__":
    main()
