"""Recurrent layers in every format: the dense layer's numbers, and everything people do to a module."""

import io

import pytest
import torch
from recurrent_layers import (
    CELLS,
    FEATURES,
    FORMATS,
    HIDDEN,
    KINDS,
    LAYERS,
    as_dense,
    assert_same,
    flat,
    make,
    make_input,
    weight_names,
)
from torch import nn

from sparseops.formats import NM24
from sparseops.nn import SparseGRU, SparseLSTM, SparseModule, recurrence
from sparseops.testing import Expected, assert_close

every_cell = pytest.mark.parametrize("cell", CELLS)
every_format = pytest.mark.parametrize("format", FORMATS)
every_layer = pytest.mark.parametrize("layers", LAYERS)
pytestmark = pytest.mark.filterwarnings("ignore:.*plain torch reference:UserWarning")


@pytest.mark.parametrize("given", [False, True], ids=["zero_state", "state"])
@pytest.mark.parametrize("kind", KINDS)
@every_layer
@every_format
@every_cell
def test_forward_equals_dense(cell, format, layers, kind, given):
    sparse, dense = make(cell, format, layers)
    x, hx = make_input(dense, kind)
    found, expected = (layer(x, hx if given else None) for layer in (sparse, dense))
    assert_same(found, expected)
    if kind.startswith("packed"):
        for ours, theirs in zip(found[0][1:], expected[0][1:], strict=True):
            assert ours is theirs or torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize("layers", ["one", "deep"])
@every_format
@every_cell
def test_kernel_dtypes(cell, format, layers, kind, dtype):
    """The paths with and without a gradient, judged by the dense layer of the same dtype."""
    sparse, dense = make(cell, format, layers, dtype)
    x, hx = make_input(dense, kind, dtype)
    before = [t.clone() for t in flat((x, hx))]
    wide_x = x.to(torch.float64)
    wide_hx = tuple(s.double() for s in hx) if cell == "lstm" else hx.double()
    plain, exact = flat(dense(x, hx)), flat(dense.double()(wide_x, wide_hx))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = flat(sparse(x, hx))
        for ours, theirs, wide in zip(found, plain, exact, strict=True):
            assert ours.requires_grad == enabled
            assert ours.stride() == theirs.stride()
            # a sum of tens of products near 1, and states that are rounded once a step
            expected = Expected(wide.detach(), theirs.detach(), torch.ones_like(wide), torch.ones_like(wide))
            assert_close(ours.detach(), expected)
    assert all(torch.equal(t, old) for t, old in zip(flat((x, hx)), before, strict=True))


@pytest.mark.parametrize("format", ["nm24", "channel_nm24"])
@every_cell
def test_plain_inference_steps_in_place(cell, format, monkeypatch):
    sparse, _ = make(cell, format, "deep", torch.float32)
    x, hx = make_input(sparse, "packed", torch.float32)
    taken = []
    mode = cell.upper()
    stepper = recurrence._STEPPER[mode]
    monkeypatch.setitem(recurrence._STEPPER, mode, lambda *args: taken.append(1) or stepper(*args))
    sparse(x, hx)
    with torch.no_grad():
        sparse.requires_grad_(False)(x, hx)
        counted = len(taken)
        assert counted == 6 * 3  # cells, and numbers of sequences that run
    # whatever needs a gradient is a reason not to, be it the last tensor of the state alone
    data, state = flat((x, hx))[0], flat((x, hx))[1:]
    for needy in (data, *state):
        needy.requires_grad_()
        flat(sparse(x, hx))[0].sum().backward()
        assert needy.grad.any()
        needy.requires_grad_(False)
    assert len(taken) == counted


