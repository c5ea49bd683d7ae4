"""``convert``, ``to_dense``: what is replaced, what is carried over, and that a failure changes nothing."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from torch import nn

import sparseops
from sparseops.formats import NM24
from sparseops.nn import SparseConv1d, SparseConv2d, SparseLinear, SparseModule
from sparseops.report import Code


class Net(nn.Module):
    """Layers in every kind of container, one used twice, and names of several parts."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(2)]
        )
        self.line = nn.Conv1d(16, 16, 3, padding=1)
        self.heads = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8, bias=False)})
        self.twice = nn.Linear(64, 64)
        self.again = self.twice

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.line(x.flatten(2)).mean(1)
        x = self.again(F.relu(self.twice(x)))
        return {name: head(x) for name, head in self.heads.items()}


SPARSE_NAMES = ["blocks.0.0", "blocks.1.0", "line", "heads.a", "heads.b", "twice"]


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


def test_convert_replaces_and_leaves_the_given_model(net, x):
    before = state(net)
    sparse = sparseops.convert(net)
    assert_untouched(net, before)
    assert sparse is not net
    found = [name for name, module in sparse.named_modules() if isinstance(module, SparseModule)]
    assert found == SPARSE_NAMES
    assert type(sparse.stem) is nn.Conv2d
    assert type(sparse.blocks[1][0]) is SparseConv2d
    assert type(sparse.line) is SparseConv1d
    assert type(sparse.heads["b"]) is SparseLinear
    assert sparse.twice is sparse.again, "a module used under two names is one module still"
    masked = sparseops.to_dense(sparse)
    for name, y in masked(x).items():
        torch.testing.assert_close(sparse(x)[name], y)


def test_weights_are_pruned_by_magnitude(net):
    sparse = sparseops.convert(net)
    for name in SPARSE_NAMES:
        dense = NM24.from_dense(net.get_submodule(name).weight, prune="magnitude")
        assert torch.equal(sparse.get_submodule(name).weight, dense.to_dense())
        row = sparseops.explain(sparse)[name]
        assert row.code is Code.CONVERTED
        assert row.energy_kept == dense.energy_kept
        assert 0.7 < row.energy_kept < 1


def test_copy_shares_no_tensor_with_the_given_model(net):
    sparse = sparseops.convert(net)
    theirs = {tensor.data_ptr() for tensor in net.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in sparse.state_dict().values()}


def test_inplace(net, x):
    expected = sparseops.convert(net)(x)
    bias, stem = net.twice.bias, net.stem
    result = sparseops.convert(net, inplace=True)
    assert result is net
    assert net.twice.bias is bias
    assert net.stem is stem
    assert net.again is net.twice
    assert [name for name, m in net.named_modules() if isinstance(m, SparseModule)] == SPARSE_NAMES
    for name, y in net(x).items():
        assert torch.equal(y, expected[name])


def test_inplace_reaches_plain_containers():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
            self.pair = (self.layers[0], "x")
            self.table = {"k": [self.layers[1]]}
            for index, layer in enumerate(self.layers):
                self.add_module(f"layer{index}", layer)

    for model in (sparseops.convert(Hidden(), inplace=True), sparseops.convert(Hidden())):
        assert type(model.layer0) is SparseLinear
        assert model.layers == [model.layer0, model.layer1]
        assert model.pair == (model.layer0, "x")
        assert model.table["k"][0] is model.layer1


@pytest.mark.parametrize("inplace", [False, True])
def test_root_layer(inplace):
    layer = nn.Linear(64, 16)
    sparse = sparseops.convert(layer, inplace=inplace)
    assert type(sparse) is SparseLinear
    assert type(layer) is nn.Linear
    assert sparseops.explain(sparse)[""].code is Code.CONVERTED
    back = sparseops.to_dense(sparse, inplace=inplace)
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, sparse.weight)


def test_weight_that_is_24_is_taken_as_it_is(net):
    once = sparseops.to_dense(sparseops.convert(net))
    sparse = sparseops.convert(once, prune=None)
    for name in SPARSE_NAMES:
        assert torch.equal(sparse.get_submodule(name).weight, once.get_submodule(name).weight)
        row = sparseops.explain(sparse)[name]
        assert row.energy_kept == 1.0
        assert "already 2:4" in row.reason


