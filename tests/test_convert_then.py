"""``convert`` with ``Channels(then="2:4")``, and with ``prune=None`` on weights that others pruned."""

import pytest
import torch
from conftest import assert_untouched, state
from torch import nn

import sparseops
from sparseops import Channels
from sparseops.formats.nm24 import is_24
from sparseops.report import Code

# 2:4 after channels


def test_then_24():
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Conv2d(96, 64, 3), nn.Linear(64, 64))
    sparse = sparseops.convert(model, Channels(0.5, side="both", then="2:4", keep_last=False))
    report = sparseops.explain(sparse)
    for name, inputs, outputs in (("0", 64, 48), ("2", 64, 32), ("3", 32, 32)):
        layer = sparse.get_submodule(name)
        packed = layer.packed
        assert (packed.in_index.numel(), packed.out_index.numel()) == (inputs, outputs)
        assert packed.meta is not None
        compact = packed.compact.movedim(-1, 1)
        assert is_24(compact)
        assert (compact != 0).double().mean() == 0.5
        assert report[name].reason.endswith("what is kept is 2:4")
        assert report[name].energy_kept < 0.5
    x = torch.randn(4, 128)
    torch.testing.assert_close(sparse[0](x), sparseops.to_dense(sparse)[0](x))


def test_then_24_is_left_out_where_it_wins_nothing():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3))
    sparse = sparseops.convert(model, Channels(0.5, then="2:4"))
    assert sparse[0].packed.meta is None
    assert sparseops.explain(sparse)["0"].reason.endswith(
        "2:4 is left out: input channels must be at least 16 and output channels 8, got 3 and 32"
    )
    sparse = sparseops.convert(nn.Conv2d(32, 64, 3, groups=4), Channels(0.5, then="2:4", keep_last=False))
    assert sparse.packed.meta is None
    assert sparseops.explain(sparse)[""].reason.endswith("per group 8, got 8 and 8")


def test_then_24_alone_where_no_channel_goes():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16))
    sparse = sparseops.convert(model, Channels(0.5, then="2:4"))
    assert (sparse[0].format, sparse[1].format) == ("channel", "nm24")
    assert sparseops.explain(sparse)["1"].reason == (
        "it is the model's last layer, which keeps its outputs; so it is 2:4 alone; pruned by magnitude"
    )
    assert is_24(sparse[1].weight)


# prune=None


def pruned_elsewhere(inputs=True, outputs=True):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        for layer in model:
            if outputs:
                layer.weight[3:20] = 0
            if inputs:
                layer.weight[:, 40:] = 0
    return model


def test_zero_channels_are_taken_as_they_are():
    model = pruned_elsewhere()
    sparse = sparseops.convert(model, Channels(0.9), prune=None)
    for dense, layer in zip(model, sparse, strict=True):
        assert torch.equal(layer.weight, dense.weight)
        assert (layer.packed.in_index.numel(), layer.packed.out_index.numel()) == (40, 47)
    row = sparseops.explain(sparse)["0"]
    assert row.energy_kept == 1.0
    assert row.reason == (
        "keeps 47 of 64 outputs as single channels, which is slow, 40 of 64 inputs in blocks of 8; "
        "the others were zero already"
    )
    assert sparseops.explain(sparse)["1"].reason.endswith(
        "; it is the model's last layer, which keeps its outputs"
    )


def test_zero_channels_go_first_when_pruned():
    sparse = sparseops.convert(pruned_elsewhere(outputs=False), Channels(0.375, side="inputs"))
    assert "keeps all 64 outputs, 40 of 64 inputs in blocks of 8; the others were zero already" in (
        sparseops.explain(sparse)["0"].reason
    )
    assert sparse[0].packed.in_index.tolist() == [*range(40)]


@pytest.mark.parametrize("inplace", [False, True])
def test_weight_without_zero_channels_is_refused(inplace):
    model = pruned_elsewhere()
    model[0].weight.data.fill_(1.0)
    before = state(model)
    with pytest.raises(
        ValueError, match=r"convert: weight of layer '0' must have zero channels: .*got none in"
    ):
        sparseops.convert(model, Channels(), prune=None, inplace=inplace)
    assert_untouched(model, before)


def test_last_layer_need_not_have_zero_channels():
    model = pruned_elsewhere()
    model[1].weight.data.fill_(1.0)
    for side in ("outputs", "both"):
        sparse = sparseops.convert(model, Channels(side=side), prune=None)
        assert type(sparse[1]) is nn.Linear
        assert sparseops.explain(sparse)["1"].code is Code.WHOLE
    for rule in (Channels(keep_last=False), Channels(side="inputs")):
        with pytest.raises(ValueError, match="weight of layer '1' must have zero channels"):
            sparseops.convert(model, rule, prune=None)


@pytest.mark.parametrize("then", [None, "2:4"])
def test_layers_that_the_rule_leaves_whole_need_no_zero_channels(then):
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64), nn.Linear(64, 64))
    rule = Channels(0.5, then=then, keep_last=False)
    once = sparseops.convert(model, rule)
    masked = sparseops.to_dense(once)
    again = sparseops.convert(masked, rule, prune=None)
    assert [type(layer) for layer in again] == [type(layer) for layer in once]
    for layer, dense in zip(again, masked, strict=True):
        assert torch.equal(layer.weight, dense.weight)
    assert again[0].format == "nm24" if then else type(again[0]) is nn.Linear
    with pytest.raises(ValueError, match="weight of layer '0' must have zero channels"):
        sparseops.convert(masked, Channels(0.5, side="inputs"), prune=None)


def test_what_is_left_must_be_24_too():
    rule = Channels(0.5, side="both", then="2:4", keep_last=False)
    model = nn.Sequential(nn.Linear(128, 64), nn.Conv2d(64, 64, 3))
    masked = sparseops.to_dense(sparseops.convert(model, rule))
    sparse = sparseops.convert(masked, rule, prune=None)
    for layer, dense in zip(sparse, masked, strict=True):
        assert layer.packed.meta is not None
        assert torch.equal(layer.weight, dense.weight)
    reason = sparseops.explain(sparse)["0"].reason
    assert reason.endswith("the others were zero already; what is kept is 2:4")
    first_row, columns = int(sparse[0].packed.out_index[0]), sparse[0].packed.in_index.long()
    masked[0].weight.data[first_row, columns] = 1.0
    before = state(masked)
    with pytest.raises(
        ValueError,
        match=r"convert: weight of layer '0' without its zero channels must be 2:4: .*row 0, group 0",
    ):
        sparseops.convert(masked, rule, prune=None)
    assert_untouched(masked, before)
