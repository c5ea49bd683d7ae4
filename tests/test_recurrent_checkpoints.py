"""Checkpoints, files and copies of recurrent layers."""

import copy
import io
import pickle

import pytest
import torch
from recurrent_layers import (
    CELLS,
    FEATURES,
    FORMATS,
    HIDDEN,
    LAYERS,
    assert_same,
    make,
    make_input,
    suffixes,
    weight_names,
)
from torch import nn

every_cell = pytest.mark.parametrize("cell", CELLS)
every_format = pytest.mark.parametrize("format", FORMATS)
pytestmark = pytest.mark.filterwarnings("ignore:.*plain torch reference:UserWarning")


def fresh(cell, format, layers="deep"):
    """A layer of the same sizes and another pattern."""
    return CELLS[cell](FEATURES, HIDDEN, dtype=torch.float64, format=format.split("_")[0], **LAYERS[layers])


@pytest.mark.parametrize("assign", [False, True])
@every_format
@every_cell
def test_load_sparse_checkpoint(cell, format, assign):
    sparse, dense = make(cell, format, "deep")
    x, hx = make_input(dense, "batched")
    target = fresh(cell, format)
    result = target.load_state_dict(sparse.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(target(x, hx), sparse(x, hx), bound=0)
    assert target.weight_hh_l0_values.requires_grad


def test_keys_of_the_state_dict():
    sparse, dense = make("lstm", "nm24", "bidirectional")
    biases = {name for name in dense.state_dict() if name.startswith("bias")}
    names = weight_names(dense)
    assert set(sparse.state_dict()) == biases | {f"{n}_{part}" for n in names for part in ("values", "meta")}
    sparse, _ = make("lstm", "channel", "bidirectional")
    lists = {f"{kind}_{suffix}" for kind in ("inputs", "units") for suffix in suffixes(dense)}
    assert set(sparse.state_dict()) == biases | lists | {f"{name}_values" for name in names}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("format", ["nm24", "channel"])
@every_cell
def test_load_dense_checkpoint(cell, format, assign):
    sparse, dense = make(cell, format, "deep")
    x, hx = make_input(dense, "batched")
    target = nn.ModuleList([nn.ReLU(), fresh(cell, format)])
    checkpoint = {f"1.{key}": value for key, value in dense.state_dict().items()}
    keys = set(checkpoint)
    target.load_state_dict(checkpoint, assign=assign)
    assert set(checkpoint) == keys, "the caller's dict must not change"
    assert_same(target[1](x, hx), sparse(x, hx), bound=0)
    assert isinstance(target[1].weight_ih_l0_values, nn.Parameter)


def test_some_dense_weights_with_the_others_packed():
    sparse, dense = make("gru", "nm24", "two_layers")
    state = sparse.state_dict()
    for part in ("values", "meta"):
        del state[f"weight_ih_l1_{part}"]
    state["weight_ih_l1"] = dense.weight_ih_l1.detach()
    target = fresh("gru", "nm24", "two_layers")
    target.load_state_dict(state)
    x, _ = make_input(dense, "batched")
    assert_same(target(x), sparse(x), bound=0)


@every_format
def test_damaged_checkpoint_changes_nothing(format):
    sparse, dense = make("lstm", format, "two_layers")
    x, _ = make_input(dense, "batched")
    before = sparse(x)
    damages = [
        (lambda s: s.update(weight_hh_l1_values=[1]), "weight_hh_l1_values must be a tensor, got list"),
        (
            lambda s: s.update(weight_hh_l1_values=s["weight_hh_l1_values"][:-1]),
            r"weight_hh_l1: \w+: values must have shape",
        ),
        (lambda s: s.update(weight_hh_l1_values=s["weight_hh_l1_values"].long()), "values must have dtype"),
    ]
    if format != "channel":
        damages += [
            (
                lambda s: s["weight_ih_l1_meta"].fill_(0xFF),
                "weight_ih_l1: NM24: meta must hold only the nibbles",
            ),
            (lambda s: s.pop("weight_ih_l1_values"), "weight_ih_l1_values must come with weight_ih_l1_meta"),
        ]
    if format == "channel_nm24":
        damages += [
            (lambda s: s.pop("weight_ih_l1_meta"), "values must have shape"),
        ]
    if format != "nm24":
        damages += [
            (
                lambda s: s["units_l0"].fill_(3),
                "in_index must be ascending without repetition, got 3 before 3",
            ),
            (lambda s: s["units_l0"].add_(20), "in_index must hold channels from 0 to 23"),
            (lambda s: s.update(inputs_l0=s["inputs_l0"].long()), "in_index must have dtype torch.int32"),
            (lambda s: s.update(inputs_l0=s["inputs_l0"][:0]), "in_index must hold at least one of 19"),
        ]
    for damage, message in damages:
        state = {
            key: value.clone() + (1 if key.startswith("bias") else 0)
            for key, value in sparse.state_dict().items()
        }
        damage(state)
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=message):
                sparse.load_state_dict(state, strict=strict)
        assert_same(sparse(x), before, bound=0)


