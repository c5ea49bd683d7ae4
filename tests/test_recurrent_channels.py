"""Hidden units and features as channels of a recurrent layer: which are dropped, and what is left of them."""

import pytest
import torch
from recurrent_layers import (
    CELLS,
    FEATURES,
    HIDDEN,
    assert_same,
    drop,
    flat,
    keeps_of,
    make,
    make_input,
    suffixes,
    weight_names,
)
from torch import nn

from sparseops.formats import NM24, Keep
from sparseops.formats.nm24 import is_24
from sparseops.nn import SparseGRU, SparseLSTM
from sparseops.nn.recurrence import Packed, Padded, run_constant, select
from sparseops.nn.recurrent_weights import gate_rows, unit_matrix

pytestmark = pytest.mark.filterwarnings("ignore:.*plain torch reference:UserWarning")
every_cell = pytest.mark.parametrize("cell", CELLS)


def lists(sparse, suffix="l0"):
    return getattr(sparse, f"inputs_{suffix}").tolist(), getattr(sparse, f"units_{suffix}").tolist()


def dense_of(cell, layers=1, **options):
    return CELLS[cell].dense_class(FEATURES, HIDDEN, layers, dtype=torch.float64, **options)


# What is kept


@every_cell
def test_zeros_are_found(cell):
    dense = dense_of(cell, 2, bidirectional=True)
    keeps = keeps_of(dense)
    drop(dense, keeps)
    sparse, packed = CELLS[cell].pack(dense, format="channel")
    for suffix, keep in keeps.items():
        assert lists(sparse, suffix) == (keep.inputs.tolist(), keep.outputs.tolist())
    assert packed.energy_kept == 1.0
    for name in weight_names(dense):
        assert torch.equal(sparse.weights[name], getattr(dense, name))
        suffix = name.split("_", 2)[2]
        gates = len(dense.weight_hh_l0) // HIDDEN
        columns = keeps[suffix].outputs if "hh" in name else keeps[suffix].inputs
        values = getattr(sparse, f"{name}_values")
        assert values.shape == (gates * len(keeps[suffix].outputs), len(columns))


@every_cell
def test_keep_by_layer_is_the_masked_layer(cell):
    dense = dense_of(cell, 2, bidirectional=True)
    keeps = keeps_of(dense)
    sparse, packed = CELLS[cell].pack(dense, prune=keeps, format="channel")
    sizes = {name: getattr(dense, name).detach().square().sum() for name in weight_names(dense)}
    drop(dense, keeps)
    kept = sum(getattr(dense, name).detach().square().sum() for name in weight_names(dense))
    assert packed.energy_kept == pytest.approx(float(kept / sum(sizes.values())))
    for name in weight_names(dense):
        assert torch.equal(sparse.weights[name], getattr(dense, name))
    x, hx = make_input(dense, "batched")
    assert_same(sparse(x, hx), dense(x, hx))


def test_layers_that_are_not_named_keep_all():
    dense = dense_of("lstm", 2)
    keep = Keep(torch.arange(8), torch.arange(16))
    sparse = SparseLSTM.from_dense(dense, prune={"l0": keep}, format="channel")
    assert lists(sparse) == (list(range(8)), list(range(16)))
    assert lists(sparse, "l1") == (list(range(HIDDEN)), list(range(HIDDEN)))
    drop(dense, {"l0": keep})
    assert_same(sparse(torch.ones(3, FEATURES).double()), dense(torch.ones(3, FEATURES).double()))


def test_a_lone_keep_names_units_of_all_layers_and_features_of_the_input():
    dense = dense_of("gru", 2, bidirectional=True)
    keep = Keep(torch.arange(8), torch.arange(4, 20))
    sparse = SparseGRU.from_dense(dense, prune=keep, format="channel")
    for suffix in suffixes(dense):
        features = list(range(8)) if suffix.startswith("l0") else list(range(2 * HIDDEN))
        assert lists(sparse, suffix) == (features, list(range(4, 20)))
    only_units = SparseGRU.from_dense(dense, prune=Keep(outputs=torch.tensor([3])), format="channel")
    assert lists(only_units) == (list(range(FEATURES)), [3])


