"""``auto_plan``: the fastest plan within the budget, whatever metrics and times are."""

import copy
import itertools
import json
import random
import warnings

import pytest
import torch
from conftest import assert_untouched, state
from option_nets import OPTIONS, A, B, C, Judge, X, chain, chosen_in, fake_times
from torch import nn

import sparseops
from sparseops import Channels, Plan, _measure
from sparseops.prune import Unstructured
from sparseops.prune.plan import plan_of
from sparseops.train import auto, trials
from sparseops.train.auto import AutoPlan, auto_plan
from sparseops.train.pruner import Pruner
from sparseops.train.recalibrate import recalibrate
from sparseops.train.sensitivity import OptionRow

PAIRS = [(str(n), option) for n in range(4) for option in OPTIONS]


@pytest.fixture
def times(monkeypatch):
    """Use made-up times: a function of these by layer and option."""
    return lambda table: monkeypatch.setattr(auto, "_times", fake_times(table))


def random_problem(seed):
    """Drops (some below 0) in hundredths and times in whole milliseconds by layer and option."""
    generator = random.Random(seed)
    drops = {pair: generator.randint(-2, 9) / 100 for pair in PAIRS}
    return drops, {pair: float(generator.randint(2, 12)) for pair in PAIRS}


def fastest(drops, times, max_drop, together=lambda total, chosen: total):
    """The least time of all plans that are within, by trying every one."""
    best = 40.0
    for options in itertools.product([None, *OPTIONS], repeat=4):
        chosen = {str(n): option for n, option in enumerate(options) if option is not None}
        total = sum(max(0.0, drops[pair]) for pair in chosen.items())
        if together(total, chosen) <= max_drop + 1e-9:
            best = min(best, 40.0 - sum(10.0 - times[pair] for pair in chosen.items()))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_first_check_is_the_best_plan_by_the_sum(seed, times):
    drops, table = random_problem(seed)
    times(table)
    judge = Judge(drops)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = auto_plan(chain(), judge, X, max_drop=0.08, options=OPTIONS, checks=1)
    assert found.checks[0].ms == found.ms_after or not found.checks[0].passed
    assert found.ms_after == pytest.approx(fastest(drops, table, 0.08))
    assert found.checks[0].predicted["metric"] <= 0.08 + 1e-9
    assert dict(found.plan.rules) == {**{k: row.option for k, row in found.chosen.items()}, "*": None}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_drops_that_do_not_add_up(seed, factor, times):
    drops, table = random_problem(seed)
    drops = {pair: max(0.0, drop) for pair, drop in drops.items()}
    times(table)

    def together(total, chosen):
        return factor * total

    found = auto_plan(chain(), Judge(drops, together), X, max_drop=0.0796, options=OPTIONS, checks=30)
    assert found.drop <= 0.0796 + 1e-9
    if found.plan != Plan({"*": None}) and len(found.chosen) > 1:
        # the frontier of the sum is that of its multiple
        assert found.ms_after == pytest.approx(fastest(drops, table, 0.0796, together))
    for check in found.checks:
        assert check.passed == (check.drop["metric"] <= 0.0796 + 1e-9)
        assert not check.passed or check.ms >= found.ms_after
    assert len({repr(check.plan) for check in found.checks}) == len(found.checks)


def test_free_layers_that_are_not_free_together(times):
    times({pair: 2.0 + int(pair[0]) for pair in PAIRS})
    judge = Judge(dict.fromkeys(PAIRS, -0.01), lambda total, chosen: 0.03 * (len(chosen) - 1))
    found = auto_plan(chain(), judge, X, max_drop=0.03, options=[A], checks=8)
    assert dict(found.plan.rules) == {"0": "2:4", "1": "2:4", "*": None}
    assert found.drop == pytest.approx(0.03)
    assert found.checks[0].predicted == {"metric": 0.0}
    assert [check.passed for check in found.checks].count(True) == 1


