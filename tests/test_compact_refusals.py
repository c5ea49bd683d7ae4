"""What ``compact`` leaves as it is, and the reason that it gives; models whose graph is hard to draw."""

import pytest
import torch
from conftest import assert_untouched, state
from pruned import assert_same, drop, prune, randomise
from torch import nn

from benchmarks.networks import NETWORKS
from sparseops.compact import compact, explain_compact
from sparseops.compact.report import Code
from sparseops.compact.rules import RULES
from sparseops.nn import SparseConv2d, SparseLinear, SparseModule


class Net(nn.Module):
    """A pruned layer, something, and a layer that reads all."""

    def __init__(self, between=None, **extra):
        super().__init__()
        self.first = drop(nn.Linear(8, 32), range(16))
        self.last = nn.Linear(32, 4)
        self.between = between or (lambda net, x: x)
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.last(self.between(self, self.first(x)))


def rows(*shape):
    return torch.randn(shape or (3, 8), generator=torch.Generator().manual_seed(1)).double()


def refused(model, *args):
    """The report of a compaction after which the first layer is what it was."""
    small = compact(randomise(model), args)
    assert_same(small, model, *args)
    assert small.first.weight_shape[0] == 32
    return explain_compact(small)


BARRIERS = {
    "layer norm": (
        lambda net, x: net.norm(x),
        {"norm": nn.LayerNorm(32)},
        "norm",
        "layer_norm reads every channel",
    ),
    "softmax": (lambda net, x: x.softmax(-1), {}, "(softmax)", "softmax reads every channel"),
    "mean over channels": (
        lambda net, x: x - x.mean(-1, keepdim=True),
        {},
        "(mean)",
        "mean reads every channel",
    ),
    "split": (lambda net, x: torch.cat(x.chunk(2, -1), -1), {}, "(chunk)", "chunk reads every channel"),
    "slice": (
        lambda net, x: torch.cat([x[:, 16:], x[:, :16]], -1),
        {},
        "(slice)",
        "a slice counts its channels",
    ),
    "shuffle": (
        lambda net, x: x.view(3, 4, 8).transpose(1, 2).reshape(3, 32),
        {},
        "(view)",
        "a reshape divides its channels",
    ),
    "sort": (lambda net, x: x.sort(-1).values, {}, "(sort)", "sort reads every channel"),
    "random": (
        lambda net, x: x + 0 * nn.functional.dropout(x, 0.5, True),
        {},
        "(dropout)",
        "dropout is random",
    ),
    "a number per channel": (
        lambda net, x: x * net.last.weight[0],
        {},
        "(mul)",
        "mul meets a tensor whose channels are not known",
    ),
    "a bound per channel": (
        lambda net, x: x.clamp(min=net.last.weight[0]),
        {},
        "(clamp)",
        "clamp reads every channel",
    ),
    "a product of activations": (lambda net, x: x @ x.t() @ x, {}, "(matmul)", "matmul reads every channel"),
    "statistics of the batch": (
        lambda net, x: net.norm(x),
        {"norm": nn.BatchNorm1d(32, track_running_stats=False, affine=False)},
        "(batch_norm)",
        "batch_norm takes the statistics of the batch",
    ),
    "pooling over channels": (
        lambda net, x: nn.functional.max_pool1d(x, 3, 1, 1),
        {},
        "(max_pool1d)",
        "max_pool1d reads every channel",
    ),
    "integers": (lambda net, x: (x * 8).to(torch.int32).double(), {}, "(to)", "to reads every channel"),
}


@pytest.mark.parametrize(("between", "layers", "consumer", "reason"), BARRIERS.values(), ids=BARRIERS)
def test_barrier(between, layers, consumer, reason):
    report = refused(Net(between, **layers), rows())
    row = report.edge("first", consumer)
    assert row.code is Code.KEPT
    assert row.channels == (32, 32)
    assert reason in row.reason.split("; ")
    assert report["first"].reason.startswith("keeps its scatter: 16 of 32 outputs")


def test_24_weights_read_and_write_all():
    middle = SparseLinear(32, 32, dtype=torch.float64)
    report = refused(Net(lambda net, x: net.middle(x), middle=middle), rows())
    reason = "a weight of format nm24 reads and writes every channel"
    assert report["middle"].reason == reason
    assert report.edge("first", "middle").reason == f"middle: {reason}"


def test_a_layer_that_is_called_twice():
    model = Net(lambda net, x: net.twice(net.twice(x)), twice=nn.Linear(32, 32))
    report = refused(model, rows())
    assert report["twice"].reason == "it is called more than once, or its weight is read elsewhere"


def test_tied_weights():
    model = Net(lambda net, x: net.a(x) + net.b(x), a=nn.Linear(32, 32), b=nn.Linear(32, 32))
    model.b.weight = model.a.weight
    report = refused(model, rows())
    assert report["a"].reason == report["b"].reason == "another module holds the same tensor"


def test_hooks():
    model = Net()
    seen = []
    model.last.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    report = refused(model, rows())
    assert report["last"].reason == "hooks see its channels"
    assert set(seen) == {(3, 32)}


def test_parametrized_weight():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.last)
    report = refused(model, rows())
    assert report.edge("first", "last").reason == "the weight of linear is computed"


def test_subclass():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.in_features

    model = Net(lambda net, x: net.scaled(x), scaled=Scaled(32, 32))
    report = refused(model, rows())
    assert report["scaled"].reason == "Scaled is no kind of layer that can be cut"


