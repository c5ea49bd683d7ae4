"""Weights with all kinds of evidence, for the tests of criteria."""

import torch

SHAPES = [(7, 5), (1, 6), (6, 1), (1, 1), (6, 4, 3), (5, 4, 3, 2), (4, 3, 2, 1, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EVIDENCE = ("gradient", "inputs", "scale", "movement")
OF_WEIGHTS = ["l1", "l2", "gradient", "taylor", "lamp", "wanda", "movement"]
OF_CHANNELS = [*OF_WEIGHTS, "fpgm"]


def case(shape, seed=0, dtype=torch.float32):
    """A weight and evidence for all criteria."""
    torch.manual_seed(seed)
    weight = torch.randn(shape).to(dtype)
    evidence = {key: torch.rand(shape) for key in ("gradient", "inputs")}
    evidence["movement"] = torch.randn(shape)
    evidence["scale"] = torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return weight, evidence