def test_what_is_not_faster_is_neither_evaluated_nor_chosen(times):
    table = {pair: 5.0 for pair in PAIRS} | {("1", option): 10.0 for option in OPTIONS} | {("2", A): 11.0}
    times(table)
    judge = Judge(dict.fromkeys(PAIRS, 0.0))
    found = auto_plan(chain(), judge, X, options=OPTIONS)
    alone = [calls for calls in judge.calls if len(calls) == 1]
    assert {pair for calls in alone for pair in calls.items()} == {
        pair for pair in PAIRS if table[pair] < 10.0
    }
    assert found.chosen.keys() == {"0", "2", "3"}
    assert found["2", A] == OptionRow("2", A, None, 10.0, 11.0, "it is slower")
    assert found["0", A].drop == {"metric": 0.0}
    assert judge.calls[0] == {}
    assert len(judge.calls) == 1 + 8 + len(found.checks)


def test_each_task_has_its_own_budget(times):
    times({("0", A): 1.0, ("1", A): 2.0, ("2", A): 3.0, ("3", A): 4.0})
    falls = {"0": (0.5, 0.0), "1": (0.0, 0.05), "2": (0.3, 0.0), "3": (0.0, 0.03)}

    def judge(model):
        chosen = chosen_in(model)
        return {
            task: 1 - sum(falls[name][number] for name in chosen) for number, task in enumerate(("a", "b"))
        }

    found = auto_plan(chain(), judge, X, max_drop={"b": 0.04, "a": 0.4}, options=[A], checks=20)
    assert found.chosen.keys() == {"2", "3"}
    assert found.drop == {"a": pytest.approx(0.3), "b": pytest.approx(0.03)}
    assert found.dense_metric == {"a": 1.0, "b": 1.0}
    assert found.budgets == {"a": 0.4, "b": 0.04}
    assert found["1", A].drop == {"a": 0.0, "b": pytest.approx(0.05)}
    one = auto_plan(chain(), judge, X, max_drop=0.3, options=[A], checks=20)
    assert one.chosen.keys() == {"1", "2", "3"}
    # the largest shares add up to more than the budget, though neither task's drops do
    assert one.checks[0].plan != one.plan
    words = r"auto_plan: max_drop must name the tasks of evaluate, a, b, got a"
    with pytest.raises(ValueError, match=words):
        auto_plan(chain(), judge, X, max_drop={"a": 1.0}, options=[A])


def test_nothing_fits(times):
    times(dict.fromkeys(PAIRS, 5.0))
    model = chain()

    def plan(drop, **options):
        judge = Judge(dict.fromkeys(PAIRS, drop))
        with pytest.warns(UserWarning, match="auto_plan: every layer stays dense") as caught:
            found = auto_plan(model, judge, X, options=OPTIONS, **options)
        assert found.plan == Plan({"*": None})
        assert (found.drop, found.metric, found.ms_before, found.ms_after) == (0.0, 1.0, 40.0, 40.0)
        assert found.chosen == {}
        return str(caught[0].message), judge

    words, judge = plan(0.05)
    assert "each faster option alone lets the metric fall by more than 4 times max_drop" in words
    assert all(len(call) < 2 for call in judge.calls)
    words, judge = plan(0.02)
    assert "no plan was seen to be within max_drop (" in words
    assert judge.calls[-1] and len(judge.calls) > 13
    words, judge = plan(0.0, checks=0)
    assert "(0 were evaluated)" in words
    times(dict.fromkeys(PAIRS, 20.0))
    assert "none is faster with any of the options" in plan_words(model)
    assert "none can have any of the options" in plan_words(nn.Sequential(nn.Linear(4, 4)))


def plan_words(model):
    with warnings.catch_warnings(record=True) as caught:
        auto_plan(model, lambda net: 1.0, X, options=[A])
    assert str(caught[-1].message).startswith("auto_plan: every layer stays dense, ")
    assert caught[-1].filename == __file__
    return str(caught[-1].message)


def test_one_warning_says_that_nothing_is_faster(monkeypatch):
    monkeypatch.setattr(_measure, "_alternate", lambda dense, sparse, device: (1.0, 2.0))
    model = chain(2)
    before = state(model)
    with pytest.warns(UserWarning) as caught:
        found = auto_plan(model, lambda net: 1.0, X, options=[A, B])
    assert [str(warning.message) for warning in caught] == [
        "auto_plan: every layer stays dense, none is faster with any of the options"
    ]
    assert found["0", A].ms_after == 2.0
    assert "0.50x" in found["0", A].reason
    assert_untouched(model, before)