@every_cell
def test_magnitude_keeps_the_better_half_of_blocks(cell):
    """Of 24 units two blocks of 8, of 19 features two of three; those from dropped units go first."""
    dense = dense_of(cell, 2, bidirectional=True)
    with torch.no_grad():
        for suffix in suffixes(dense):
            w_ih, w_hh = (getattr(dense, f"weight_{m}_{suffix}") for m in ("ih", "hh"))
            w_ih.fill_(1.0)
            w_hh.fill_(1.0)
            # what is large differs: a row of the last gate, and a column of the recurrent weight
            w_ih[-HIDDEN + 9] = 5.0
            w_hh[:, 1 if suffix.endswith("reverse") else 17] = 3.0
            w_ih[:, 16] = 4.0
            w_ih[:, 3] = 2.0
    sparse = CELLS[cell].from_dense(dense, prune="magnitude", format="channel")
    first, last, middle = list(range(8)), list(range(16, 24)), list(range(8, 16))
    assert lists(sparse) == ([*first, 16, 17, 18], middle + last)
    assert lists(sparse, "l0_reverse") == ([*first, 16, 17, 18], first + middle)
    # kept below: 8-23 of the one direction, 24+0 to 24+15 of the other: 4 of 6 blocks, of which 3 are kept
    assert lists(sparse, "l1")[0] == list(range(8, 32))
    half = CELLS[cell](32, 32, format="channel")
    assert [len(chosen) for chosen in lists(half)] == [16, 16]


@every_cell
def test_layer_of_zeros_keeps_a_block(cell):
    dense = dense_of(cell)
    with torch.no_grad():
        for name in weight_names(dense):
            getattr(dense, name).zero_()
    sparse = CELLS[cell].from_dense(dense, format="channel")
    assert lists(sparse) == (list(range(8)), list(range(8)))
    x, hx = make_input(dense, "batched")
    assert_same(sparse(x, hx), dense(x, hx))


@every_cell
def test_halved_compact_weights(cell):
    dense = dense_of(cell, 2)
    keeps = keeps_of(dense, nm24=True)
    sparse, packed = CELLS[cell].pack(dense, prune=keeps, format="channel")
    drop(dense, keeps)
    for name, weight in sparse.weights.items():
        held = packed.weights[name]
        assert isinstance(NM24(held.values, held.meta, held.compact_shape), NM24)
        assert is_24(held.compact)
        assert not weight[getattr(dense, name) == 0].any()
        kept = weight != 0
        assert torch.equal(weight[kept], getattr(dense, name)[kept])
        assert 0.4 < kept.sum() / (getattr(dense, name) != 0).sum() < 0.7
    assert "reference" in sparse.kernel  # of the 2:4 product, in float64
    assert "reference" not in sparse.float().kernel


def test_unit_matrix_holds_all_that_goes_with_a_unit():
    w_ih, w_hh = torch.zeros(4 * 6, 5), torch.zeros(4 * 6, 6)
    for weight in (w_ih, w_hh):
        weight[gate_rows(torch.tensor([2, 5]), 4, 6)] = 1
    w_hh[:, 3] = 1
    assert unit_matrix(w_ih, w_hh).ne(0).sum(1).tolist() == [12, 12, 52, 28, 12, 52]
    assert gate_rows(torch.tensor([2, 5], dtype=torch.int32), 3, 6).tolist() == [2, 5, 8, 11, 14, 17]
    assert gate_rows(torch.tensor([2], dtype=torch.int32), 3, 6).dtype == torch.int32


# What is left of a dropped unit


@pytest.mark.parametrize("kind", ["batched", "packed"])
@every_cell
def test_dropped_units_do_not_see_the_input(cell, kind):
    sparse, dense = make(cell, "channel")
    x, hx = make_input(dense, kind)
    units = sparse.units_l0.tolist()
    dropped = [unit for unit in range(HIDDEN) if unit not in units]
    other = x._replace(data=x.data + 1) if kind == "packed" else x + 1
    for ours, theirs in zip(flat(sparse(x, hx)), flat(sparse(other, hx)), strict=True):
        assert torch.equal(ours[..., dropped], theirs[..., dropped])
        assert not torch.isclose(ours[..., units], theirs[..., units]).any()


def step_by_step(mode, state, b_ih, b_hh, steps):
    """Float64, one step after another."""
    b_ih, b_hh, state = b_ih.double(), b_hh.double(), [s.double() for s in state]
    outputs = []
    for _ in range(steps):
        if mode == "LSTM":
            i, f, g, o = (b_ih + b_hh).chunk(4)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            state = [o.sigmoid() * c.tanh(), c]
        else:
            (r, z, n), (r2, z2, n2) = b_ih.chunk(3), b_hh.chunk(3)
            new = (n + (r + r2).sigmoid() * n2).tanh()
            z = (z + z2).sigmoid()
            state = [(1 - z) * new + z * state[0]]
        outputs.append(state[0])
    return torch.stack(outputs), state


