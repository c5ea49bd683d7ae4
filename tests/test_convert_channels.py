"""``convert`` with ``Channels``: which channels go, that the rest is exact, and what the report says."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from torch import nn

import sparseops
from sparseops import Channels, _measure
from sparseops.nn import SparseConv1d, SparseConv2d, SparseLinear, SparseModule
from sparseops.report import Code


class Net(nn.Module):
    """Convolutions with bias and batch norm, groups, a tail, and a last layer that is registered first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(40, 24)
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 64, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.tail = nn.Conv2d(64, 44, 1)
        self.line = nn.Conv1d(44, 40, 3)
        for tensor in (self.norm.running_mean, self.norm.bias):
            nn.init.normal_(tensor)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.tail(self.depthwise(self.grouped(x)))
        x = self.line(x.flatten(2)).mean(2)
        return self.head(x)


PRUNED = ["head", "stem", "grouped", "tail", "line"]


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 10, 10)


def masked_by_hand(layer, dim, ratio=0.5, block=8):
    """The layer's weight without the blocks of smallest norm along ``dim``, group by group."""
    w = layer.weight.detach()
    groups = getattr(layer, "groups", 1)
    parts = []
    for part in w.chunk(groups):
        channels = part.shape[dim]
        starts = range(0, channels, block)
        mean_square = {s: part.narrow(dim, s, min(block, channels - s)).square().sum().item() for s in starts}
        mean_square = {s: total / min(block, channels - s) for s, total in mean_square.items()}
        part = part.clone()
        for start in sorted(starts, key=mean_square.__getitem__)[: int(ratio * len(starts))]:
            part.narrow(dim, start, min(block, channels - start)).zero_()
        parts.append(part)
    return torch.cat(parts)


@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_are_dropped_and_the_model_is_the_masked_one(net, x, inplace):
    masked, before = copy.deepcopy(net), state(net)
    for name in PRUNED:
        masked.get_submodule(name).weight.data = masked_by_hand(net.get_submodule(name), 0)
    sparse = sparseops.convert(net, Channels(0.5, keep_last=False), inplace=inplace)
    assert (sparse is net) == inplace
    if not inplace:
        assert_untouched(net, before)
    kinds = [type(sparse.get_submodule(name)) for name in PRUNED]
    assert kinds == [SparseLinear, SparseConv2d, SparseConv2d, SparseConv2d, SparseConv1d]
    assert type(sparse.depthwise) is nn.Conv2d
    for name in PRUNED:
        layer = sparse.get_submodule(name)
        assert layer.format == "channel"
        assert torch.equal(layer.weight, masked.get_submodule(name).weight), name
    torch.testing.assert_close(sparse(x), masked(x))
    torch.testing.assert_close(sparseops.to_dense(sparse)(x), masked(x))