def test_plans_that_are_predicted_to_be_far_over_the_budget_are_tried(times):
    times(dict.fromkeys(PAIRS, 5.0))
    judge = Judge(dict.fromkeys(PAIRS, 0.008), lambda total, chosen: 0.3 * total)
    found = auto_plan(chain(), judge, X, options=[A], checks=4)
    assert len(found.checks[0].plan.rules) == 2, "one layer, and the others dense"
    assert len(found.chosen) == 4
    assert found.checks[-1].predicted["metric"] == pytest.approx(0.032)
    assert found.drop == pytest.approx(0.0096)


class Stopped(Exception):
    pass


def stopping(judge, after):
    """The judge until it was asked so often."""

    def evaluate(model):
        if len(judge.calls) == after:
            raise Stopped
        return judge(model)

    return evaluate


def test_an_interrupted_run_goes_on_where_it_stopped(times, tmp_path):
    drops, table = random_problem(3)
    times(dict.fromkeys(PAIRS, 5.0))
    path = tmp_path / "results.json"
    options = {"max_drop": 0.08, "options": OPTIONS, "checks": 4}
    whole = Judge(drops)
    expected = auto_plan(chain(), whole, X, **options)
    assert len(whole.calls) >= 14
    for after in (0, 1, 7, 12, len(whole.calls) - 1):
        path.unlink(missing_ok=True)
        first, second = Judge(drops), Judge(drops)
        with pytest.raises(Stopped):
            auto_plan(chain(), stopping(first, after), X, cache=path, **options)
        found = auto_plan(chain(), second, X, cache=path, **options)
        assert first.calls + second.calls == whole.calls
        assert found.to_json() == expected.to_json()
        third = Judge(drops)
        assert auto_plan(chain(), third, X, cache=path, **options).plan == expected.plan
        assert third.calls == []
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_results_of_something_else_are_not_used(times, tmp_path):
    times(dict.fromkeys(PAIRS, 5.0))
    path = tmp_path / "results.json"
    options = {"max_drop": 0.05, "options": [A], "cache": path, "checks": 1}
    model, changed = chain(), chain()
    with torch.no_grad():
        changed[3].bias[0] += 1
    batches = [X]

    def calls(model, **more):
        judge = Judge(dict.fromkeys(PAIRS, 0.01))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            auto_plan(model, judge, X, **{**options, **more})
        return len(judge.calls)

    assert calls(model) == 6
    assert calls(changed) == 6, "other weights"
    assert calls(model, criterion="l2") == 5, "the dense model is the same"
    assert calls(model, recalibrate=batches) == 5
    assert calls(model, options=[B]) == 5
    assert calls(nn.Sequential(*model, nn.ReLU())) == 6, "another structure"
    assert [calls(model), calls(changed)] == [0, 0], "both are still there"


