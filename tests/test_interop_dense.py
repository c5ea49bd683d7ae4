"""Dense checkpoints for other tools."""

import pickle
import sys

import pytest
import torch
from checkpoint_nets import PLAN, Net, assert_same, make_sparse
from conftest import assert_untouched, state
from torch import nn

import sparseops
from sparseops.interop import load_compressed, load_dense, read_compressed, save_compressed, save_dense
from sparseops.nn import SparseLinear

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def sparse(net):
    return make_sparse(net)


@pytest.fixture
def x():
    return torch.randint(24, (3, 26))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_dense_checkpoint(net, sparse, x, tmp_path, suffix):
    file = tmp_path / f"weights.{suffix}"
    before = state(sparse)
    save_dense(sparse, file)
    assert_untouched(sparse, before)
    is_safe = suffix == "safetensors"
    read = safetensors.load_file(file) if is_safe else torch.load(file, weights_only=True)
    dense = sparseops.to_dense(sparse)
    assert_same(read, dense.state_dict())
    assert read.keys() == net.state_dict().keys()
    assert {k: t.shape for k, t in read.items()} == {k: t.shape for k, t in net.state_dict().items()}

    net.load_state_dict(read)
    assert torch.equal(net(x), dense(x))
    for fresh in (Net().eval(), sparseops.convert(Net().eval(), PLAN)):
        result = load_dense(fresh, file)
        assert not result.missing_keys and not result.unexpected_keys
        assert_same(sparseops.to_dense(fresh).state_dict(), read)
        torch.testing.assert_close(fresh(x), net(x))


def test_safetensors_say_they_are_of_torch(sparse, tmp_path):
    save_dense(sparse, tmp_path / "w.safetensors")
    with sys.modules["safetensors"].safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_tied_and_strided_weights(tmp_path, suffix):
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "head": nn.Linear(8, 16)})
    model["head"].weight = model["embedding"].weight
    model["strided"] = nn.Linear(4, 4)
    model["strided"].weight = nn.Parameter(torch.randn(4, 4).t())
    model["conv"] = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    save_dense(model, tmp_path / f"w.{suffix}")
    fresh = nn.ModuleDict(
        {
            "embedding": nn.Embedding(16, 8),
            "head": nn.Linear(8, 16),
            "strided": nn.Linear(4, 4),
            "conv": nn.Conv2d(8, 4, 3),
        }
    )
    load_dense(fresh, tmp_path / f"w.{suffix}")
    assert_same(fresh.state_dict(), model.state_dict())


def test_a_lone_layer(tmp_path):
    layer = SparseLinear(64, 32)
    save_dense(layer, tmp_path / "w.safetensors")
    assert safetensors.load_file(tmp_path / "w.safetensors").keys() == {"weight", "bias"}
    dense = nn.Linear(64, 32)
    load_dense(dense, tmp_path / "w.safetensors")
    assert torch.equal(dense.weight, layer.weight)


def test_a_weight_without_the_pattern_leaves_the_model_as_it_was(sparse, tmp_path):
    torch.manual_seed(5)
    save_dense(Net(), tmp_path / "w.pt")
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    with pytest.raises(RuntimeError, match="twice.weight must fit format nm24.* in row 0, group 0"):
        load_dense(sparse, tmp_path / "w.pt")
    assert_same(sparse.state_dict(), before)


def test_other_shapes_and_names(tmp_path):
    save_dense(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), tmp_path / "w.safetensors")
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_dense(other, tmp_path / "w.safetensors")
    assert_same(other.state_dict(), before)
    alone = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_dense(alone, tmp_path / "w.safetensors")
    result = load_dense(alone, tmp_path / "w.safetensors", strict=False)
    assert result.unexpected_keys == ["1.bias", "1.weight"]
    assert not torch.equal(alone[0].weight, other[0].weight)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, extra):
        assert extra == {"a": 1}


def test_extra_state(tmp_path):
    model = Extra(4, 4)
    save_dense(model, tmp_path / "w.pt")
    load_dense(Extra(4, 4), tmp_path / "w.pt")
    with pytest.raises(
        TypeError, match="save_dense: _extra_state must be a tensor for safetensors, got dict"
    ):
        save_dense(model, tmp_path / "w.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_dense(Extra(4, 3), tmp_path / "w.pt")


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_a_file_cannot_run_code(tmp_path, capsys):
    torch.save({"weight": Harmful()}, tmp_path / "w.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_dense(nn.Linear(4, 4), tmp_path / "w.pt")
    assert capsys.readouterr().out == ""


def test_dense_refusals(tmp_path):
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(TypeError, match="load_dense: .*list.pt must hold a state dict, got list"):
        load_dense(nn.Linear(4, 4), tmp_path / "list.pt")
    with pytest.raises(TypeError, match="save_dense: model must be a torch.nn.Module, got dict"):
        save_dense({}, tmp_path / "w.pt")
    with pytest.raises(TypeError, match="load_dense: model must be a torch.nn.Module, got dict"):
        load_dense({}, tmp_path / "w.pt")
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(ValueError, match="save_dense: weight must hold data, got a tensor on the meta"):
            save_dense(nn.Linear(4, 4, device="meta"), tmp_path / name)
        assert not (tmp_path / name).exists()
        save_dense(nn.Linear(4, 4), tmp_path / name)
        with pytest.raises(ValueError, match="load_dense: weight must hold data"):
            load_dense(nn.Linear(4, 4, device="meta"), tmp_path / name)


@pytest.mark.parametrize(
    "call",
    [
        lambda path: save_dense(nn.Linear(4, 4), path / "w.safetensors"),
        lambda path: load_dense(nn.Linear(4, 4), path / "w.safetensors"),
        lambda path: read_compressed(path / "w.safetensors"),
        lambda path: load_compressed(nn.Linear(4, 4), path / "w.safetensors"),
        lambda path: save_compressed(nn.Sequential(SparseLinear(32, 32)), path),
    ],
    ids=["save_dense", "load_dense", "read_compressed", "load_compressed", "save_compressed"],
)
def test_without_safetensors(call, tmp_path, monkeypatch, request):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    name = request.node.callspec.id
    with pytest.raises(
        ImportError, match=rf"{name}: safetensors must be installed \(pip install safetensors\)"
    ):
        call(tmp_path)