@pytest.mark.parametrize("given", [False, True], ids=["zero_state", "state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_constant_units_over_many_steps(mode, dtype, given):
    """Gates that are open or shut completely, too, where 1 - f rounds to nothing."""
    forget = torch.tensor([-torch.inf, -120.0, -30.0, -1.0, 0.0, 3.0, 17.0, 60.0, 95.0, 110.0, torch.inf])
    units, gates, steps = len(forget), 4 if mode == "LSTM" else 3, 700
    generator = torch.Generator().manual_seed(0)
    b_ih, b_hh = torch.randn((2, gates * units), generator=generator).to(dtype)
    b_ih[units : 2 * units], b_hh[units : 2 * units] = forget.to(dtype), 0.0
    state = tuple(torch.randn((2, 3, units), generator=generator).to(dtype))[: 2 if mode == "LSTM" else 1]
    if not given:
        state = tuple(torch.zeros_like(s) for s in state)
    like = torch.empty(steps, 3, 1, dtype=dtype)
    found, last = run_constant(mode, Padded(like), state if given else None, (b_ih, b_hh), like)
    expected, at_end = step_by_step(mode, state, b_ih, b_hh, steps)
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    for ours, theirs in zip((found, *last), (expected, *at_end), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=16 * eps, atol=16 * eps)


@pytest.mark.parametrize("given", [False, True], ids=["zero_state", "state"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_constant_units_have_gradients(mode, given):
    units, gates = 3, 4 if mode == "LSTM" else 3
    biases = [torch.randn(gates * units, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        biases[0][units + 1] = 800.0  # nothing is forgotten, and no NaN may come of it
    state = [torch.randn(2, units, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    state = state[: 2 if mode == "LSTM" else 1] if given else []
    layout = Packed(torch.tensor([2, 2, 1]))
    like = torch.empty(5, 1, dtype=torch.float64)

    def run(b_ih, b_hh, *state):
        y, last = run_constant(mode, layout, state or None, (b_ih, b_hh), like)
        return y, *last

    assert torch.autograd.gradcheck(run, (*biases, *state))
    assert torch.autograd.gradgradcheck(run, (*biases, *state))


@every_cell
def test_no_bias_and_no_state_leave_zeros(cell):
    sparse, dense = make(cell, "channel", "no_bias")
    x, _ = make_input(dense, "batched")
    dropped = [unit for unit in range(HIDDEN) if unit not in sparse.units_l0.tolist()]
    for result in flat(sparse(x)):
        assert not result[..., dropped].any()


def test_select():
    index = torch.tensor([0, 3, 4])
    for shape in ((2, 5), (2, 3, 5), (0, 3, 5)):
        x = torch.randn(shape)
        assert torch.equal(select(x, index), x[..., index])
    x = torch.arange(30).view(2, 3, 5).transpose(0, 1)
    assert torch.equal(select(x, index), x[..., index])


def test_packed_layout():
    """Sequences a0 a1 a2, b0 b1 and c0, laid out as a0 b0 c0 a1 b1 a2."""
    layout = Packed(torch.tensor([3, 2, 1]))
    x = torch.tensor([[0.0], [10.0], [20.0], [1.0], [11.0], [2.0]])
    assert layout.flip(x).flatten().tolist() == [2, 11, 20, 1, 10, 0]
    assert layout.last(x).flatten().tolist() == [2, 11, 20]
    assert layout.count(x).flatten().tolist() == [1, 1, 1, 2, 2, 3]
    assert layout.spread(torch.tensor([[5.0], [6.0], [7.0]])).flatten().tolist() == [5, 6, 7, 5, 6, 5]
    assert torch.equal(layout.join(list(layout.split(x))), x)


# Checkpoints


@every_cell
def test_checkpoint_of_other_sizes(cell):
    """The layer takes the sizes of the checkpoint, with 2:4 and without."""
    dense = dense_of(cell)
    x, hx = make_input(dense, "batched")
    keep = Keep(torch.arange(3, 12), torch.tensor([0, 7, 9, 23]))
    halved = Keep(torch.arange(16), torch.arange(8, 24), nm24=True)
    prunes = (keep, halved, "magnitude")
    layers = [CELLS[cell].from_dense(dense, prune=prune, format="channel") for prune in prunes]
    target = CELLS[cell](FEATURES, HIDDEN, dtype=torch.float64, format="channel")
    parameter = target.weight_hh_l0_values
    for source in (*layers, *layers):
        target.load_state_dict(source.state_dict())
        assert target.weight_hh_l0_values is parameter
        assert target.state_dict().keys() == source.state_dict().keys()
        assert target.kernel == source.kernel
        assert_same(target(x, hx), source(x, hx), bound=0)


def test_checkpoint_with_2to4_in_part_is_refused():
    dense = dense_of("gru")
    source = SparseGRU.from_dense(
        dense, prune=Keep(torch.arange(16), torch.arange(16), nm24=True), format="channel"
    )
    plain = SparseGRU.from_dense(dense, prune=Keep(torch.arange(16), torch.arange(16)), format="channel")
    state = source.state_dict()
    del state["weight_ih_l0_meta"]
    state["weight_ih_l0_values"] = plain.weight_ih_l0_values.detach()
    with pytest.raises(RuntimeError, match="weight_ih_l0: meta must be given for every weight or for none"):
        plain.load_state_dict(state)


# Zeros of another kind


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # unit 2 lives on in one gate, in one weight, or in what the others read of it
        (
            lambda ih, hh: ih.__setitem__(2, 1.0),
            r"weight_ih_l0 must have zero rows only .* got row 26, of hidden unit 2,",
        ),
        (
            lambda ih, hh: hh[26].fill_(1.0),
            r"weight_ih_l0 must have zero rows only .* got row 2, of hidden unit 2, which",
        ),
        (
            lambda ih, hh: hh[30, 2].fill_(1.0),
            r"weight_ih_l0 must have zero rows only .* got row 2, of hidden unit 2, which",
        ),
        (
            lambda ih, hh: hh[:, 5].fill_(0.0),
            r"weight_hh_l0 must have zero columns only where .* rows are zero too, got column 5",
        ),
        (
            lambda ih, hh: hh[29].fill_(0.0),
            r"weight_hh_l0 must have zero rows only .* got row 29, of hidden unit 5,",
        ),
    ],
)
@every_cell
def test_zeros_that_are_no_units_are_refused(cell, damage, message):
    dense = dense_of(cell)
    drop(dense, {"l0": Keep(torch.arange(FEATURES), torch.tensor([u for u in range(HIDDEN) if u != 2]))})
    assert lists(CELLS[cell].from_dense(dense, format="channel"))[1].count(2) == 0
    with torch.no_grad():
        damage(dense.weight_ih_l0, dense.weight_hh_l0)
    with pytest.raises(ValueError, match=f"Sparse{cell.upper()}: {message}"):
        CELLS[cell].from_dense(dense, format="channel")


def test_bad_keeps_are_refused():
    dense, numbers = dense_of("lstm", 2), torch.arange(8)
    refusals = [
        (None, r"SparseLSTM: weights must have a hidden unit or a feature that is all zero .*, got none"),
        ("l1", r'prune must be None, "magnitude", a Keep or Keeps by layer \(l0, l1\), got .l1.'),
        ({"l2": Keep()}, r"prune must name layers among l0, l1, got 'l2'"),
        (
            {"l0": Keep(nm24=True), "l1": Keep()},
            r"prune must ask for nm24 in every layer or in none",
        ),
        (
            Keep(outputs=numbers + 20),
            r"units kept in l0 must be a list of numbers from 0 to 23, got \[20",
        ),
        (Keep(outputs=numbers - 1), r"hidden units kept in l0 must be .*, got \[-1"),
        (Keep(outputs=numbers.view(2, 4)), r"hidden units kept in l0 must be a list"),
        (
            Keep(outputs=numbers.flip(0)),
            r"(in|out)puts of prune must be ascending",
        ),
        (Keep(outputs=numbers[:0]), r"must hold at least one of"),
        (
            Keep(inputs=numbers + 12),
            r"weight_ih_l0 must fit format channel: .*inputs of prune must hold",
        ),
    ]
    for prune, message in refusals:
        with pytest.raises(ValueError, match=message):
            SparseLSTM.from_dense(dense, prune=prune, format="channel")
    with pytest.raises(ValueError, match=r'prune must be None or "magnitude", got Keep'):
        SparseLSTM.from_dense(dense, prune=Keep(), format="nm24")
    with pytest.raises(TypeError, match=r"SparseLSTM.from_dense: layer must be LSTM, got RNN"):
        SparseLSTM.from_dense(nn.RNN(8, 8), format="channel")