@pytest.mark.parametrize("side", ["inputs", "both"])
def test_inputs_are_dropped(net, x, side):
    sparse = sparseops.convert(net, Channels(0.5, side=side, keep_last=False))
    for name in PRUNED:
        layer, dense = sparse.get_submodule(name), net.get_submodule(name)
        expected = dense.weight.detach().clone()
        if name != "stem":  # three inputs are less than a block
            expected *= masked_by_hand(dense, 1) != 0
        if side == "both":
            expected *= masked_by_hand(dense, 0) != 0
        weight = layer.weight if isinstance(layer, SparseModule) else layer.weight.detach()
        assert torch.equal(weight, expected), name
    torch.testing.assert_close(sparse(x), sparseops.to_dense(sparse)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    sparse = sparseops.convert(model, Channels(0.5, side="both"))
    assert {layer.values.dtype for layer in sparse} == {dtype}
    x = torch.randn(3, 64).to(dtype)
    torch.testing.assert_close(sparse(x), sparseops.to_dense(sparse)(x))


def test_rows_say_what_is_kept(net):
    report = sparseops.explain(sparseops.convert(net, Channels(0.5, side="both")))
    assert report.pattern == "Channels(ratio=0.5, side='both')"
    row = report["grouped"]
    assert row.code is Code.CONVERTED
    assert row.format == "channel"
    kept = masked_by_hand(net.grouped, 0) * (masked_by_hand(net.grouped, 1) != 0)
    energy = kept.square().sum() / net.grouped.weight.detach().square().sum()
    assert row.energy_kept == pytest.approx(float(energy))
    grains = "in blocks of (8|16)"
    assert row.reason.startswith("keeps 32 of 64 outputs in blocks of ")
    assert f", with {100 * row.energy_kept:.1f}% of the energy" in row.reason
    text = report["tail"].reason
    outputs = int((masked_by_hand(net.tail, 0) != 0).flatten(1).any(1).sum())
    assert re.match(rf"keeps {outputs} of 44 outputs {grains}, 32 of 64 inputs {grains}; by l2", text)
    assert report["stem"].reason.endswith("inputs: 3 channels are no more than one block of 8")
    assert report["line"].reason.startswith("keeps all 40 outputs, ")
    assert report["line"].reason.endswith("; it is the model's last layer, which keeps its outputs")
    row = report["depthwise"]
    assert (row.code, row.format) == (Code.DEPTHWISE, "")
    assert "one input channel per group" in row.reason
    assert row.bytes_after == row.bytes_before == 64 * 9 * 4


def test_criterion_is_named_and_used():
    def first_half_matters(weight, dim):
        return -torch.arange(weight.shape[dim]).double()

    model = nn.Sequential(nn.Linear(32, 64))
    sparse = sparseops.convert(model, Channels(criterion=first_half_matters, keep_last=False))
    assert torch.equal(sparse[0].weight[:32], model[0].weight[:32])
    assert not sparse[0].weight[32:].any()
    report = sparseops.explain(sparse)
    assert "by first_half_matters, with " in report["0"].reason
    assert report.pattern == "Channels(ratio=0.5, criterion=first_half_matters, keep_last=False)"


def test_single_channels_are_said_to_be_slow():
    model = nn.Sequential(nn.Linear(64, 64))
    report = sparseops.explain(sparseops.convert(model, Channels(side="inputs", block=1)))
    assert "keeps all 64 outputs, 32 of 64 inputs as single channels, which is slow" in report["0"].reason


def test_global_scope_keeps_the_share_of_all_layers(net):
    sparse = sparseops.convert(net, Channels(0.5, scope="global", keep_last=False))
    layers = [layer for layer in sparse.modules() if isinstance(layer, SparseModule)]
    kept = sum(layer.packed.out_index.numel() for layer in layers)
    whole = [sparse.get_submodule(row.name) for row in sparseops.explain(sparse) if row.code is Code.WHOLE]
    total = 24 + 32 + 64 + 44 + 40
    kept += sum(layer.weight.shape[0] for layer in whole)
    assert total / 2 <= kept <= total / 2 + 16


def test_inputs_and_outputs_do_not_compete():
    layer = nn.Linear(64, 64)
    layer.weight.data[:48] *= 1e-3
    sparse = sparseops.convert(layer, Channels(0.5, scope="global", side="both", keep_last=False))
    assert sparse.packed.out_index.numel() == sparse.packed.in_index.numel() == 32


def test_layer_that_would_lose_all_keeps_one_block_and_says_so():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64))
    sparse = sparseops.convert(model, Channels(0.99))
    assert sparse[0].packed.out_index.numel() == 8
    reason = sparseops.explain(sparse)["0"].reason
    assert "keeps 8 of 64 outputs" in reason
    assert "outputs: one block of 8 is kept, more than ratio 0.99 would leave" in reason


def test_ratio_zero_leaves_all_layers_dense(net):
    with pytest.warns(UserWarning, match="nothing was made sparse in Net .*5 whole"):
        assert sparseops.convert(net, Channels(0.0, keep_last=False)) is net
    row = sparseops.explain(net)["stem"]
    assert (row.code, row.reason) == (Code.WHOLE, "outputs: ratio is 0")
    assert row.bytes_after == row.bytes_before


def test_layer_narrower_than_a_block_stays_dense_and_is_remembered():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 64))
    sparse = sparseops.convert(model, Channels(0.5, keep_last=False))
    row = sparseops.explain(sparse)["0"]
    assert (row.code, row.reason) == (Code.WHOLE, "outputs: 8 channels are no more than one block of 8")
    assert type(sparse[0]) is nn.Linear
    assert type(sparse[1]) is SparseLinear, "2:4 has another limit, of 32 inputs"
    sparse[0] = nn.Conv1d(16, 8, 1)
    assert sparseops.explain(sparse)["0"].code is Code.ELIGIBLE
    sparse[0] = nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))
    assert sparseops.explain(sparse)["0"].code is Code.PARAMETRIZED


