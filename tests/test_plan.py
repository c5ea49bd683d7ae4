"""``Plan``: which layer gets which treatment, and what is refused."""

import copy
import pickle

import pytest
import torch
from conftest import assert_untouched, state
from torch import nn

import sparseops
from sparseops import Channels, Plan
from sparseops.report import Code


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU())
        self.neck = nn.Linear(64, 64)
        self.head = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 16)})

    def forward(self, x):
        x = self.neck(self.features(x).mean((2, 3)))
        return self.head["b"](self.head["a"](x).relu())


@pytest.fixture
def net():
    return Net().eval()


def formats(model):
    return {row.name: row.format for row in sparseops.explain(model)}


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([("*", None)], TypeError, r"Plan: rules must be a mapping of name patterns to treatments, got list"),
        ({}, ValueError, r"Plan: rules must hold at least one name pattern, got none"),
        ({3: None}, TypeError, r"Plan: rules must have name patterns as keys, got 3"),
        ({nn.Linear: "2:4"}, TypeError, r"Plan: rules must have name patterns as keys, got <class"),
        (
            {"*": "1:4"},
            ValueError,
            r"""Plan: rules\['\*'\] must be a Channels, .*, Layers, "2:4", "2:4t" or None, got '1:4'""",
        ),
        ({"a": 0.5}, TypeError, r"Plan: rules\['a'\] must be a Channels, .*, \"2:4t\" or None, got 0.5"),
        ({"a": Channels}, TypeError, r"Plan: rules\['a'\] must be a Channels, .*, got <class"),
    ],
)
def test_bad_rules(rules, error, message):
    with pytest.raises(error, match=message):
        Plan(rules)


def test_plan_is_a_value():
    given = {"features.*": Channels(0.25), "head.*": "2:4", "*": None}
    plan = Plan(given)
    assert repr(plan) == "Plan({'features.*': Channels(ratio=0.25), 'head.*': '2:4', '*': None})"
    assert plan == Plan(dict(given)) and hash(plan) == hash(Plan(dict(given)))
    assert plan != Plan(dict(reversed(given.items()))), "the order counts"
    given["neck"] = "2:4"
    assert len(plan.rules) == 3
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan
    with pytest.raises(AttributeError):
        plan.rules = ()


def test_mixed_plan_in_one_pass(net):
    plan = Plan({"features.*": Channels(0.5), "head.*": "2:4", "*": None})
    sparse = sparseops.convert(net, plan)
    assert formats(sparse) == {
        "features.0": "channel",
        "features.2": "channel",
        "neck": "",
        "head.a": "nm24",
        "head.b": "nm24",
    }
    report = sparseops.explain(sparse)
    assert report.pattern == repr(plan)
    assert report["neck"].code is Code.EXCLUDED
    assert report["neck"].reason == "the plan leaves it dense by pattern '*'"
    small = sparseops.explain(sparseops.convert(net, Plan({"features.0": None, "*": Channels(0.5)})))
    assert small["features.0"].code is Code.EXCLUDED, "though it would be too small for 2:4"
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(sparse(x), sparseops.to_dense(sparse)(x))


def test_first_match_wins(net):
    sparse = sparseops.convert(net, Plan({"head.b": None, "head": Channels(0.25), "*": "2:4"}))
    assert formats(sparse) == {
        "features.0": "",
        "features.2": "nm24",
        "neck": "nm24",
        "head.a": "channel",
        "head.b": "",
    }
    assert sparseops.explain(sparse)["features.0"].code is Code.TOO_SMALL, "2:4 has limits of its own"
    other = sparseops.convert(net, Plan({"*": "2:4", "head.b": None, "head": Channels(0.25)}))
    assert set(formats(other).values()) == {"nm24", ""}
    assert formats(other)["head.b"] == "nm24"


def test_pattern_names_a_module_that_the_layer_lies_in(net):
    sparse = sparseops.convert(net, Plan({"features": Channels(0.5), "head": "2:4"}))
    assert formats(sparse)["features.2"] == "channel"
    assert formats(sparse)["head.b"] == "nm24"


def test_layer_that_no_pattern_matches_stays_dense(net):
    row = sparseops.explain(sparseops.convert(net, Plan({"head.*": "2:4"})))["neck"]
    assert (row.code, row.reason) == (Code.EXCLUDED, "no pattern of the plan names it")


def test_include_and_exclude_go_before_the_plan(net):
    report = sparseops.explain(sparseops.convert(net, Plan({"*": "2:4"}), exclude="neck", include=nn.Linear))
    assert report["neck"].reason == "exclude names it by pattern 'neck'"
    assert report["features.2"].reason == "include does not name it"
    assert report["head.a"].sparse


def test_shared_layer_goes_by_any_of_its_names(net):
    net.alias = net.neck
    sparse = sparseops.convert(net, Plan({"alias": "2:4"}))
    assert formats(sparse)["neck"] == "nm24"
    assert sparse.alias is sparse.neck


@pytest.mark.parametrize("inplace", [False, True])
def test_pattern_that_matches_nothing_is_an_error(net, inplace):
    before = state(net)
    message = r"convert: pattern must match at least one module of the model, got 'featuers.\*'"
    with pytest.raises(ValueError, match=message):
        sparseops.convert(net, Plan({"head": "2:4", "featuers.*": Channels()}), inplace=inplace)
    assert_untouched(net, before)


@pytest.mark.parametrize("pattern", ["*", ""])
def test_lone_layer(pattern):
    sparse = sparseops.convert(nn.Linear(64, 64), Plan({pattern: Channels(0.5, side="inputs")}))
    assert sparse.format == "channel"


def test_last_layer_is_the_model_s_and_not_the_plan_s(net):
    report = sparseops.explain(sparseops.convert(net, Plan({"features.*": Channels(0.5), "*": None})))
    assert "keeps 32 of 64 outputs" in report["features.2"].reason
    assert "last layer" not in report["features.2"].reason


def test_layers_with_equal_channels_compete_and_others_do_not():
    torch.manual_seed(0)
    flat, uneven = nn.Linear(16, 64), nn.Linear(16, 64)
    with torch.no_grad():
        flat.weight.fill_(1.0)
        uneven.weight.fill_(1e-3)
        uneven.weight[:8] = 1.0
    model = nn.ModuleDict({"a": flat, "b": uneven, "last": nn.Linear(16, 64)})
    rule = Channels(0.4, scope="global")

    def counts(plan):
        sparse = sparseops.convert(model, plan)
        return [(layer.weight != 0).any(1).sum().item() for layer in (sparse["a"], sparse["b"])]

    assert counts(Plan({"a": rule, "b": Channels(0.4, scope="global")})) == [64, 16]
    assert counts(Plan({"a": rule, "b": Channels(0.4, scope="global", keep_last=False)})) == [40, 40]


def test_prune_none_takes_each_pattern_where_it_is(net):
    plan = Plan({"features.*": Channels(0.5), "head.*": "2:4"})
    masked = sparseops.to_dense(sparseops.convert(net, plan))
    report = sparseops.explain(sparseops.convert(masked, plan, prune=None))
    assert [row.energy_kept for row in report.sparse_rows] == [1.0] * 4
    before = state(net)
    with pytest.raises(
        ValueError, match=r"convert: weight of layer 'features.0' must have zero channels: .*"
    ):
        sparseops.convert(net, plan, prune=None)
    assert_untouched(net, before)
