"""``convert`` with example inputs: layers are timed in place, checked, and stay dense if they do not win."""

import io
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from torch import nn

import sparseops
from sparseops import _measure
from sparseops.nn import SparseConv2d, SparseLinear
from sparseops.report import Code


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(2)]
        )
        self.line = nn.Conv1d(16, 16, 3, padding=1)
        self.twice = nn.Linear(64, 64)
        self.head = nn.Linear(64, 8, bias=False)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.line(x.flatten(2)).mean(1)
        return {"y": self.head(self.twice(F.relu(self.twice(x))))}


SPARSE_NAMES = ["blocks.0.0", "blocks.1.0", "line", "twice", "head"]


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("inplace", [False, True])
def test_example_inputs_fill_in_times(net, x, inplace, always_faster):
    given = x.clone()
    before = torch.random.get_rng_state()
    sparse = sparseops.convert(net, example_inputs=x, inplace=inplace)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(x, given)
    report = sparseops.explain(sparse)
    for name in SPARSE_NAMES:
        assert (report[name].ms_before, report[name].ms_after, report[name].speedup) == (2.0, 1.0, 2.0)
    assert report["stem"].ms_before is None
    assert report.threads == torch.get_num_threads()
    assert report.torch == torch.__version__


def test_example_inputs_are_really_timed(net, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all layers may be slower at this size
        report = sparseops.explain(sparseops.convert(net, example_inputs=x))
    for name in SPARSE_NAMES:
        row = report[name]
        assert row.ms_before > 0 and row.ms_after > 0
        assert row.sparse == (row.ms_after < row.ms_before)
        assert (row.code is Code.SLOWER) != row.sparse


def test_slower_layers_stay_dense_with_their_own_weights(net, x, monkeypatch):
    times = iter([(0.83, 1.0), (2.0, 1.0), (1.0, 1.0), (2.0, 1.0), (2.0, 1.0)])
    monkeypatch.setattr(_measure, "_alternate", lambda dense, sparse, device: next(times))
    sparse = sparseops.convert(net, example_inputs=x)
    report = sparseops.explain(sparse)
    row = report["blocks.0.0"]
    assert row.code is Code.SLOWER
    assert row.reason == "0.83x at input [2, 16, 8, 8], so it stays dense with its own weights"
    assert row.bytes_after == row.bytes_before
    assert torch.equal(sparse.blocks[0][0].weight, net.blocks[0][0].weight)
    assert [row.name for row in report if row.code is Code.SLOWER] == ["blocks.0.0", "line"], (
        "a draw is no win"
    )
    assert report.ms_before == pytest.approx(0.83 + 1 + 3 * 2)
    assert report.ms_after == pytest.approx(0.83 + 1 + 3 * 1)


def test_all_layers_slower_returns_the_model(net, x, monkeypatch):
    monkeypatch.setattr(_measure, "_alternate", lambda dense, sparse, device: (1.0, 2.0))
    before = state(net)
    with pytest.warns(UserWarning, match="5 slower"):
        assert sparseops.convert(net, example_inputs=x) is net
    vars(net).pop("_sparseops_report")
    assert_untouched(net, before)


def test_without_measuring_no_layer_is_judged_by_its_time(net, x, monkeypatch):
    def fail(*_):
        raise AssertionError("it was timed")

    monkeypatch.setattr(_measure, "_alternate", fail)
    checked = []
    check = _measure.check_model
    monkeypatch.setattr(
        _measure, "check_model", lambda *args, **options: checked.append(1) or check(*args, **options)
    )
    sparse = sparseops.convert(net, example_inputs=x, measure=False)
    report = sparseops.explain(sparse)
    assert checked == [1]
    for name in SPARSE_NAMES:
        assert report[name].sparse and report[name].ms_before is None and report[name].ms_after is None
        assert "measured" not in report[name].reason
    assert report.threads is None and report.torch is None


def test_times_of_an_earlier_call_stay_where_nothing_is_measured(net, x, always_faster):
    first = sparseops.convert(net, example_inputs=x)
    again = sparseops.explain(sparseops.convert(first, example_inputs=x, measure=False))
    assert again[SPARSE_NAMES[0]].ms_before == 2.0 and again.threads == torch.get_num_threads()


def test_example_inputs_as_tuple_and_dict(always_faster):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, a, *, scale=1.0):
            return [self.fc(input=a) * scale, (a.argmax(), "text")]

    a = torch.randn(3, 64)
    for inputs in (a, (a,), {"a": a, "scale": torch.tensor(2.0)}):
        report = sparseops.explain(sparseops.convert(Two(), example_inputs=inputs))
        assert report["fc"].speedup == 2.0


def test_layer_that_is_not_called_is_said(net, x, always_faster):
    net.unused = nn.Linear(64, 64)
    report = sparseops.explain(sparseops.convert(net, example_inputs=x))
    assert report["unused"].code is Code.CONVERTED
    assert report["unused"].ms_before is None
    assert "not called on example_inputs" in report["unused"].reason


