"""What layers and activations cost: the numbers of the report, and the choice that joins ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from sparseops.compact.trace import Trace, arg, op_name, shape_of
from sparseops.nn import SparseModule

MACS_PER_BYTE = 4
"""How many multiply-adds take as long as moving one byte to or from memory: a core that does 40 of them per
nanosecond in float32 beside memory of 10 GB/s. Gathering and scattering pays when it saves more."""

PRODUCTS = frozenset("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())


@dataclass(frozen=True)
class Totals:
    """Of one call on the example. parameters: how many numbers the model trains. macs: multiply-adds of its
    linear and convolution layers. activations: bytes of all tensors that ops hand on."""

    parameters: int
    macs: int
    activations: int


def macs_of(trace: Trace, modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Multiply-adds by layer (of what is no layer, by node): the weights that it stores times the places that
    it applies them to."""
    found: dict[str, int] = {}
    for node in trace.nodes:
        if op_name(node) not in PRODUCTS:
            continue
        weight, output = shape_of(arg(node, "weight")), shape_of(node)
        assert weight is not None and output is not None
        name = trace.names.get(arg(node, "weight"), node.name)
        owner = name.rpartition(".")[0]
        module = modules.get(owner)
        stored = module.values.numel() if isinstance(module, SparseModule) else prod(weight)
        key = owner if module is not None else name
        found[key] = found.get(key, 0) + stored * _places(op_name(node), node.args[0], weight, output)
    return found


def _places(op: str, x: object, weight: tuple[int, ...], output: tuple[int, ...]) -> int:
    if not op.startswith("conv_transpose"):
        return prod(output) // max(1, weight[0])
    return prod(shape_of(x) or ()) // max(1, weight[0])  # type: ignore[arg-type]


def totals(model: nn.Module, trace: Trace) -> Totals:
    """trace: of ``model`` with its sparse layers made dense."""
    values = [node.meta.get("val") for node in trace.fresh]
    return Totals(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=sum(macs_of(trace, dict(model.named_modules())).values()),
        activations=sum(value.nbytes for value in values if isinstance(value, Tensor)),
    )


@dataclass(frozen=True)
class Shape:
    """A layer beside other tensors' channels. inputs, outputs: on its edges; cols, rows: those that it reads
    and computes. taps: weights per pair. places_in, places_out: elements per channel. itemsize: bytes of
    one. fused: the kernel gathers and scatters by itself, so that nothing is moved twice."""

    inputs: int
    outputs: int
    cols: int
    rows: int
    taps: int
    places_in: int
    places_out: int
    itemsize: int
    fused: bool


def gather_and_scatter(shape: Shape) -> tuple[bool, bool]:
    """Whether a layer had better gather its inputs, and scatter its outputs, than compute with zeros in the
    place of the others."""

    def cost(choice: tuple[bool, bool]) -> int:
        gather, scatter = choice
        cols, rows = shape.cols if gather else shape.inputs, shape.rows if scatter else shape.outputs
        moved = shape.cols * shape.places_in * gather + shape.rows * shape.places_out * scatter
        # what is gathered or scattered is written once more and read once more
        again = 0 if shape.fused else 2 * shape.itemsize * moved
        return rows * cols * shape.taps * shape.places_out + MACS_PER_BYTE * again

    choices = [
        (gather, scatter)
        for gather in (False, True)
        for scatter in (False, True)
        if (shape.cols < shape.inputs or not gather) and (shape.rows < shape.outputs or not scatter)
    ]
    return min(choices, key=cost)