@pytest.mark.parametrize("inplace", [False, True])
def test_prune_none_refuses_and_names_the_layer(net, inplace):
    good = sparseops.to_dense(sparseops.convert(net))
    good.heads["b"].weight.data.fill_(1.0)
    before = state(good)
    with pytest.raises(ValueError, match=r"convert: weight of layer 'heads.b' must be 2:4: .*row 0, group 0"):
        sparseops.convert(good, prune=None, inplace=inplace)
    assert_untouched(good, before)


def flat_masked_conv():
    """A weight that is 2:4 along its flattened C*R*S, as some pruning tools leave it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3)
    flat = NM24.from_dense(conv.weight.flatten(1), prune="magnitude").to_dense()
    conv.weight.data = flat.view_as(conv.weight)
    return conv


def test_flat_mask_gets_a_hint():
    model = nn.Sequential(flat_masked_conv())
    hint = "flattened input channels and kernel taps.*mask it again along dimension 1"
    with pytest.raises(ValueError, match=hint):
        sparseops.convert(model, prune=None)
    report = sparseops.explain(sparseops.convert(model))
    assert "mask it again along dimension 1" in report["0"].reason
    assert report["0"].energy_kept < 1
    plain = sparseops.explain(sparseops.convert(nn.Sequential(nn.Conv2d(16, 16, 3))))
    assert "mask it again" not in plain["0"].reason


def test_nan_and_inf_weights_are_kept_and_reported():
    layer = nn.Linear(64, 16)
    layer.weight.data[3, 5], layer.weight.data[4, 6] = float("nan"), float("inf")
    sparse = sparseops.convert(layer)
    assert sparse.weight[3, 5].isnan()
    assert sparse.weight[4, 6].isinf()
    assert "2 NaN or infinite weights" in sparseops.explain(sparse)[""].reason


@pytest.mark.parametrize("inplace", [False, True])
def test_training_requires_grad_dtype_and_hooks_are_carried_over(inplace):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[1].eval()
    model[2].note = {"kept": True}
    calls = []
    handles = [
        model[0].register_forward_hook(lambda m, args, y: calls.append("forward") or 2 * y),
        model[0].register_forward_pre_hook(lambda m, args, kwargs: calls.append("pre"), with_kwargs=True),
        model[2].register_full_backward_hook(lambda m, gi, go: calls.append("backward")),
    ]
    sparse = sparseops.convert(model, inplace=inplace)
    assert [type(layer) for layer in sparse] == [SparseLinear] * 3
    assert [layer.training for layer in sparse] == [True, False, True]
    assert [layer.values.requires_grad for layer in sparse] == [False, True, True]
    assert [layer.bias.requires_grad for layer in sparse] == [True, False, True]
    assert {layer.values.dtype for layer in sparse} == {torch.bfloat16}
    assert sparse[2].note == {"kept": True}
    y = sparse[0](x := torch.randn(2, 64).bfloat16())
    assert calls == ["pre", "forward"]
    assert torch.equal(y, 2 * sparse[0].forward(x))
    sparse(x).float().sum().backward()
    assert "backward" in calls
    assert "2 hooks carried over" in sparseops.explain(sparse)["0"].reason
    if inplace:
        for handle in handles:
            handle.remove()
        calls.clear()
        sparse(x)
        assert not calls


def test_bias_shared_by_two_layers_stays_shared():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    for sparse in (sparseops.convert(model), sparseops.convert(copy.deepcopy(model), inplace=True)):
        assert sparse[0].bias is sparse[1].bias


def test_convert_under_inference_mode_can_be_trained(net, x):
    with torch.inference_mode():
        sparse = sparseops.convert(net)
    sparse(x)["a"].sum().backward()
    assert sparse.twice.values.grad is not None


# include and exclude


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("heads.*", ["heads.a", "heads.b"]),
        ("heads", ["heads.a", "heads.b"]),
        ("again", ["twice"]),
        ("*.0", ["blocks.0.0", "blocks.1.0"]),
        (nn.Conv1d, ["line"]),
        (nn.ModuleDict, ["heads.a", "heads.b"]),
        (lambda name, module: isinstance(module, nn.Linear) and module.bias is None, ["heads.b"]),
        (["line", nn.Conv2d], ["blocks.0.0", "blocks.1.0", "line"]),
        (("line", "heads.a"), ["line", "heads.a"]),
    ],
)
def test_include_and_exclude(net, choice, expected):
    included = sparseops.explain(sparseops.convert(net, include=choice))
    assert [row.name for row in included.sparse_rows] == expected
    others = [name for name in SPARSE_NAMES if name not in expected]
    assert {row.name for row in included if row.code is Code.EXCLUDED} >= set(others)
    excluded = sparseops.explain(sparseops.convert(net, exclude=choice))
    assert [row.name for row in excluded.sparse_rows] == others


def test_include_and_exclude_together(net):
    report = sparseops.explain(sparseops.convert(net, include=nn.Linear, exclude="heads.a"))
    assert [row.name for row in report.sparse_rows] == ["heads.b", "twice"]
    assert report["heads.a"].reason == "exclude names it by pattern 'heads.a'"
    assert report["line"].reason == "include does not name it"


def test_include_rebuilds_what_a_checkpoint_holds(net, x):
    saved = sparseops.convert(net, include=["heads", "line"]).state_dict()
    other = sparseops.convert(Net().eval(), include=lambda name, _: f"{name}.values" in saved)
    other.load_state_dict(saved)
    for name, y in sparseops.convert(net, include=["heads", "line"])(x).items():
        assert torch.equal(other(x)[name], y)


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"pattern": "1:4"},
            ValueError,
            r"convert: pattern must be 2:4, 2:4t, a Channels, .*, a Plan or None, got '1:4'",
        ),
        ({"pattern": (2, 4)}, ValueError, r"convert: pattern must be 2:4, .*, got \(2, 4\)"),
        ({"prune": "random"}, ValueError, r"""convert: prune must be "magnitude" or None, got 'random'"""),
        ({"include": "haeds.*"}, ValueError, r"convert: include must match at least one module .*'haeds.\*'"),
        (
            {"exclude": ["stem", "x"]},
            ValueError,
            r"convert: exclude must match at least one module .* got 'x'",
        ),
        (
            {"exclude": 3},
            TypeError,
            r"convert: exclude must hold name patterns, module types or predicates.* 3",
        ),
        ({"include": [int]}, TypeError, r"convert: include must hold name patterns"),
        ({"include": nn.ReLU()}, TypeError, r"convert: include must hold name patterns"),
        (
            {"example_inputs": [1]},
            TypeError,
            r"convert: example_inputs must be a tensor, a tuple .* got list",
        ),
        ({"example_inputs": {1: 2}}, TypeError, r"convert: example_inputs must be .* got dict"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_bad_arguments(net, arguments, error, message, inplace):
    before = state(net)
    with pytest.raises(error, match=message):
        sparseops.convert(net, inplace=inplace, **arguments)
    assert_untouched(net, before)


def test_bad_models(net):
    for call, name in (
        (sparseops.convert, "convert"),
        (sparseops.explain, "explain"),
        (sparseops.to_dense, "to_dense"),
    ):
        with pytest.raises(TypeError, match=rf"{name}: model must be a torch.nn.Module, got dict"):
            call({})
    with pytest.raises(TypeError, match=r"convert: model must not be TorchScript"):
        sparseops.convert(torch.jit.trace(net.heads["a"], torch.randn(1, 64)))


def test_model_that_cannot_be_copied(net):
    net.twice.cache = torch.randn(3, requires_grad=True) * 2  # not a leaf
    before = state(net)
    with pytest.raises(
        RuntimeError, match=r"convert: model must survive copy.deepcopy, got RuntimeError: Only Tens"
    ):
        sparseops.convert(net)
    assert_untouched(net, before)
    assert type(sparseops.convert(net, inplace=True).twice) is SparseLinear


@pytest.mark.parametrize("inplace", [False, True])
def test_failure_in_the_last_layer_changes_nothing(net, inplace, monkeypatch):
    before = state(net)
    pack, made = SparseLinear.pack.__func__, []

    def fail_late(cls, layer, **options):
        made.append(layer)
        if layer is net.twice:
            raise MemoryError("no more")
        return pack(cls, layer, **options)

    monkeypatch.setattr(SparseLinear, "pack", classmethod(fail_late))
    with pytest.raises(MemoryError):
        sparseops.convert(net, inplace=inplace)
    assert len(made) == 3
    assert_untouched(net, before)


# Nothing to do


def test_model_without_eligible_layers_is_returned_with_one_warning():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.warns(UserWarning, match=r"nothing was made sparse in Sequential \(1 too_small\)") as caught:
        assert sparseops.convert(model) is model
    assert len(caught) == 1
    row = sparseops.explain(model)["0"]
    assert row.code is Code.TOO_SMALL
    assert row.reason == "in_features must be at least 32 and out_features 8, got 4 and 4"
    with pytest.warns(UserWarning, match="has no layer with a weight matrix"):
        sparseops.convert(nn.ReLU())


def test_second_convert_is_a_no_op_and_says_so(net, x):
    sparse = sparseops.convert(net)
    first = sparseops.explain(sparse)
    before = state(sparse)
    with pytest.warns(UserWarning, match=r"nothing was made sparse in Net .*6 already_sparse") as caught:
        assert sparseops.convert(sparse) is sparse
    assert len(caught) == 1
    assert_untouched(sparse, before)
    second = sparseops.explain(sparse)
    for name in SPARSE_NAMES:
        assert second[name].code is Code.ALREADY_SPARSE
        assert second[name].energy_kept == first[name].energy_kept
        assert second[name].bytes_before == first[name].bytes_before
        assert second[name].bytes_after == first[name].bytes_after


def test_second_convert_takes_what_the_first_left(net):
    some = sparseops.convert(net, include="heads")
    more = sparseops.convert(some, exclude="line")
    report = sparseops.explain(more)
    assert report["heads.a"].code is Code.ALREADY_SPARSE
    assert report["twice"].code is Code.CONVERTED
    assert report["line"].code is Code.EXCLUDED
    assert type(some.twice) is nn.Linear
    assert more.heads["a"] is not some.heads["a"]


# to_dense


@pytest.mark.parametrize("inplace", [False, True])
def test_to_dense(net, x, inplace):
    sparse = sparseops.convert(net)
    expected = {name: y.clone() for name, y in sparse(x).items()}
    dense = sparseops.to_dense(sparse, inplace=inplace)
    assert (dense is sparse) == inplace
    assert not any(isinstance(module, SparseModule) for module in dense.modules())
    assert any(isinstance(module, SparseModule) for module in sparse.modules()) != inplace
    assert dense.twice is dense.again
    assert not dense.training
    assert dense.load_state_dict(net.state_dict()).missing_keys == []
    dense = sparseops.to_dense(sparseops.convert(net, exclude="line"))
    assert sparseops.explain(dense)["line"].code is Code.ELIGIBLE
    dense = sparseops.to_dense(sparseops.convert(net))
    for name, y in dense(x).items():
        torch.testing.assert_close(y, expected[name])
    assert {row.code for row in sparseops.explain(dense)} == {Code.ELIGIBLE, Code.TOO_SMALL}
    assert sparseops.to_dense(net) is net


# The converted model as a whole


def test_report_survives_deepcopy_and_pickle_and_is_not_in_state_dict(net, x):
    sparse = sparseops.convert(net)
    report = sparseops.explain(sparse)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(file, weights_only=False),
    ):
        assert sparseops.explain(twin) == report
        assert torch.equal(twin(x)["a"], sparse(x)["a"])
    assert not any("report" in key for key in sparse.state_dict())


def test_converted_model_compiles(net, x):
    torch._dynamo.reset()
    sparse = sparseops.convert(net)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for name, y in sparse(x).items():
        torch.testing.assert_close(compiled(x)[name], y)


def test_compiled_model_can_be_converted(net, x):
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    sparse = sparseops.convert(compiled)
    expected = sparseops.convert(net)(x)
    for name, y in sparse(x).items():
        torch.testing.assert_close(y, expected[name])
    assert len(sparseops.explain(sparse).sparse_rows) == len(SPARSE_NAMES)


def test_traced_fx_graph_can_be_converted(x):
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()))
    sparse = sparseops.convert(graph)
    assert type(sparse.get_submodule("0")) is SparseConv2d
    y = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(sparse(y), sparseops.to_dense(sparse)(y))