@every_layer
@every_format
@every_cell
@pytest.mark.parametrize("kind", ["batched", "packed"])
def test_gradients_equal_dense(cell, format, layers, kind):
    sparse, dense = make(cell, format, layers)
    grads = []
    for layer in (sparse, dense):
        x, hx = make_input(dense, kind)
        data, state = flat((x, hx))[0].requires_grad_(), [s.requires_grad_() for s in flat((x, hx))[1:]]
        results = flat(layer(x, hx))
        generator = torch.Generator().manual_seed(2)
        total = sum(
            (r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum()
            for r in results  # an all-ones gradient would hide transpositions
        )
        total.backward()
        grads.append([data.grad, *(s.grad for s in state)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for name, held in sparse.packed.weights.items():
        found = as_dense(held, getattr(sparse, f"{name}_values").grad)
        mask = as_dense(held, torch.ones_like(held.values))
        torch.testing.assert_close(found, getattr(dense, name).grad * mask, rtol=1e-11, atol=1e-11)
    for name, parameter in dense.named_parameters():
        if name.startswith("bias"):
            torch.testing.assert_close(getattr(sparse, name).grad, parameter.grad, rtol=1e-11, atol=1e-11)


@every_format
@every_cell
def test_training_keeps_the_pattern(cell, format):
    sparse, _ = make(cell, format, "deep", torch.float32)
    x, _ = make_input(sparse, "batched", torch.float32)
    before = {name: weight != 0 for name, weight in sparse.weights.items()}
    optimizer = torch.optim.Adam(sparse.parameters(), 0.01, weight_decay=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (sparse(x)[0] - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, weight in sparse.weights.items():
        assert not (weight != 0)[~before[name]].any()
    sparse.packed.validate()


@every_format
@every_cell
def test_dropout_is_that_of_the_dense_layer(cell, format):
    sparse, dense = make(cell, format, "deep", dropout=0.5)
    x, _ = make_input(dense, "batched")
    results = []
    for layer in (sparse, dense):
        torch.manual_seed(5)
        results.append(layer(x))
    assert_same(*results)
    assert not torch.equal(flat(sparse(x))[0], flat(results[0])[0])
    assert_same(sparse.eval()(x), dense.eval()(x))


def test_attributes_and_dense_layer():
    for cell in CELLS:
        sparse, dense = make(cell, "nm24", "deep", dropout=0.25)
        dense.weight_hh_l0.requires_grad_(False)
        sparse = CELLS[cell].from_dense(dense.eval())
        for name in (
            "input_size",
            "hidden_size",
            "num_layers",
            "bias",
            "batch_first",
            "dropout",
            "bidirectional",
        ):
            assert getattr(sparse, name) == getattr(dense, name)
        assert sparse.weight_shape == (HIDDEN * recurrence.GATES[cell.upper()], 2 * HIDDEN)
        assert isinstance(sparse, SparseModule)
        assert not sparse.training
        back = sparse.to_dense()
        assert type(back) is type(dense)
        assert not back.training
        assert repr(back) == repr(dense)
        assert back.state_dict().keys() == dense.state_dict().keys()
        for name, parameter in dense.named_parameters():
            twin = getattr(back, name)
            assert torch.equal(twin, parameter)
            assert twin.requires_grad == parameter.requires_grad == (name != "weight_hh_l0")
            assert twin.data_ptr() != parameter.data_ptr()
        x, hx = make_input(dense, "batched")
        assert_same(back(x, hx), dense(x, hx), bound=0)


@every_format
@every_cell
def test_to_dense_and_from_dense_copy(cell, format):
    sparse, dense = make(cell, format)
    x, _ = make_input(dense, "batched")
    before = sparse(x)
    for other in (dense, sparse.to_dense()):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert_same(sparse(x), before, bound=0)


@every_cell
def test_new_layer_is_dense_init_pruned(cell):
    cls = CELLS[cell]
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}
    torch.manual_seed(3)
    dense = cls.dense_class(FEATURES, HIDDEN, **options)
    after = torch.rand(1)
    torch.manual_seed(3)
    sparse = cls(FEATURES, HIDDEN, **options)
    assert torch.equal(torch.rand(1), after)
    assert (sparse.dropout, sparse.batch_first) == (0.5, True)
    for name in weight_names(dense):
        pruned = NM24.from_dense(getattr(dense, name), prune="magnitude").to_dense()
        assert torch.equal(sparse.weights[name], pruned)
    assert torch.equal(sparse.bias_hh_l1, dense.bias_hh_l1)
    assert sparse.packed.energy_kept == 1.0
    assert 0.5 < cls.pack(dense, prune="magnitude")[1].energy_kept < 1.0
    channel = cls(FEATURES, HIDDEN, bias=False, dtype=torch.bfloat16, format="channel")
    assert channel.format == "channel"
    assert channel.weight_hh_l0_values.dtype == torch.bfloat16
    assert not any(name.startswith("bias") for name in channel.state_dict())


@every_cell
def test_packed_says_what_pruning_cost(cell):
    dense = CELLS[cell].dense_class(FEATURES, HIDDEN)
    with torch.no_grad():
        dense.weight_hh_l0[0, 0] = torch.nan
        dense.weight_hh_l0[1, 0] = 0.1
    _, packed = CELLS[cell].pack(dense, prune="magnitude")
    assert packed.nonfinite == 1
    kept = total = 0.0
    for name, held in packed.weights.items():
        kept += held.to_dense().double().nan_to_num(0).square().sum()
        total += getattr(dense, name).detach().double().nan_to_num(0).square().sum()
    assert packed.energy_kept == pytest.approx(float(kept / total))
    weights = [getattr(dense, name) for name in weight_names(dense)]
    assert packed.dense_nbytes == sum(weight.nbytes for weight in weights)
    for format in ("nm24", "channel"):
        layer, whole = CELLS[cell].pack(dense, prune="magnitude", format=format)
        own = [tensor for name, tensor in layer.state_dict().items() if not name.startswith("bias")]
        assert whole.nbytes == layer.packed.nbytes == sum(tensor.nbytes for tensor in own)
    nonzero = sum(int(held.to_dense().count_nonzero()) for held in packed.weights.values())
    assert packed.density == pytest.approx(nonzero / sum(weight.numel() for weight in weights))


@every_cell
def test_extra_repr(cell):
    sparse, dense = make(cell, "nm24", "deep", torch.float32)
    text = repr(sparse)
    assert text.startswith(f"Sparse{repr(dense)[:-1]}, format=nm24, density=0.5")
    assert sparse.kernel in text and not sparse.kernel.startswith("reference")
    assert sparse.kernel_note is None
    assert "kernel=reference: there is no kernel for torch.float64" in repr(sparse.double())
    assert "density=unknown" in repr(sparse.to("meta"))
    sparse, _ = make(cell, "channel", dtype=torch.float32)
    assert f"format=channel, density={sparse.packed.density:.3g}, kernel=torch.{cell} on the" in repr(sparse)


def test_weight_is_no_attribute():
    sparse = SparseLSTM(8, 8)
    assert not hasattr(sparse, "weight")
    assert set(sparse.weights) == {"weight_ih_l0", "weight_hh_l0"}


@every_format
def test_weights_are_differentiable_in_values(format):
    sparse, _ = make("gru", format)
    target = torch.randn(sparse.weights["weight_hh_l0"].shape, dtype=torch.float64)
    (sparse.weights["weight_hh_l0"] * target).sum().backward()
    held = sparse.packed.weights["weight_hh_l0"]
    mask = as_dense(held, torch.ones_like(held.values))
    assert torch.equal(as_dense(held, sparse.weight_hh_l0_values.grad), target * mask)


@every_format
def test_every_way_to_cast_keeps_the_metadata(format):
    sparse, _ = make("lstm", format, "deep", torch.float32)
    before = {name: buffer.clone() for name, buffer in sparse.named_buffers()}
    for cast in (
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.float32),
        lambda m: m.to("cpu"),
    ):
        cast(sparse)
        assert len({p.dtype for p in sparse.parameters()}) == 1
        assert before.keys() == dict(sparse.named_buffers()).keys()
        for name, buffer in sparse.named_buffers():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])
        sparse.packed.validate()


@pytest.mark.parametrize("given", [False, True])
@every_format
@every_cell
def test_autocast(cell, format, given):
    sparse, dense = make(cell, format, "deep", torch.float32)
    x, hx = make_input(dense, "batched", torch.float32)
    hx = hx if given else None
    exact = flat(dense(x, hx))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flat(sparse(x, hx))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flat(sparse.double()(x.double()))[0].dtype == torch.float64


@every_format
@every_cell
def test_compile_fullgraph(cell, format):
    torch._dynamo.reset()
    sparse, dense = make(cell, format, "bidirectional", torch.float32)
    x, hx = make_input(dense, "batched", torch.float32)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(x, hx), dense(x, hx), bound=1e-5)
    flat(compiled(x))[0].sum().backward()
    flat(dense(x))[0].sum().backward()
    torch.testing.assert_close(sparse.bias_hh_l0.grad, dense.bias_hh_l0.grad, rtol=1e-4, atol=1e-4)