def test_embedding_with_a_norm():
    model = nn.Sequential(nn.Embedding(9, 32, max_norm=1.0), drop(nn.Linear(32, 8), inputs=range(8)))
    small = compact(randomise(model), torch.tensor([1, 2]))
    assert small[0].weight.shape == (9, 32)
    assert explain_compact(small)["0"].reason == "max_norm and sparse gradients need whole rows"


def test_transposed_groups():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 16, 2, groups=2))
    report = explain_compact(compact(randomise(model), torch.ones(1, 3, 4, 4).double()))
    assert report["1"].reason == "transposed convolutions are cut only without groups"


def test_a_layer_that_is_not_called():
    report = explain_compact(compact(randomise(Net(spare=nn.Linear(4, 4))), rows()))
    assert report["spare"].reason == "it is not called on the example"


def test_functional_use_of_a_weight():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32, 32))

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    report = refused(Net(lambda net, x: net.own(x), own=Functional()), rows())
    assert report.edge("first", "own").reason == "own: Functional is no kind of layer that can be cut"


def test_sizes_in_the_code_cost_only_the_reshape():
    """``reshape(-1, 64)`` would take the smaller tensor as another batch."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = drop(nn.Conv2d(3, 16, 1), range(8)), drop(nn.Conv2d(16, 16, 3), range(8))
            self.last = nn.Linear(64, 4)

        def forward(self, x):
            return self.last(self.conv(self.stem(x)).reshape(-1, 64))

    model = randomise(Fixed())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    small = compact(model, x)
    assert_same(small, model, x)
    report = explain_compact(small)
    assert report["stem"].outputs == (16, 8)
    assert report.edge("conv", "(reshape)").code is Code.KEPT


def test_sizes_that_cannot_be_helped_leave_the_model():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = drop(nn.Linear(8, 32), range(16)), nn.Linear(32, 4)

        def forward(self, x):
            y = self.first(x).relu()
            if y.shape[-1] != 32:
                raise ValueError("not 32")
            return self.last(y)

    model = randomise(Fixed())
    before = state(model)
    small = compact(model, rows())
    assert_untouched(model, before)
    assert small is not model
    assert type(small.first) is SparseLinear
    report = explain_compact(small)
    assert report.reason == "the smaller model does not give the same result (ValueError: not 32)"
    assert [row.reason for row in report.layers] == [report.reason] * 2
    assert torch.equal(small(rows()), model(rows()))


def test_control_flow_leaves_the_model():
    def between(net, x):
        return x * 2 if x.sum() > 0 else x

    small = compact(randomise(Net(between)), rows())
    report = explain_compact(small)
    assert report.reason.startswith("its graph cannot be drawn (torch.export: ")
    assert "; torch.fx: TraceError: " in report.reason
    assert report.before is report.after is None
    assert str(report).startswith("Net: unchanged: its graph cannot be drawn")


def test_views_that_are_written_leave_the_model():
    def between(net, x):
        x.view(-1)[:3].mul_(2)
        return x

    report = explain_compact(compact(randomise(Net(between)), rows()))
    assert "mul_ writes into memory that is also read as" in report.reason


@pytest.mark.parametrize("name", NETWORKS)
def test_symbolic_trace_gives_the_same(name, monkeypatch):
    model, x = prune(NETWORKS[name].small()), NETWORKS[name].small_example(2).double()
    expected = compact(model, x)
    monkeypatch.setattr(torch.export, "export", None)
    small = compact(model, x)
    report = explain_compact(small)
    assert report.by == "torch.fx"
    assert report.edges == explain_compact(expected).edges
    assert {n: t.shape for n, t in small.state_dict().items()} == {
        n: t.shape for n, t in expected.state_dict().items()
    }
    assert_same(small, model, x)


def test_a_model_that_only_symbolic_trace_draws():
    """An op without a fake implementation stops torch.export alone."""
    with torch.library._scoped_library("compact_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")

        def between(net, x):
            return x.relu() + torch.ops.compact_test.twice(net.side(x)).sum(-1, keepdim=True)

        model = randomise(Net(between, side=nn.Linear(32, 8)))
        small = compact(model, rows())
        report = explain_compact(small)
        assert report.by == "torch.fx"
        assert (
            report.edge("side", "(compact_test::twice)").reason == "compact_test::twice reads every channel"
        )
        assert_same(small, model, rows())


def test_a_wrong_result_is_noticed(monkeypatch):
    """What an op does is believed; if a rule is wrong, the comparison on the example finds it."""
    monkeypatch.setitem(RULES, "relu", RULES["dropout"])
    model = randomise(nn.Sequential(drop(nn.Conv2d(3, 16, 3), range(8)), nn.ReLU(), nn.Conv2d(16, 4, 3)))
    small = compact(model, torch.randn(1, 3, 9, 9, dtype=torch.float64))
    reason = explain_compact(small).reason
    assert "compact: output 0 of the sparse model must equal that of the masked dense one" in reason
    assert type(small[0]) is SparseConv2d


def test_channels_along_another_dimension():
    model = Net(lambda net, x: net.conv(x), conv=nn.Conv1d(5, 5, 1))
    report = refused(model, rows(2, 5, 8))
    reason = "a later layer counts its channels along another dimension"
    assert report.edge("first", "conv").reason.startswith(reason)


def test_recurrent_layers_read_all():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lstm = drop(nn.Linear(8, 32), range(16)), nn.LSTM(32, 8, batch_first=True)

        def forward(self, x):
            return self.lstm(self.first(x))[0]

    report = refused(Recurrent(), rows(2, 5, 8))
    assert report.edge("first", "lstm").reason == "lstm reads every channel"
    assert not any(isinstance(m, SparseModule) for m in Recurrent().lstm.modules())