def test_example_inputs_leave_buffers_and_modes_alone(always_faster):
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.5), nn.Conv2d(16, 16, 3)
    ).train()
    model[3].eval()
    before = state(model)
    sparse = sparseops.convert(model, example_inputs=torch.randn(2, 16, 9, 9))
    assert_untouched(model, before)
    assert int(sparse[1].num_batches_tracked) == 0
    assert torch.equal(sparse[1].running_mean, model[1].running_mean)
    assert [module.training for module in sparse] == [True, True, True, False]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_result_is_an_error_and_changes_nothing(net, x, inplace, dtype, always_faster, monkeypatch):
    net, x = net.to(dtype), x.to(dtype)
    before = state(net)
    forward = SparseConv2d.forward

    def with_a_wrong_tile(self, x):
        y = forward(self, x).clone()
        y[0, 3, 2:4, 2:4] = 0
        return y

    monkeypatch.setattr(SparseConv2d, "forward", with_a_wrong_tile)
    with pytest.raises(
        RuntimeError, match=r"output of layer 'blocks.0.0' must equal .* the first at \[0, 3, 2, 2\]"
    ):
        sparseops.convert(net, example_inputs=x, inplace=inplace)
    assert_untouched(net, before)


def test_small_error_in_one_element_is_noticed(net, x, always_faster, monkeypatch):
    forward = SparseConv2d.forward
    error = torch.zeros(2, 16, 8, 8)
    error[1, 7, 4, 4] = 1e-3  # outputs are near 1
    monkeypatch.setattr(SparseConv2d, "forward", lambda self, x: forward(self, x) + error)
    with pytest.raises(RuntimeError, match=r"got 1 wrong elements, the first at \[1, 7, 4, 4\]"):
        sparseops.convert(net, example_inputs=x)


def test_model_level_check(net, x, always_faster, monkeypatch):
    monkeypatch.setattr(_measure, "check_layer", lambda *_: None)
    forward = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: forward(self, x) + 0.01)
    with pytest.raises(RuntimeError, match=r"output 0 of the sparse model must equal"):
        sparseops.convert(net, example_inputs=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_passes_in_every_dtype(dtype, always_faster):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 32)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.abs_()  # sums without cancellation grow, and so do their rounding errors
    sparse = sparseops.convert(model, example_inputs=torch.rand(2, 64, 8, 8).to(dtype))
    assert len(sparseops.explain(sparse).sparse_rows) == 2


@pytest.mark.parametrize("faster", [True, False])
def test_layer_is_timed_on_what_its_hooks_make_of_the_input(faster, request):
    if faster:  # and so in the models that are compared
        request.getfixturevalue("always_faster")
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].register_forward_pre_hook(lambda layer, args: (args[0][:, :64],))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = sparseops.explain(sparseops.convert(model, example_inputs=torch.randn(2, 80)))
    assert report["0"].ms_before is not None


def test_weight_read_by_another_forward_is_noticed(always_faster):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.dec, self.plain = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            assert self.plain.weight.dtype == torch.float32 and self.plain.weight.shape[0] == 64
            return self.plain(F.linear(self.dec(self.enc(x)), self.enc.weight.t()))

    report = sparseops.explain(sparseops.convert(Tied(), example_inputs=torch.randn(2, 64)))
    assert report["enc"].code is Code.WEIGHT_READ
    assert report["enc"].reason == "t() is called on its weight outside its own forward"
    assert {row.name for row in report.sparse_rows} == {"dec", "plain"}
    without = sparseops.convert(model := Tied())
    torch.testing.assert_close(without(torch.ones(1, 64)), sparseops.to_dense(without)(torch.ones(1, 64)))
    assert type(model.enc) is nn.Linear


class Stateful(nn.Module):
    """Counts its calls, in eval mode too, and knows in which mode it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        assert not self.training
        self.calls += 1
        return self.fc(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_example_inputs_leave_no_trace_in_buffers(inplace, always_faster):
    model = Stateful().train()
    sparse = sparseops.convert(model, example_inputs=torch.randn(2, 64), inplace=inplace)
    assert int(model.calls) == int(sparse.calls) == 0
    assert sparse.training and sparse.fc.training


def test_example_inputs_may_need_a_gradient(net, x, always_faster):
    x = x.requires_grad_() * 2  # not a leaf, so deepcopy refuses it
    assert sparseops.explain(sparseops.convert(net, example_inputs=x)).sparse_rows


def test_times_of_two_calls_are_not_mixed(net, x, always_faster):
    first = sparseops.convert(net, example_inputs=x, exclude="head")
    threads = sparseops.explain(first).threads
    later = sparseops.explain(sparseops.convert(first))
    assert (later["twice"].speedup, later["head"].speedup, later.threads) == (2.0, None, threads)
    again = sparseops.explain(sparseops.convert(first, example_inputs=x))
    assert (again["twice"].speedup, again["head"].speedup, again.threads) == (None, 2.0, threads)
    assert again["twice"].code is Code.ALREADY_SPARSE


def test_compiled_part_is_measured(always_faster):
    torch._dynamo.reset()
    model = nn.Sequential(torch.compile(nn.Linear(64, 64), backend="eager"), nn.Linear(64, 64))
    model(torch.randn(2, 64))
    report = sparseops.explain(sparseops.convert(model, example_inputs=torch.randn(2, 64)))
    assert [row.code for row in report] == [Code.CONVERTED] * 2
    assert [row.speedup for row in report] == [2.0] * 2


def test_random_models_are_compared_on_the_same_random_numbers(always_faster):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(x + torch.randn_like(x)) * torch.rand(())

    assert sparseops.explain(sparseops.convert(Noisy(), example_inputs=torch.randn(2, 64)))["fc"].sparse


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_only_in_a_terminal(net, x, always_faster, monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        if not shown:
            monkeypatch.setitem(sys.modules, "rich.progress", None)  # not even imported
        sparseops.convert(net, example_inputs=x)
        assert ("packing" in stream.getvalue()) == shown
        assert ("measuring" in stream.getvalue()) == shown
