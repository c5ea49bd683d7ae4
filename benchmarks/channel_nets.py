"""``python -m benchmarks.channel_nets``: whole networks with pruned channels, dense, converted and compacted.

The weights are random, since what is measured is time. Each layer but the last keeps the given share of its
outputs, in blocks of 8, of the largest L2 norm. All layers of the *converted* network gather and scatter; of
the *compacted* one only those do that meet at a residual addition; the third is compacted too, and its layers
that meet lose the same channels, chosen *together*. Each must give what a dense network with zeros in its
weights gives, and is timed beside the dense network before pruning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import isa
from benchmarks.compare import LAYOUTS, Comparison, Times, WrongResult, alternate, times
from benchmarks.networks import NETWORKS, randomise_batch_norm
from benchmarks.output import console
from benchmarks.provenance import RESULTS, machine
from benchmarks.results import Row, append, new_row
from benchmarks.run import VERDICT_STYLE, cells, table
from sparseops import Channels, compact, convert, explain_compact, to_dense

OP = "channel_network"
NETS = ("resnet50", "vgg16")
CLOSE = 1e-3  # of the largest output: float32, summed in another order in fifty layers
# What is asked of compacted networks, of the ratio that their products would give.
AT_LEAST, AIM = 0.9, 0.95


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of the convolutions and linear layers of a dense model."""
    found = [0]

    def count(layer: nn.Module, _: object, y: Tensor) -> None:
        weight = layer.get_parameter("weight")
        found[0] += y.numel() * weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return found[0]


def models(dense: nn.Module, x: Tensor, ratio: float) -> dict[str, nn.Module]:
    """The networks by name. Raises WrongResult when one of them computes something else."""
    converted = convert(dense, pattern=Channels(ratio=ratio))
    # Which layers meet is seen on an example.
    together = convert(dense, pattern=Channels(ratio=ratio, together=True), example_inputs=x, measure=False)
    found = {"converted": converted, "compacted": compact(converted, x), "together": compact(together, x)}
    for name, model in found.items():
        masked = to_dense(together if name == "together" else converted)
        with torch.inference_mode():
            expected = masked(x)
            error = (model(x) - expected).abs().max() / expected.abs().max()
        if not error <= CLOSE:
            raise WrongResult(f"{name}: off by {float(error):.2g} of the largest output")
    return {"dense": dense, **found}


def measure(found: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, Times]:
    """Each network in its faster memory format, timed in turn."""
    inputs = {name: x.contiguous(memory_format=layout) for name, layout in LAYOUTS.items()}
    best: dict[str, str] = {}
    for name, model in found.items():
        medians = {}
        for layout, laid_out in inputs.items():
            model.to(memory_format=LAYOUTS[layout])
            medians[layout] = times(layout, alternate({"": partial(model, laid_out)}, 3)[""]).p50
        best[name] = min(medians, key=lambda layout: medians[layout])
        model.to(memory_format=LAYOUTS[best[name]])
    calls: dict[str, Callable[[], Tensor]] = {
        name: partial(model, inputs[best[name]]) for name, model in found.items()
    }
    return {name: times(best[name], sample) for name, sample in alternate(calls, rounds).items()}


def rows(name: str, batch: int, ratio: float, rounds: int, small: bool = False) -> list[Row]:
    """One for each network but the dense one. ``small``: with the sizes for tests."""
    network = NETWORKS[name]
    if small:
        dense, x = network.small(), network.small_example(batch)
    else:
        dense, x = randomise_batch_norm(network.build()), torch.randn(batch, *network.example_shape)
    found = models(dense, x, ratio)
    whole, left = macs(dense, x), {}
    for kind in ("compacted", "together"):
        totals = explain_compact(found[kind])
        if totals.before is None or totals.after is None:
            raise WrongResult(f"{kind}: {totals.reason}")
        left |= {"converted": left.get("converted", totals.before.macs), kind: totals.after.macs}
    with torch.no_grad():  # in inference mode a weight that moves could not be put in order once
        sides = measure(found, x, rounds)
    shape = "x".join(map(str, x.shape))

    def row(kind: str) -> Row:
        shares = None if kind == "converted" else (AT_LEAST, AIM)
        at_least, aim = (round(share * whole / left[kind], 2) for share in shares or (0.0, 0.0))
        return new_row(
            OP,
            f"{name} {shape}, kept {1 - ratio:.0%}, {kind}",
            "f32",
            Comparison(sides["dense"], sides[kind]),
            threads=torch.get_num_threads(),
            rounds=rounds,
            at_least=at_least if shares else 1.0,
            aim=aim if shares else None,
            flops=2 * whole,
            kept_macs=left[kind] / whole,
        )

    return [row(kind) for kind in left]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit status is 1 when a result was wrong."""
    options = argparse.ArgumentParser("python -m benchmarks.channel_nets", description="Whole networks.")
    add = options.add_argument
    add("--net", nargs="+", choices=sorted(NETWORKS), default=list(NETS), help=f"which ({' '.join(NETS)})")
    add("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="images at a time (1 8)")
    add("--ratio", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="what goes (0.25 0.5 0.75)")
    add("--rounds", type=int, default=9, metavar="N", help="alternating samples of each network (9)")
    add("--threads", type=int, metavar="N", help="CPU threads of all (torch's default)")
    add("--csv", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help="append the rows to a CSV there")
    add("--small", action="store_true", help="the sizes for tests, to try the benchmark itself")
    chosen = options.parse_args(argv)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    out = console()
    result = table(f"{machine()}, {isa.current()}, threads: {torch.get_num_threads()}")
    done, wrong = list[Row](), 0
    cases = [(n, b, r) for n in chosen.net for r in chosen.ratio for b in chosen.batch]
    with out.status("") as status:
        for number, (name, batch, ratio) in enumerate(cases, 1):
            status.update(f"{number} of {len(cases)}: {name}, batch {batch}, ratio {ratio}")
            try:
                found = rows(name, batch, ratio, chosen.rounds, chosen.small)
            except WrongResult as error:
                wrong += 1
                out.print(f"{name} batch {batch} ratio {ratio}: {error}", style="bold red", markup=False)
                continue
            done += found
            for row in found:
                result.add_row(*cells(row), style=VERDICT_STYLE[row.verdict])
    out.print(result)
    if chosen.csv:
        for file in append(done, chosen.csv):
            out.print(f"appended to {file}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