def test_dense_checkpoint_that_does_not_fit_is_refused():
    sparse, dense = make("lstm", "nm24", "two_layers")
    state = dense.state_dict()
    with pytest.raises(RuntimeError, match=r"weight_ih_l1 must fit format nm24: .*row 0, group 0"):
        sparse.load_state_dict(state | {"weight_ih_l1": torch.ones(96, 24)})
    with pytest.raises(RuntimeError, match=r"weight_ih_l1 must have shape \(96, 24\), got \(96, 19\)"):
        sparse.load_state_dict(state | {"weight_ih_l1": torch.ones(96, 19)})
    channel, dense = make("lstm", "channel", "two_layers")
    state = dense.state_dict()
    del state["weight_hh_l1"]
    with pytest.raises(
        RuntimeError, match=r"weight_ih_l0 must come with every other .* without weight_hh_l1"
    ):
        channel.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"weight_ih_l0 must fit format channel: .*dense floating-point"):
        channel.load_state_dict({key: value.long() for key, value in dense.state_dict().items()})


@every_format
def test_missing_and_unexpected_keys(format):
    sparse, _ = make("gru", format)
    state = sparse.state_dict() | {"other": torch.zeros(1)}
    del state["bias_hh_l0"]
    target = fresh("gru", format, "one")
    result = target.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["bias_hh_l0"], ["other"])
    assert target.load_state_dict({}, strict=False).missing_keys == list(target.state_dict())


@every_format
@every_cell
def test_load_into_meta_module_with_assign(cell, format):
    sparse, dense = make(cell, format, "deep")
    x, hx = make_input(dense, "batched")
    for state in (sparse.state_dict(), dense.state_dict())[: 1 if format == "channel_nm24" else 2]:
        target = CELLS[cell](
            FEATURES,
            HIDDEN,
            device="meta",
            dtype=torch.float64,
            format=format.split("_")[0],
            **LAYERS["deep"],
        )
        assert all(t.is_meta for t in (*target.parameters(), *target.buffers()))
        target.load_state_dict(state, assign=True)
        assert_same(target(x, hx), sparse(x, hx), bound=0)


@every_format
def test_files(format, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    sparse, dense = make("lstm", format, "deep")
    x, _ = make_input(dense, "batched")
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    safetensors.save_file(sparse.state_dict(), tmp_path / "x.safetensors")
    states = (torch.load(file, weights_only=True), safetensors.load_file(tmp_path / "x.safetensors"))
    for state in states:
        target = fresh("lstm", format)
        target.load_state_dict(state)
        assert_same(target(x), sparse(x), bound=0)


@every_format
@every_cell
def test_deepcopy_and_pickle(cell, format):
    sparse, dense = make(cell, format, "deep")
    x, _ = make_input(dense, "packed")
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert_same(twin(x), sparse(x), bound=0)
        with torch.no_grad():
            twin.weight_hh_l0_values.zero_()
        assert sparse.weight_hh_l0_values.any()
