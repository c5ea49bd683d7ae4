"""Edge detection: which weights of a trained network may go, by criteria that look at the data.

HED's thirteen 3x3 convolutions (VGG16's; all but the first) are made 2:4 sparse at once, without training: by
the size of the weights, by wanda and by SparseGPT, which see twelve photographs that are not judged, and by
wanda after the channels were put into an order that suits 2:4. Each is judged by how far its edges agree with
the dense network's (F1). The weights are a file of a package, the photographs scikit-image's. At the root of
a clone::

    pip install -e ".[examples]" && python examples/detect_edges.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from support import data, pretrained
from support.results import Results, run
from torch import Tensor, nn

from sparseops import Plan, Pruner, convert, demo, explain_permutation, permute_channels

ALL = Plan({"vgg.block1.conv1": None, "vgg.*": "2:4", "*": None})
# SparseGPT and the search for an order take most of their time in the wide layers of the last blocks
FIRST = Plan({"vgg.block1.conv1": None, "vgg.block[12].*": "2:4", "*": None})


def detect(options: argparse.Namespace) -> Results:
    size, plan = (96, FIRST) if options.quick else (320, ALL)
    learned, judged = data.photos(size, 2 if options.quick else 4)
    if options.quick:
        learned = learned[:4]
    blocks = "two of five blocks" if options.quick else "all blocks"
    results = Results(f"HED, {blocks} 2:4 by several criteria", "F1 against the dense edges", judged[0])

    def edges(model: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            return [model(photo)[0, 0] for photo in judged]

    dense = pretrained.hed()
    truth = edges(dense)

    def add(name: str, model: nn.Module) -> None:
        results.add(name, demo.agreement(truth, edges(model)).f1, model)

    def prune(name: str, model: nn.Module, criterion: str) -> None:
        pruned = Pruner(model, plan, criterion=criterion, calibration=learned).finalize()
        add(name, convert(pruned, prune=None, example_inputs=judged[0]))

    add("dense", dense)
    for criterion in ("l1", "wanda", "sparsegpt"):
        prune(criterion, copy.deepcopy(dense), criterion)
    ordered = permute_channels(dense, judged[0], plan)
    explain_permutation(ordered).print()
    prune("wanda, channels permuted", ordered, "wanda")
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the agreements it prints."""
    return run(detect, __doc__, argv)


if __name__ == "__main__":
    main()