def test_layer_of_the_same_shape_and_another_kind_is_another_layer():
    sparse = sparseops.convert(
        nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 64)), Channels(0.5, keep_last=False)
    )
    sparse[0] = nn.Embedding(8, 16)
    assert sparseops.explain(sparse)["0"].code is Code.KIND


@pytest.mark.parametrize("side", ["outputs", "inputs", "both"])
def test_layer_without_elements_stays_dense(side):
    model = nn.Sequential(nn.Linear(0, 8), nn.Linear(8, 0), nn.Linear(64, 64))
    report = sparseops.explain(sparseops.convert(model, Channels(0.5, side=side, keep_last=False)))
    assert [row.code for row in report] == [Code.WHOLE, Code.WHOLE, Code.CONVERTED]


def test_nan_and_hooks_are_said():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    model[0].weight.data[17, 3] = float("nan")
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    sparse = sparseops.convert(model, Channels(0.7))
    assert set(range(16, 24)) <= set(sparse[0].packed.out_index.tolist())
    reason = sparseops.explain(sparse)["0"].reason
    assert "1 NaN or infinite weights count as the largest" in reason
    assert "1 hook carried over" in reason
    sparse(torch.randn(1, 64))
    assert calls == [1]


def test_tied_layers_are_refused_and_told():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    sparse = sparseops.convert(model, Channels(0.5, side="inputs"))
    report = sparseops.explain(sparse)
    assert [row.code for row in report] == [Code.SHARED_WEIGHT, Code.SHARED_WEIGHT, Code.CONVERTED]
    assert report["0"].reason == "weight of Linear uses the same weight"
    assert sparse[0].weight is sparse[1].weight


@pytest.mark.parametrize("inplace", [False, True])
def test_criterion_that_fails_changes_nothing(net, inplace):
    before = state(net)
    with pytest.raises(ValueError, match=r"Channels: criterion must give scores of shape \(64,\), got \(\)"):
        sparseops.convert(
            net,
            Channels(criterion=lambda w, dim: w.flatten(1).sum(1) if len(w) < 64 else w.sum()),
            inplace=inplace,
        )
    assert_untouched(net, before)


def test_second_convert_leaves_channel_layers(net):
    sparse = sparseops.convert(net, Channels(0.5))
    with pytest.warns(UserWarning, match="4 already_sparse"):
        again = sparseops.convert(sparse, Channels(0.5))
    assert again is sparse
    report = sparseops.explain(again)
    assert report["tail"].code is Code.ALREADY_SPARSE
    assert report["tail"].reason == "already channel"
    assert report["tail"].format == "channel"
    assert 0 < report["tail"].energy_kept < 1
    assert report["tail"].bytes_before == 44 * 64 * 4


# The model's last layer


def test_without_example_inputs_the_last_in_module_order_keeps_its_outputs(net):
    sparse = sparseops.convert(net, Channels(0.5))
    assert type(sparse.line) is nn.Conv1d
    row = sparseops.explain(sparse)["line"]
    assert (row.code, row.reason) == (Code.WHOLE, "it is the model's last layer, which keeps its outputs")
    assert sparse.head.format == "channel"


def test_example_inputs_show_which_layer_is_the_last(net, x, always_faster):
    sparse = sparseops.convert(net, Channels(0.5), example_inputs=x)
    assert type(sparse.head) is nn.Linear
    assert sparse.line.format == "channel"
    assert sparseops.explain(sparse)["head"].code is Code.WHOLE


def test_embedding_is_no_last_layer():
    model = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32), nn.Embedding(9, 32)])
    sparse = sparseops.convert(model, Channels(0.5))
    assert type(sparse[1]) is nn.Linear
    assert sparse[2].format == "channel"
    sparse = sparseops.convert(sparseops.convert(model, Channels(0.5), include="2"), Channels(0.5))
    assert type(sparse[1]) is nn.Linear


