"""``compact`` on whole networks: equal to the masked dense model, smaller, and an ordinary module."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_untouched, state
from pruned import assert_same, drop, prune, randomise
from torch import nn

from benchmarks.networks import NETWORKS
from sparseops.compact import compact, explain_compact
from sparseops.compact.report import Code
from sparseops.nn import SparseModule

# share of the activations' bytes and of the multiply-adds of the pruned model that are left when half of the
# blocks of eight channels are dropped; docs/compaction.md says what holds the others back
LEFT = {
    "vgg16": (0.61, 0.56),
    "vgg16_bn": (0.56, 0.56),
    "resnet18": (0.94, 0.85),
    "resnet50": (0.72, 0.84),
    "mobilenet_v2": (0.75, 1.07),
    "mobilenet_v3": (0.86, 0.98),
    "densenet": (0.51, 0.70),
    "unet": (0.58, 0.53),
    "inception": (0.66, 0.65),
    "transformer_mlp": (0.64, 0.70),
}


def network(name, **options):
    return prune(NETWORKS[name].small(), **options), NETWORKS[name].small_example(2).double()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("block", [8, 1])
def test_networks_equal_the_masked_model_and_are_smaller(name, block):
    model, x = network(name, block=block)
    before = state(model)
    small = compact(model, x)
    assert_untouched(model, before)
    assert_same(small, model, x)
    report = explain_compact(small)
    assert report.reason == ""
    assert report.by == "torch.export"
    assert any(row.code is Code.COMPACTED for row in report.edges)
    assert report.after.parameters < report.before.parameters
    assert report.after.activations < report.before.activations
    if block == 8:
        activations, macs = LEFT[name]
        assert report.after.activations <= activations * report.before.activations
        assert report.after.macs <= macs * report.before.macs


@pytest.mark.parametrize("name", ["vgg16_bn", "unet", "densenet"])
def test_chains_and_concatenations_compact_fully(name):
    model, x = network(name)
    report = explain_compact(small := compact(model, x))
    assert {row.code for row in report.edges} <= {Code.COMPACTED, Code.WHOLE}
    assert not any(isinstance(module, SparseModule) for module in small.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_other_batches_and_sizes(name):
    model, x = network(name)
    small = compact(model, x)
    other = NETWORKS[name].small_example(5, seed=3).double()
    assert_same(small, model, other)
    if name in ("resnet18", "unet", "mobilenet_v2"):
        assert_same(small, model, torch.randn(1, 3, 48, 64, dtype=torch.float64))


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "mobilenet_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(name, dtype):
    model, x = network(name)
    model, x = model.to(dtype), x.to(dtype)
    small = compact(model, x)
    assert explain_compact(small).reason == ""
    assert {tensor.dtype for tensor in small.parameters()} == {dtype}
    if dtype == torch.float32:
        assert_same(small, model, x)


@pytest.fixture(scope="module")
def resnet():
    model, x = network("resnet18")
    return compact(model, x), model, x


def test_result_shares_no_tensor_with_the_model(resnet):
    small, model, _ = resnet
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    assert not theirs & {tensor.data_ptr() for tensor in small.state_dict().values() if tensor.numel()}


def test_state_dict_loads_into_a_twin(resnet):
    small, model, x = resnet
    twin = compact(copy.deepcopy(model), x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), small(x))


def test_copy_and_pickle(resnet):
    small, _, x = resnet
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(x), small(x))
        assert explain_compact(twin) == explain_compact(small)


def test_export(resnet):
    small, _, x = resnet
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x))


def test_compile(resnet):
    small, _, x = resnet
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), small(x))


def test_training_goes_on(resnet):
    small, _, x = resnet
    small = copy.deepcopy(small)
    small(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_second_time_changes_nothing(resnet):
    small, _, x = resnet
    again = compact(small, x)
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in small.state_dict().items()
    }
    assert torch.equal(again(x), small(x))


def test_modes_and_frozen_parameters_stay():
    model = randomise(nn.Sequential(drop(nn.Conv2d(3, 16, 3), range(8)), nn.ReLU(), nn.Conv2d(16, 8, 3)))
    model[2].weight.requires_grad_(False)
    model.train()
    model[1].eval()
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    small = compact(model, x)
    assert [module.training for module in small.modules()] == [True, True, False, True]
    assert [p.requires_grad for p in small.parameters()] == [True, True, False, True]
    assert small[0].weight.shape == (8, 3, 3, 3)
    assert_same(small.eval(), model, x)


def test_memory_format_of_a_weight_stays():
    model = randomise(nn.Sequential(drop(nn.Conv2d(3, 16, 3), range(8)), nn.Conv2d(16, 8, 3)))
    model = model.to(memory_format=torch.channels_last)
    small = compact(model, torch.randn(1, 3, 9, 9, dtype=torch.float64))
    assert small[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert not small[1].weight.is_contiguous()


def test_keyword_arguments_and_several_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = drop(nn.Linear(8, 32), range(8, 16)), nn.Linear(32, 4)

        def forward(self, x, *, scale):
            hidden = self.a(x).relu()
            return {"y": self.b(hidden * scale), "mean": hidden.mean(-1)}

    model = randomise(Net())
    x = torch.randn(3, 8, dtype=torch.float64)
    small = compact(model, {"x": x, "scale": 2.0})
    torch.testing.assert_close(small(x=x, scale=2.0), model(x, scale=2.0))
    row = explain_compact(small).edge("a", "(mean)")
    assert row.code is Code.KEPT
    assert row.reason == "mean reads every channel"


@pytest.mark.parametrize(
    ("model", "example", "error", "text"),
    [
        (
            3,
            torch.ones(1),
            TypeError,
            r"compact: model must be a torch.nn.Module that is no TorchScript, got int",
        ),
        (nn.Linear(2, 2), [1], TypeError, r"compact: example_inputs must be a tensor, .*, got list"),
        (
            nn.Linear(2, 2),
            torch.ones(3),
            RuntimeError,
            r"compact: model must run on example_inputs, got RuntimeError: ",
        ),
    ],
)
def test_bad_arguments(model, example, error, text):
    with pytest.raises(error, match=text):
        compact(model, example)


def test_report_of_another_model():
    with pytest.raises(ValueError, match="explain_compact: model must come from compact, got a Linear"):
        explain_compact(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="explain_compact: model must be a torch.nn.Module, got int"):
        explain_compact(3)


def test_page_runs(capsys):
    text = (Path(__file__).resolve().parent.parent / "docs" / "compaction.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/compaction.md", "exec"), names)
    assert "64 → 32" in capsys.readouterr().out