@every_format
@every_cell
def test_export_with_dynamic_batch(cell, format):
    sparse, dense = make(cell, format, "bidirectional", torch.float32)
    x, _ = make_input(dense, "batched", torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(sparse.eval(), (x,), dynamic_shapes=({1: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert {name for name in program.state_dict if "values" in name} == {
        f"{name}_values" for name in weight_names(dense)
    }
    many = torch.cat([x, x, x], 1)
    assert_same(loaded(many), dense(many), bound=1e-5)


@pytest.mark.parametrize("format", ["nm24", "channel_nm24"])
@every_cell
def test_vmap(cell, format):
    sparse, dense = make(cell, format, "two_layers", torch.float32)
    x = torch.randn(4, 5, 3, FEATURES)
    with torch.no_grad():
        found = torch.vmap(lambda x: sparse(x)[0])(x)
        expected = torch.stack([dense(one)[0] for one in x])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_format
@every_cell
def test_inference_mode_and_no_sequences(cell, format):
    sparse, dense = make(cell, format, "deep")
    x, _ = make_input(dense, "batched")
    with torch.inference_mode():
        assert_same(sparse(x), dense(x))
        assert_same(sparse(x[:0]), dense(x[:0]))


# Bad input


def test_bad_layers_are_refused():
    with pytest.raises(TypeError, match=r"SparseLSTM.from_dense: layer must be LSTM, got GRU"):
        SparseLSTM.from_dense(nn.GRU(8, 8))
    with pytest.raises(ValueError, match=r"SparseLSTM: proj_size must be 0, got 4"):
        SparseLSTM.from_dense(nn.LSTM(8, 8, proj_size=4), prune="magnitude")
    with pytest.raises(ValueError, match=r"SparseLSTM: proj_size must be 0, got 4"):
        SparseLSTM(8, 8, proj_size=4)
    with pytest.raises(ValueError, match=r"SparseGRU: format must be one of nm24, .*got 'csr'"):
        SparseGRU(8, 8, format="csr")
    with pytest.raises(
        ValueError, match=r"SparseGRU: weight_ih_l0 must fit format nm24: .*at most two non-zeros"
    ):
        SparseGRU.from_dense(nn.GRU(8, 8))
    with pytest.raises(ValueError, match=r'prune must be None or "magnitude", got .l1.'):
        SparseGRU.from_dense(nn.GRU(8, 8), prune="l1")
    with pytest.raises(
        TypeError, match=r"weight_hh_l0 must fit format nm24: .*floating-point tensor, got .*complex"
    ):
        layer = nn.GRU(8, 8)
        layer.weight_hh_l0 = nn.Parameter(torch.ones(24, 8, dtype=torch.complex64))
        SparseGRU.from_dense(layer, prune="magnitude")


@every_format
def test_bad_input_is_refused(format):
    lstm, _ = make("lstm", format, "batch_first", torch.float32)
    gru, _ = make("gru", format, "bidirectional", torch.float32)
    x = torch.randn(3, 5, FEATURES)
    h = torch.randn(1, 3, HIDDEN)
    packed, state = make_input(lstm, "packed", torch.float32)
    refusals = [
        (ValueError, r"SparseLSTM: input must have 2 or 3 dimensions and 19 features, got shape \(3, 5, 20\)",
         lambda: lstm(torch.randn(3, 5, 20))),
        (ValueError, r"input must have 2 or 3 dimensions and 19 features, got shape \(19,\)",
         lambda: lstm(torch.randn(19))),
        (ValueError, r"input must have 2 dimensions and 19 features, got shape \(3, 3\)",
         lambda: lstm(nn.utils.rnn.pack_sequence([torch.randn(3, 3)]))),
        (TypeError, r"input must have the dtype of the weights \(torch.float32\), got torch.float64",
         lambda: lstm(x.double())),
        (ValueError, r"input must have at least one step, got shape \(3, 0, 19\)", lambda: lstm(x[:, :0])),
        (ValueError, r"SparseGRU: input must have at least one step, got shape \(0, 3, 19\)",
         lambda: gru(x.transpose(0, 1)[:0])),
        (TypeError, r"SparseLSTM: hx must be a tuple of two tensors, got Tensor", lambda: lstm(x, h)),
        (TypeError, r"SparseLSTM: hx must be a tuple of two tensors, got tuple", lambda: lstm(x, (h,))),
        (TypeError, r"SparseGRU: hx must be a tensor, got tuple", lambda: gru(x, (h, h))),
        (ValueError, r"SparseLSTM: hx\[1\] must have shape \(1, 3, 24\), got \(1, 2, 24\)",
         lambda: lstm(x, (h, h[:, :2]))),
        (ValueError, r"SparseLSTM: hx\[0\] must have shape \(1, 24\), got \(1, 3, 24\)",
         lambda: lstm(x[0], (h, h))),
        (ValueError, r"SparseLSTM: hx\[0\] must have shape \(1, 4, 24\), got \(1, 3, 24\)",
         lambda: lstm(packed, (h, h))),
        (ValueError, r"SparseGRU: hx must have shape \(2, 5, 24\), got \(1, 3, 24\)", lambda: gru(x, h)),
        (TypeError, r"SparseLSTM: hx\[0\] must have the dtype of input \(torch.float32\), got torch.float64",
         lambda: lstm(x, (h.double(), h.double()))),
    ]  # fmt: skip
    for error, message, call in refusals:
        with pytest.raises(error, match=message):
            call()
    assert lstm(packed, state)[1][0].shape == (1, 4, HIDDEN)
