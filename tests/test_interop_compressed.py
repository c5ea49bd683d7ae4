"""Checkpoints of compressed-tensors, down to the byte."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from checkpoint_nets import PLAN, Net, assert_same, make_mlp, make_sparse, two_of_four
from conftest import assert_untouched, state
from torch import nn
from torch.nn.utils import prune

import sparseops
from sparseops.formats import NM24
from sparseops.interop import load_compressed, read_compressed, save_compressed
from sparseops.interop.compressed import from_bitmask, to_bitmask
from sparseops.nn import SparseLinear

safetensors = pytest.importorskip("safetensors.torch")

# Worked out by hand. Columns of a row are bits of its bytes, the lowest bit first.
WEIGHT = [
    [1, 0, 2, 0, 0, 3, 4, 0, 0, 0, 5, 6],  # columns 0 2 | 5 6 | 10 11: 0b0110_0101, 0b1100
    [0, 0, 0, 0, 7, 0, 0, 0, 0, 8, 0, 0],  # columns 0 1 | 4 5 |  8  9: 0b0011_0011, 0b0011
    [0, 0, 0, -9, 0, 0, 1, 2, 3, 4, 0, 0],  # columns 0 3 | 6 7 |  8  9: 0b1100_1001, 0b0011
]
COMPRESSED = [[1, 2, 3, 4, 5, 6], [0, 0, 7, 0, 0, 8], [0, -9, 1, 2, 3, 4]]
BITMASK = [[0x65, 0x0C], [0x33, 0x03], [0xC9, 0x03]]
SHAPE = [[3], [12]]


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def sparse(net):
    return make_sparse(net)


@pytest.fixture
def mlp():
    return make_mlp()


# the layout of compressed-tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_golden_tensors(dtype):
    weight = torch.tensor(WEIGHT, dtype=dtype)
    compressed, bitmask = to_bitmask(NM24.from_dense(weight))
    assert compressed.dtype == dtype and bitmask.dtype == torch.uint8
    assert compressed.tolist() == COMPRESSED
    assert bitmask.tolist() == BITMASK
    packed = from_bitmask(
        torch.tensor(COMPRESSED, dtype=dtype), torch.tensor(BITMASK, dtype=torch.uint8), (3, 12)
    )
    packed.validate()
    assert torch.equal(packed.to_dense(), weight)
    expected = NM24.from_dense(weight)
    assert torch.equal(packed.meta, expected.meta) and torch.equal(packed.values, expected.values)


def test_golden_file(tmp_path):
    """The bytes of the file, read without any package."""
    model = nn.ModuleDict({"fc": nn.Linear(12, 3)})
    with torch.no_grad():
        model["fc"].weight.copy_(torch.tensor(WEIGHT))
    assert save_compressed(model, tmp_path) == ["fc"]
    raw = (tmp_path / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}

    def content(name, dtype, shape):
        entry = header.pop(name)
        assert (entry["dtype"], entry["shape"]) == (dtype, shape)
        start, end = entry["data_offsets"]
        return raw[8 + size + start : 8 + size + end]

    assert content("fc.bitmask", "U8", [3, 2]) == bytes.fromhex("650c 3303 c903")
    assert content("fc.shape", "I64", [2, 1]) == struct.pack("<2q", 3, 12)
    values = [value for row in COMPRESSED for value in row]
    assert content("fc.compressed", "F32", [3, 6]) == struct.pack("<18f", *values)
    assert header.keys() == {"fc.bias"}
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "global_sparsity": 23 / 39,
                "ignore": [],
                "sparsity_structure": "2:4",
                "targets": ["Linear"],
            },
        }
    }


def decoded(compressed, bitmask, rows, columns):
    """The dense weight, bit by bit."""
    weight = torch.zeros(rows, columns, dtype=compressed.dtype)
    for row in range(rows):
        values = iter(compressed[row])
        for column in range(columns):
            if int(bitmask[row, column // 8]) >> column % 8 & 1:
                weight[row, column] = next(values)
        assert next(values, None) is None
    return weight


@pytest.mark.parametrize("columns", [4, 8, 12, 28, 32, 36, 64, 68])
def test_both_ways(columns):
    weight = two_of_four(40, columns)
    weight[torch.rand_like(weight) < 0.2] = 0
    packed = NM24.from_dense(weight)
    compressed, bitmask = to_bitmask(packed)
    assert compressed.shape == (40, columns // 2) and bitmask.shape == (40, (columns + 7) // 8)
    assert compressed.is_contiguous() and bitmask.is_contiguous()
    assert torch.equal(decoded(compressed, bitmask, 40, columns), weight)
    given = compressed.clone(), bitmask.clone()
    back = from_bitmask(compressed, bitmask, (40, columns))
    back.validate()
    assert torch.equal(back.to_dense(), weight)
    assert torch.equal(back.meta, packed.meta) and torch.equal(back.values, packed.values)
    assert torch.equal(compressed, given[0]) and torch.equal(bitmask, given[1])


def test_every_byte():
    """All 36 pairs of groups, and the 220 bytes that are none."""
    legal = [b for b in range(256) if bin(b & 15).count("1") == bin(b >> 4).count("1") == 2]
    assert len(legal) == 36
    bits = torch.tensor(legal, dtype=torch.uint8).view(-1, 1)
    values = torch.arange(1.0, 36 * 4 + 1).view(36, 4)
    packed = from_bitmask(values, bits, (36, 8))
    packed.validate()
    assert torch.equal(packed.to_dense(), decoded(values, bits, 36, 8))
    assert torch.equal(to_bitmask(packed)[1], bits)
    for byte in set(range(256)) - set(legal):
        with pytest.raises(ValueError, match="fc.bitmask must keep two of each four columns"):
            from_bitmask(values[:1], torch.tensor([[byte]], dtype=torch.uint8), (1, 8), "fc")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"bitmask": torch.tensor([[0x65, 0x0C], [0x33, 0x03], [0xC9, 0x07]], dtype=torch.uint8)},
            r"fc.bitmask must keep two of each four columns, got 3 in row 2, group 2 \(columns 8-11\)",
        ),
        (
            {"bitmask": torch.tensor([[0x65, 0x0C], [0x13, 0x03], [0xC9, 0x07]], dtype=torch.uint8)},
            r"fc.bitmask must keep two of each four columns, got 1 in row 1, group 1 \(columns 4-7\)",
        ),
        (
            {"bitmask": torch.tensor([[0x65, 0x0C], [0x33, 0x83], [0xC9, 0x03]], dtype=torch.uint8)},
            "fc.bitmask must be 0 behind column 11, got 1 in row 1",
        ),
        (
            {"compressed": torch.ones(3, 5)},
            r"fc.compressed must have shape \(3, 6\) for a weight of shape \(3, 12\), got \(3, 5\)",
        ),
        ({"compressed": torch.ones(18)}, r"fc.compressed must have shape \(3, 6\) .*, got \(18,\)"),
        ({"bitmask": torch.zeros(3, 3, dtype=torch.uint8)}, r"fc.bitmask must have shape \(3, 2\)"),
        ({"shape": (3, 10)}, r"fc.shape must be a matrix whose columns are a multiple of 4, got .*\(3, 10\)"),
        ({"shape": (3, 4, 3)}, r"fc.shape must be a matrix .*, got shape \(3, 4, 3\)"),
    ],
)
def test_malformed(change, words):
    given = {
        "compressed": torch.tensor(COMPRESSED).float(),
        "bitmask": torch.tensor(BITMASK, dtype=torch.uint8),
        "shape": (3, 12),
    }
    with pytest.raises(ValueError, match=words):
        from_bitmask(**given | change, name="fc")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"compressed": torch.tensor(COMPRESSED)},
            "fc.compressed must have dtype torch.float16 or .*, got torch.int64",
        ),
        ({"bitmask": torch.tensor(BITMASK)}, "fc.bitmask must have dtype torch.uint8, got torch.int64"),
    ],
)
def test_wrong_types(change, words):
    given = {
        "compressed": torch.tensor(COMPRESSED).float(),
        "bitmask": torch.tensor(BITMASK, dtype=torch.uint8),
    }
    with pytest.raises(TypeError, match=words):
        from_bitmask(**given | change, shape=(3, 12), name="fc")


def test_only_matrices_have_a_bitmask():
    with pytest.raises(ValueError, match=r"to_bitmask: packed must be a matrix .*, got shape \(8, 16, 3\)"):
        to_bitmask(NM24.from_dense(torch.zeros(8, 16, 3)))
    with pytest.raises(ValueError, match=r"to_bitmask: packed must be .* multiple of 4, got shape \(8, 6\)"):
        to_bitmask(NM24.from_dense(torch.zeros(8, 6)))


# folders of compressed-tensors


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["sparsity_config"]


@pytest.mark.parametrize("is_sparse", [False, True])
def test_save_and_load(mlp, tmp_path, is_sparse):
    expected = mlp.state_dict()
    model = sparseops.convert(mlp, prune=None, include=["0", "1"]) if is_sparse else mlp
    before = state(model)
    assert save_compressed(model, tmp_path / "new" / "folder") == ["0", "1"]
    assert_untouched(model, before)
    folder = tmp_path / "new" / "folder"
    assert config_of(folder)["ignore"] == ["2", "3"]
    numel = sum(t.numel() for t in expected.values())
    zeros = sum(int((t == 0).sum()) for t in expected.values())
    assert config_of(folder)["global_sparsity"] == pytest.approx(zeros / numel, abs=1e-12)
    written = safetensors.load_file(folder / "model.safetensors")
    parts = {f"{i}.{part}" for i in "01" for part in ("compressed", "bitmask", "shape", "bias")}
    assert written.keys() == parts | {f"{i}.{part}" for i in "23" for part in ("weight", "bias")}
    for path in (folder, folder / "model.safetensors", str(folder)):
        assert_same(read_compressed(path), expected)

    torch.manual_seed(9)
    fresh = nn.Sequential(nn.Linear(36, 64), nn.Linear(64, 46), nn.Linear(46, 32), nn.Linear(32, 32))
    for target in (
        fresh,
        sparseops.convert(fresh, include=["0"]),
        sparseops.convert(fresh, include=["0", "1"]),
    ):
        result = load_compressed(target, folder)
        assert not result.missing_keys and not result.unexpected_keys
        assert_same(sparseops.to_dense(target).state_dict(), expected)


def test_loaded_without_a_dense_weight(mlp, tmp_path, monkeypatch):
    sparse = sparseops.convert(mlp, prune=None, include=["0", "1"])
    save_compressed(sparse, tmp_path)
    x = torch.randn(3, 36)
    expected = sparse(x)
    fresh = sparseops.convert(
        nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in mlp)), include=["0", "1"]
    )
    monkeypatch.setattr(NM24, "to_dense", None)
    monkeypatch.setattr(NM24, "from_dense", None)
    load_compressed(fresh, tmp_path)
    assert torch.equal(fresh(x), expected)
    save_compressed(fresh, tmp_path, ignore=["2", "3"])


def test_strict_ignore(mlp, tmp_path):
    assert save_compressed(mlp, tmp_path, ignore=["[23]"]) == ["0", "1"]
    assert save_compressed(mlp, tmp_path, ignore=["2", "3", "0"]) == ["1"]
    assert config_of(tmp_path)["ignore"] == ["0", "2", "3"]
    assert_same(read_compressed(tmp_path), mlp.state_dict())
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        mlp[1].weight[4, 8:12] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.raises(
        ValueError, match=r"save_compressed: 1.weight must be 2:4, or ignore must name it: .*row 4, group 2"
    ):
        save_compressed(mlp, tmp_path, ignore=["2", "3"])
    with torch.no_grad():
        mlp[1].weight[4, 8:12] = 0
        mlp[2].weight.zero_()
    with pytest.raises(ValueError, match=r"2.weight must be 2:4, .* multiple of 4, got shape \(32, 46\)"):
        save_compressed(mlp, tmp_path, ignore="[3]")
    with pytest.raises(ValueError, match="save_compressed: ignore must match a linear layer, got '4'"):
        save_compressed(mlp, tmp_path, ignore=["4"])
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_every_other_layer_is_dense(sparse, tmp_path):
    assert save_compressed(sparse, tmp_path) == ["twice", "again"]
    dense = sparseops.to_dense(sparse).state_dict()
    assert_same(read_compressed(tmp_path), dense)
    for target in (Net(), sparseops.convert(Net(), PLAN)):
        load_compressed(target, tmp_path)
        assert_same(sparseops.to_dense(target).state_dict(), dense)


def test_a_channel_pruned_layer_is_dense_or_compressed(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(two_of_four(64, 64))
        model[0].weight[:16] = 0
        model[1].weight[16:] = 0
    sparse = sparseops.convert(model, sparseops.Channels(keep_last=False), prune=None)
    assert [layer.format for layer in sparse] == ["channel", "channel"]
    assert save_compressed(sparse, tmp_path) == ["0"]
    assert_same(read_compressed(tmp_path), model.state_dict())
    load_compressed(sparse, tmp_path)
    assert_same(sparseops.to_dense(sparse).state_dict(), model.state_dict())


def test_other_classes_of_linear_layers_are_dense(tmp_path):
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 8), Mine(32, 8))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(two_of_four(8, 32))
    assert save_compressed(model, tmp_path, ignore=()) == ["0"]
    assert config_of(tmp_path)["ignore"] == ["1"]


def test_a_layer_that_another_tool_masks(tmp_path):
    model = nn.Sequential(nn.Linear(32, 8))
    prune.custom_from_mask(model[0], "weight", (two_of_four(8, 32) != 0).float())
    assert save_compressed(model, tmp_path) == ["0"]
    assert_same(read_compressed(tmp_path), {"0.weight": model[0].weight, "0.bias": model[0].bias})


def test_tied_weights(tmp_path):
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "head": nn.Linear(8, 16, bias=False)})
    model["head"].weight = model["embedding"].weight
    with torch.no_grad():
        model["head"].weight.copy_(two_of_four(16, 8))
    assert save_compressed(model, tmp_path) == ["head"]
    assert_same(read_compressed(tmp_path), model.state_dict())


def test_the_configuration_that_is_there_stays(mlp, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "quantization_config": {"old": 1}}')
    save_compressed(mlp, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mine"
    assert config["quantization_config"].keys() == {"quant_method", "sparsity_config"}


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_other_weights_in_the_folder(mlp, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"folder must hold no weights but model.safetensors, got {name}"):
        save_compressed(mlp, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_nothing_to_compress(tmp_path):
    for model, count in ((nn.Sequential(nn.Linear(8, 8)), 1), (nn.Linear(8, 8), 0), (nn.ReLU(), 0)):
        with pytest.raises(
            ValueError, match=f"a named linear layer whose weight is 2:4, got none among {count}"
        ):
            save_compressed(model, tmp_path / "new")
    with pytest.raises(TypeError, match="save_compressed: model must be a torch.nn.Module, got dict"):
        save_compressed({}, tmp_path)
    with pytest.raises(TypeError, match="load_compressed: model must be a torch.nn.Module, got dict"):
        load_compressed({}, tmp_path)
    assert not (tmp_path / "new").exists()


def sharded(folder, mlp):
    """The same checkpoint in two files, parts of one layer in both, with the index that names them."""
    save_compressed(mlp, folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
    assert len({files[f"0.{part}"] for part in ("compressed", "bitmask", "shape")}) == 2
    for name in names:
        safetensors.save_file({k: t for k, t in tensors.items() if files[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_shards(mlp, tmp_path):
    sharded(tmp_path, mlp)
    safetensors.save_file({"stray": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert_same(read_compressed(tmp_path), mlp.state_dict())


def test_a_model_that_does_not_fit(mlp, tmp_path):
    save_compressed(mlp, tmp_path)
    fresh = nn.Sequential(nn.Linear(36, 64), nn.Linear(64, 46), nn.Linear(46, 32))
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_compressed(fresh, tmp_path)
    assert_same(fresh.state_dict(), before)
    assert load_compressed(fresh, tmp_path, strict=False).unexpected_keys == ["3.bias", "3.weight"]
    # 36 and 40 columns are packed to the same number
    for columns in (40, 100):
        sparse = nn.Sequential(SparseLinear(columns, 64))
        before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
        with pytest.raises(
            RuntimeError, match=rf"0.weight must have shape \(64, {columns}\), got \(64, 36\)"
        ):
            load_compressed(sparse, tmp_path, strict=False)
        assert_same(sparse.state_dict(), before)


def changed(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.clear(), "must say format sparse-24-bitmask in its sparsity_config, got None"),
        (lambda c: c["quantization_config"].update(sparsity_config=None), "must say format .*, got None"),
        (
            lambda c: c["quantization_config"]["sparsity_config"].update(format="sparse-bitmask"),
            "config.json must say format sparse-24-bitmask .*, got sparse-bitmask",
        ),
        (
            lambda c: c["quantization_config"].update(config_groups={"group_0": {}}),
            "config.json must be of a model that is not quantized, got config_groups",
        ),
    ],
)
def test_other_configurations(mlp, tmp_path, change, words):
    save_compressed(mlp, tmp_path)
    changed(tmp_path, change)
    for call in (read_compressed, lambda path: load_compressed(mlp, path)):
        with pytest.raises(ValueError, match=words):
            call(tmp_path)


def test_incomplete_files(tmp_path):
    file = tmp_path / "w.safetensors"
    bits = torch.tensor(BITMASK, dtype=torch.uint8)
    safetensors.save_file({"fc.bitmask": bits, "fc.shape": torch.tensor(SHAPE)}, file)
    with pytest.raises(ValueError, match="fc.bitmask must come with fc.compressed, got it alone"):
        read_compressed(file)
    safetensors.save_file({"fc.weight": torch.zeros(3, 4)}, file)
    with pytest.raises(ValueError, match="must hold weights in the format sparse-24-bitmask, got none"):
        read_compressed(file)
    with pytest.raises(FileNotFoundError):
        read_compressed(tmp_path)


# the real package


@pytest.fixture
def package():
    """Versions after 0.14 do not know the format any more."""
    name = "compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask"
    return pytest.importorskip(name, reason="compressed-tensors 0.9 to 0.13")


def test_the_package_writes_what_is_read(package):
    weight = two_of_four(24, 36)
    weight[torch.rand_like(weight) < 0.2] = 0
    theirs = package.Sparse24BitMaskTensor.from_dense(weight).dict("fc.weight")
    packed = from_bitmask(
        theirs["fc.compressed"], theirs["fc.bitmask"], theirs["fc.shape"].flatten().tolist()
    )
    packed.validate()
    assert torch.equal(packed.to_dense(), weight)
    full = two_of_four(24, 36)  # without zeros there is only one choice
    theirs = package.Sparse24BitMaskTensor.from_dense(full).dict("fc.weight")
    compressed, bitmask = to_bitmask(NM24.from_dense(full))
    assert torch.equal(theirs["fc.compressed"], compressed) and torch.equal(theirs["fc.bitmask"], bitmask)


def test_the_package_reads_what_is_written(package, mlp, tmp_path):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    save_compressed(mlp, tmp_path)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    compressor = compressors.ModelCompressor.from_compression_config(quantization)
    assert type(compressor.sparsity_compressor) is package.Sparse24BitMaskCompressor
    assert compressor.quantization_config is None
    fresh = nn.Sequential(nn.Linear(36, 64), nn.Linear(64, 46), nn.Linear(46, 32), nn.Linear(32, 32))
    compressor.decompress(str(tmp_path), fresh)
    assert_same(fresh.state_dict(), mlp.state_dict())
    again = compressor.compress(mlp)
    (tmp_path / "theirs").mkdir()
    safetensors.save_file(again, tmp_path / "theirs" / "model.safetensors")
    compressor.update_config(str(tmp_path / "theirs"))
    assert_same(read_compressed(tmp_path / "theirs"), mlp.state_dict())


def test_the_page_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "interop.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/interop.md", "exec"), names)
    for name in sparseops.interop.__all__:
        assert name in text or name == "TakenMasks", name
    row = torch.tensor([[1.0, 0, 2, 0, 0, 3, 4, 0, 0, 0, 5, 6]])
    compressed, bitmask = to_bitmask(NM24.from_dense(row))
    assert compressed.tolist() == [[1, 2, 3, 4, 5, 6]] and bitmask.tolist() == [[0x65, 0x0C]]
    assert "bitmask       0x65" in text and "0x0C" in text
