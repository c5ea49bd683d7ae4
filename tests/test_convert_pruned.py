"""``convert`` and ``explain`` of a model that a pruner left its plan in, and of patterns that only a pruner
makes."""

import copy
import io
import warnings

import pytest
import torch
from conftest import assert_untouched, state
from torch import nn

import sparseops
from sparseops import Channels, Plan, Pruner, compact, convert
from sparseops._replace import PLAN
from sparseops.prune import Layers, Unstructured, keep_24, keep_24_transposable
from sparseops.report import Code


def mask_(module, keep):
    """Zero what ``keep`` does not keep of the magnitudes of the module's weights."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.mul_(keep(weight.abs()))
    return module


@pytest.fixture
def pruned():
    """A model as a pruner leaves it: two layers 2:4, one with zero channels, one dense, one unstructured."""
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5))).eval()
    mask_(net[0], keep_24)
    mask_(net[1], keep_24_transposable)
    with torch.no_grad():
        net[2].weight[24:].zero_()
        net[4].weight[::3, ::3] = 0
    rules = {"0": "2:4", "1": "2:4t", "2": Channels(side="both"), "4": Unstructured(0.9), "*": None}
    setattr(net, PLAN, Plan(rules))
    return net


def rows(model):
    return {row.name: (row.code, row.format) for row in sparseops.explain(model)}


EXPECTED = {
    "0": (Code.CONVERTED, "nm24"),
    "1": (Code.CONVERTED, "nm24"),
    "2": (Code.CONVERTED, "channel"),
    "3": (Code.EXCLUDED, ""),
    "4": (Code.UNSTRUCTURED, ""),
}


@pytest.mark.parametrize("options", [{}, {"prune": None}, {"inplace": True}])
def test_zeros_of_a_pruner_are_taken_as_they_are(pruned, options):
    x = torch.randn(3, 64)
    weights = [layer.weight.detach().clone() for layer in pruned]
    expected = pruned(x)
    sparse = sparseops.convert(pruned, **options)
    assert rows(sparse) == EXPECTED
    torch.testing.assert_close(sparse(x), expected)
    for layer, weight in zip(sparseops.to_dense(sparse), weights, strict=True):
        assert torch.equal(layer.weight, weight), "nothing more is pruned"
    report = sparseops.explain(sparse)
    assert report.pattern == "as pruned"
    assert report["2"].reason.startswith("keeps 24 of 64 outputs in blocks of 8, all 64 inputs")
    assert report["4"].reason == "its zeros lie in no pattern that a kernel gains from"
    assert all(row.energy_kept == 1.0 for row in report.sparse_rows)


def test_example_inputs_measure_it_all_the_same(pruned):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers as small as these may all be slower
        report = sparseops.explain(sparseops.convert(pruned, example_inputs=torch.randn(8, 64)))
    assert [row.name for row in report.measured] == ["0", "1", "2"]


def test_a_pattern_goes_before_the_plan(pruned):
    sparse = sparseops.convert(pruned, "2:4")
    assert all(its == (Code.CONVERTED, "nm24") for its in rows(sparse).values())
    assert sparseops.explain(sparse).pattern == "2:4"


def test_explain_says_what_convert_would_do(pruned):
    before = state(pruned)
    report = sparseops.explain(pruned)
    assert report.pattern == "as pruned"
    found = {
        row.name: (Code.CONVERTED if row.code is Code.ELIGIBLE else row.code, row.format) for row in report
    }
    assert found == EXPECTED
    assert_untouched(pruned, before)


def test_second_convert_prunes_nothing_more(pruned):
    """The layers that the plan left dense stay so, though "2:4" would take them."""
    sparse = sparseops.convert(pruned)
    with pytest.warns(UserWarning, match="nothing was made sparse"):
        assert sparseops.convert(sparse) is sparse
    assert rows(sparse)["3"] == EXPECTED["3"]
    again = sparseops.convert(sparseops.to_dense(sparse))
    assert rows(again) == EXPECTED


def test_plan_goes_with_copies_and_files(pruned):
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    for other in (copy.deepcopy(pruned), torch.load(file, weights_only=False)):
        assert rows(sparseops.convert(other)) == EXPECTED
    assert PLAN not in pruned.state_dict()


def test_plan_of_a_compiled_model_counts(pruned):
    setattr(pruned, PLAN, Plan({"*.0": "2:4", "*": None}))
    report = sparseops.explain(sparseops.convert(torch.compile(pruned, backend="eager")))
    assert [row.name for row in report.sparse_rows] == ["_orig_mod.0"]


def test_lone_layer_keeps_its_plan():
    layer = mask_(nn.Linear(64, 64), keep_24)
    setattr(layer, PLAN, Plan({"": "2:4"}))
    sparse = sparseops.convert(layer)
    assert sparse.format == "nm24"
    assert sparseops.convert(sparseops.to_dense(sparse)).format == "nm24"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, r"convert: weight of layer '0' must be 2:4: .*"),
        (1, r"convert: weight of layer '1' must be 2:4 along its inputs and along its outputs .*, got .*"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_lost_zeros_are_an_error(pruned, number, message, inplace):
    nn.init.ones_(pruned[number].weight)
    before = state(pruned)
    cure = r"; the model has lost zeros since it was pruned \(a pattern prunes it anew\)$"
    with pytest.raises(ValueError, match="^" + message + cure):
        sparseops.convert(pruned, inplace=inplace)
    assert_untouched(pruned, before)
    with pytest.raises(ValueError, match="^" + message):
        sparseops.explain(pruned)
    sparseops.convert(pruned, "2:4")


def test_lost_layer_is_an_error(pruned):
    part = pruned[:4]
    setattr(part, PLAN, getattr(pruned, PLAN))
    with pytest.raises(ValueError, match=r"convert: pattern must match at least one module .*, got '4'"):
        sparseops.convert(part)


# 2:4 both ways


@pytest.mark.parametrize(
    "make",
    [
        lambda: mask_(nn.Linear(64, 32), keep_24_transposable),
        lambda: mask_(nn.Conv2d(32, 32, 3), keep_24_transposable),
        lambda: mask_(nn.LSTM(32, 32), keep_24_transposable),
    ],
)
@pytest.mark.parametrize("prune", ["magnitude", None])
def test_24t_is_packed_as_24(make, prune):
    layer = make()
    sparse = sparseops.convert(layer, "2:4t", prune=prune)
    row = sparseops.explain(sparse)[0]
    assert (row.format, row.energy_kept) == ("nm24", 1.0)
    assert "already 2:4, taken as it is" in row.reason
    for name, weight in sparseops.to_dense(sparse).named_parameters():
        assert torch.equal(weight, layer.get_parameter(name))


@pytest.mark.parametrize("pattern", ["2:4t", Plan({"*": "2:4t"})])
def test_only_a_pruner_makes_24t(pattern):
    layer = mask_(nn.LSTM(32, 32), keep_24_transposable)
    with torch.no_grad():
        layer.weight_hh_l0[:3, 0] = 1.0  # one way alone
        layer.weight_hh_l0[:3, 1:4] = 0.0
    before = state(layer)
    message = (
        r'^convert: pattern must be "2:4" with prune="magnitude" \("2:4t" masks come from sparseops.Pruner\)'
        r', got "2:4t"$'
    )
    with pytest.raises(ValueError, match=message):
        sparseops.convert(layer, pattern)
    message = r"^convert: weight of layer '' must be 2:4 along its inputs and along its outputs .*, got "
    with pytest.raises(ValueError, match=message):
        sparseops.convert(layer, pattern, prune=None)
    assert_untouched(layer, before)


# Patterns without a kernel


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Unstructured(), "its zeros lie in no pattern that a kernel gains from"),
        (Layers(), "the plan drops it whole or not at all"),
    ],
)
def test_layers_without_a_kernel_stay_as_they_are(rule, reason):
    net = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(64, 64))
    before = state(net)
    with pytest.warns(UserWarning, match="nothing was made sparse in Sequential .3 unstructured.; "):
        assert sparseops.convert(net, rule) is net
    assert all(torch.equal(value, before[2][name]) for name, value in net.state_dict().items())
    report = sparseops.explain(net)
    assert [(row.code, row.reason) for row in report][0] == (Code.UNSTRUCTURED, reason)
    mixed = sparseops.convert(net, Plan({"0": "2:4", "*": rule}))
    assert [row.code for row in sparseops.explain(mixed)] == [
        Code.CONVERTED,
        Code.UNSTRUCTURED,
        Code.UNSTRUCTURED,
    ]


# Zero channels, whatever made them so


@pytest.mark.parametrize("rule", [Channels(criterion="taylor"), Channels(threshold=1e9, criterion="bn")])
def test_zero_channels_need_no_evidence(rule):
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    nn.init.zeros_(net[0].weight[:16])
    row = sparseops.explain(sparseops.convert(net, Plan({"0": rule}), prune=None))["0"]
    assert "keeps 48 of 64 outputs" in row.reason
    with pytest.raises(ValueError, match=r"must have evidence"):
        sparseops.convert(net, Plan({"0": rule}))


def test_threshold_may_drop_no_channel():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    for rule, prune in (
        (Channels(threshold=0.0), "magnitude"),
        (Channels(threshold=0.0), None),
        (Channels(threshold=9.0, criterion="taylor"), None),  # what it would drop is not known
    ):
        with pytest.warns(UserWarning, match="2 whole"):
            sparseops.convert(net, rule, prune=prune)


def test_what_compact_has_taken_is_not_looked_for_again():
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)
    ).eval()
    Pruner(model, Plan({"0": Channels(ratio=0.5), "4": "2:4"})).finalize()
    x = torch.randn(4, 64)
    sparse = convert(compact(model, x), prune=None)
    assert sparse[0].out_features == 32 and sparse[4].format == "nm24"
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)