def test_keep_last_can_be_turned_off(net):
    sparse = sparseops.convert(net, Channels(0.5, keep_last=False))
    assert sparse.line.packed.out_index.numel() == 24
    assert "last" not in sparseops.explain(sparse)["line"].reason


class Heads(nn.Module):
    def __init__(self, finish):
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.body = nn.Linear(32, 32)
        self.finish = finish

    def forward(self, x):
        x = self.body(x)
        return self.finish(self.one(x), self.two(x))


@pytest.mark.parametrize(
    ("finish", "whole"),
    [
        (lambda a, b: (a, b), {"one", "two"}),
        (lambda a, b: {"a": a.view(-1), "n": 3}, {"one"}),
        (lambda a, b: [a[:, :5].relu_(), b + 1], {"one"}),
        (lambda a, b: (a + b).softmax(-1), {"two"}),
        (lambda a, b: 0, {"two"}),
        (lambda a, b: a.to_sparse(), {"two"}),
    ],
)
def test_layers_whose_outputs_are_the_model_s(finish, whole, always_faster):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = sparseops.convert(Heads(finish).eval(), Channels(0.5), example_inputs=torch.randn(2, 32))
    assert {row.name for row in sparseops.explain(sparse) if row.code is Code.WHOLE} == whole


def test_dense_and_sparse_layers_count_as_the_last_too(always_faster):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Bilinear(32, 32, 16)

        def forward(self, x):
            return self.c(self.a(x), self.b(x))

    sparse = sparseops.convert(Whole().eval(), Channels(0.5), example_inputs=torch.randn(2, 32))
    assert sparse.a.packed.out_index.numel() == sparse.b.packed.out_index.numel() == 16
    half = sparseops.convert(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), include="1")
    report = sparseops.explain(sparseops.convert(half, Channels(0.5)))
    assert "keeps 16 of 32 outputs" in report["0"].reason, "the last layer is sparse already"


def test_freed_memory_is_not_taken_for_an_output(always_faster):
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).tanh()
            return x.exp()

    sparse = sparseops.convert(Big().eval(), Channels(0.5), example_inputs=torch.randn(2, 32))
    whole = [row.name for row in sparseops.explain(sparse) if row.code is Code.WHOLE]
    assert whole == ["layers.5"]


# Example inputs


def test_example_inputs_time_and_check(net, x, always_faster):
    sparse = sparseops.convert(net, Channels(0.5, side="both"), example_inputs=x)
    report = sparseops.explain(sparse)
    assert len(report.sparse_rows) == 5
    assert {row.speedup for row in report.sparse_rows} == {2.0}
    torch.testing.assert_close(sparse(x), sparseops.to_dense(sparse)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_check_passes_in_half_precision(dtype, always_faster):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 32)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()  # sums without cancellation grow, and so do their rounding errors
    for then in (None, "2:4"):
        rule = Channels(0.5, side="both", then=then)
        sparse = sparseops.convert(model, rule, example_inputs=torch.rand(2, 64, 8, 8).to(dtype))
        assert len(sparseops.explain(sparse).sparse_rows) == 2


def test_slower_layers_stay_dense(net, x, monkeypatch):
    monkeypatch.setattr(_measure, "_alternate", lambda dense, sparse, device: (1.0, 2.0))
    before = state(net)
    with pytest.warns(UserWarning, match="4 slower"):
        assert sparseops.convert(net, Channels(0.5), example_inputs=x) is net
    row = sparseops.explain(net)["stem"]
    assert row.code is Code.SLOWER
    assert row.reason == "0.50x at input [2, 3, 10, 10], so it stays dense with its own weights"
    vars(net).pop("_sparseops_report")
    assert_untouched(net, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_wrong_constant_of_a_dropped_channel_is_noticed(net, x, inplace, always_faster, monkeypatch):
    before = state(net)
    forward = SparseConv2d.forward

    def without_bias_where_dropped(self, x):
        y = forward(self, x).clone()
        dropped = ~(self.weight != 0).flatten(1).any(1)
        y[:, dropped] = 0
        return y

    monkeypatch.setattr(SparseConv2d, "forward", without_bias_where_dropped)
    with pytest.raises(RuntimeError, match=r"convert: output of layer 'stem' must equal"):
        sparseops.convert(net, Channels(0.5), example_inputs=x, inplace=inplace)
    assert_untouched(net, before)