class Shown(nn.Module):
    """Shows what it is made of, as some modules do."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", values)
        self.fn = lambda x: x

    def extra_repr(self):
        return f"fn={self.fn}"


def test_fingerprint():
    zeros = torch.zeros(4)
    different = (zeros.int(), zeros.view(2, 2), zeros + 1, torch.tensor(1.0, dtype=torch.bfloat16))
    models = [Shown(values) for values in (zeros, zeros.clone(), *different)]
    prints = [trials.fingerprint(model) for model in models]
    assert prints[0] == prints[1], "of another function of the same kind"
    assert len(set(prints)) == 5


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": {"b": 0.5}}', '{"a": {"b": {"c": "d"}}}'])
def test_a_file_that_holds_no_results_is_left_alone(text, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"auto_plan: cache must be a file that auto_plan wrote, or a new"):
        auto_plan(chain(), lambda net: 1.0, X, cache=path)
    assert path.read_text() == text


def test_other_tasks_than_those_in_the_file(times, tmp_path):
    times(dict.fromkeys(PAIRS, 5.0))
    path = tmp_path / "results.json"
    auto_plan(chain(), Judge(dict.fromkeys(PAIRS, 0.0)), X, options=[A], cache=path)
    with pytest.raises(ValueError, match="evaluate must give the same tasks each time, metric, got a, b"):
        auto_plan(chain(), lambda net: {"a": 1.0, "b": 1.0}, X, options=[A, B], cache=path)
    auto_plan(chain(), Judge(dict.fromkeys(PAIRS, 0.0)), X, options=[A, B], cache=path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "good", {}, {3: 1.0}])
def test_a_metric_that_is_none(bad, times):
    times(dict.fromkeys(PAIRS, 5.0))
    model = chain()
    before = state(model)
    with pytest.raises((ValueError, TypeError), match="auto_plan: evaluate must"):
        auto_plan(model, lambda net: bad if chosen_in(net) else 1.0, X, options=[A])
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"checks": -1}, ValueError, "checks must be at least 0, got -1"),
        ({"checks": True}, TypeError, "checks must be an integer, got True"),
        ({"max_drop": -0.1}, ValueError, "max_drop must be at least 0, got -0.1 for 'metric'"),
        ({"options": []}, ValueError, "options must hold at least one treatment, got none"),
        ({"options": "2:4"}, TypeError, "options must be a list of treatments of a layer, got '2:4'"),
        ({"options": [None]}, TypeError, "options must hold treatments of a layer, got None"),
        ({"options": ["1:4"]}, ValueError, "options must hold treatments of a layer, got '1:4'"),
        ({"options": [0.5]}, TypeError, "options must hold treatments of a layer, got 0.5"),
        ({"options": [A, Unstructured()]}, ValueError, r"options must be .* gains from, got Unstructured\("),
        ({"calibration": iter([X])}, TypeError, "calibration must be read once for each trial"),
        ({"recalibrate": (x for x in [X])}, TypeError, "recalibrate must be .*, got generator, which"),
        ({"include": "nothing"}, ValueError, "include must match at least one module"),
        ({"exclude": 3}, TypeError, "exclude must hold name patterns"),
        ({"example_inputs": [X]}, TypeError, "example_inputs must be a tensor, a tuple"),
        ({"model": None}, TypeError, "model must be a torch.nn.Module, got NoneType"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    arguments = {"model": chain(), "evaluate": lambda net: 1.0, "example_inputs": X} | arguments
    with pytest.raises(error, match=f"auto_plan: {message}"):
        auto_plan(**arguments)


def test_include_and_exclude(times):
    times(dict.fromkeys(PAIRS, 5.0))
    judge = Judge(dict.fromkeys(PAIRS, 0.0))
    found = auto_plan(chain(), judge, X, options=[A], include=["0", "1", "2"], exclude="1")
    assert found.layers == ["0", "2"] == list(found.chosen)


def test_the_model_is_not_changed_whatever_evaluate_does(times):
    times(dict.fromkeys(PAIRS, 5.0))
    model = chain().train()
    before = state(model)

    def evaluate(net):
        assert not net.training and not torch.is_grad_enabled()
        for parameter in net.parameters():
            parameter.requires_grad_(False).fill_(3.0)
        net.double()
        return 1.0

    found = auto_plan(model, evaluate, X, options=OPTIONS)
    assert len(found.chosen) == 4
    assert_untouched(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_is_a_layer_itself(monkeypatch):
    monkeypatch.setattr(auto, "_times", fake_times({("", A): 5.0}))
    layer = nn.Linear(32, 32)
    found = auto_plan(layer, Judge({("", A): 0.0}), X, options=[A])
    assert found.plan == Plan({"*": "2:4"})
    assert sparseops.explain(sparseops.convert(layer, found.plan))[""].sparse
    assert "(model)" in str(found)


def test_names_that_look_like_patterns():
    model = nn.ModuleDict({"a[0]": nn.Linear(32, 32), "a0": nn.Linear(32, 32)})
    plan = plan_of({"a[0]": "2:4"})
    report = sparseops.explain(sparseops.convert(model, plan))
    assert [row.name for row in report.sparse_rows] == ["a[0]"]


@pytest.fixture
def found(times):
    times({("0", A): 2.0, ("0", B): 8.0, ("1", A): 20.0, ("1", B): 5.0})
    drops = {("0", A): 0.004, ("0", B): 0.001, ("1", A): 0.0, ("1", B): 0.5}
    return auto_plan(chain(2), Judge(drops), X, options=[A, B])


def test_the_report(found):
    assert isinstance(found, AutoPlan)
    assert (found.metric, found.dense_metric) == (pytest.approx(0.996), 1.0)
    assert (found.ms_before, found.ms_after) == (20.0, 12.0)
    assert found.speedup == pytest.approx(20 / 12)
    assert found["0", A].chosen and not found["0", B].chosen
    text = str(found)
    first = "Sequential: 1 of 2 layers pruned, drop 0.004 of at most 0.01, layers 1.67x as fast"
    assert text.splitlines()[0] == first
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "2:4", "10", "→", "2", "0.004,", "5.00x", "0.001,", "1.25x"] in lines
    assert ["1", "dense", "10", "0.50x", "0.5,", "2.00x"] in lines
    assert ["total", "20", "→", "12"] in lines
    assert repr(found) == f"<AutoPlan: {first.removeprefix('Sequential: ')}>"


def test_print(found, capsys):
    found.print()
    assert capsys.readouterr().out.rstrip() == str(found)


def test_json(found):
    data = json.loads(found.to_json())
    assert data["plan"] == {"0": "2:4", "*": None}
    assert (data["ms_before"], data["ms_after"], data["dense"]) == (20.0, 12.0, {"metric": 1.0})
    assert data["rows"][2] == {
        "layer": "1",
        "option": "2:4",
        "drop": None,
        "ms_before": 10.0,
        "ms_after": 20.0,
        "reason": "it is slower",
        "chosen": False,
    }
    check = data["checks"][0]
    assert check["plan"] == repr(found.plan)
    assert (check["ms"], check["passed"]) == (12.0, True)
    assert check["predicted"] == check["drop"] == {"metric": pytest.approx(0.004)}
    assert data["budgets"] == {"metric": 0.01}


def test_plot(found, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.svg"
    found.plot(path)
    text = path.read_text(encoding="utf-8")
    for words in ("<!-- 0 -->", "<!-- 1 -->", "<!-- chosen -->", "<!-- 2:4 -->", "1 of 2 layers pruned"):
        assert words in text


def test_one_dense_time_for_all_options():
    rows = [
        OptionRow("a", A, None, 10.0, 5.0),
        OptionRow("a", B, None, 30.0, 10.0),
        OptionRow("a", C, None, 12.0, 24.0),
        OptionRow("b", A),
    ]
    found = auto._with_one_dense_time(rows)
    assert [(row.ms_before, row.ms_after) for row in found] == [
        (12.0, 6.0),
        (12.0, 4.0),
        (12.0, 24.0),
        (None, None),
    ]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32))
        self.idle = nn.Linear(64, 64)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.lstm(self.conv(x).flatten(2).mT)[0][:, -1])


@pytest.mark.parametrize(("criterion", "recalibrates"), [("l1", False), ("l1", True), ("taylor", False)])
def test_a_real_run(criterion, recalibrates, always_faster):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(16, 3, 8, 8)
    if recalibrates:
        recalibrate(model, [x])
    before = state(model)
    with torch.no_grad():
        y = model(x)

    def evaluate(net):
        with torch.no_grad():
            return -float((net(x) - y).square().mean() / y.square().mean())

    # no batch reaches the idle layer
    data = {"calibration": [(x, y)], "loss": nn.functional.l1_loss, "criterion": criterion}
    options = ["2:4", Channels(0.25), Channels(0.5)]
    exclude = "idle" if criterion == "taylor" else None
    batches = [x] if recalibrates else None
    found = auto_plan(
        model, evaluate, x, max_drop=0.1, options=options, exclude=exclude, recalibrate=batches, **data
    )
    assert_untouched(model, before)
    assert {row.layer for row in found} - {"idle"} == {"conv.0", "conv.2", "lstm", "head"}
    if exclude is None:
        assert "not called on example_inputs" in found["idle", "2:4"].reason
    assert found["head", Channels(0.5)].ms_before is None, "it is the model's last layer"
    assert ("conv.0", "2:4") not in {(row.layer, row.option) for row in found}, "too small"
    assert "conv.2" in found.chosen
    assert 0 <= found.drop <= 0.1
    pruned = Pruner(copy.deepcopy(model), found.plan, **data, example_inputs=x).finalize()
    if recalibrates:
        recalibrate(pruned, batches)
    assert evaluate(pruned) == found.metric
    sparse = sparseops.convert(pruned, prune=None, example_inputs=x)
    assert {row.name for row in sparseops.explain(sparse).sparse_rows} == found.chosen.keys()
    assert evaluate(sparse) == pytest.approx(found.metric, abs=1e-4)
