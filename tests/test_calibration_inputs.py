"""What calibration finds out about the inputs of layers, against loops and derivatives of single outputs."""

from functools import partial

import pytest
import torch
from calibrated import ALL, collect_one, target_of, targets_of
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.nn.utils.rnn import pad_sequence as pad

from sparseops.train.calibration import collect

# Inputs and Hessians: an output is a sum of products, and its derivative by a weight is what that multiplies

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear_vector": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv1d_unbatched": (lambda: nn.Conv1d(4, 6, 3, stride=2), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 3, 6, 5)),
    "conv2d_pointwise": (lambda: nn.Conv2d(5, 4, 1), (2, 5, 3, 2)),
    "conv2d_groups": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 4, 5)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (2, 4, 6, 7)),
    "conv2d_same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 5, 6)),
    "conv2d_valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 4, 4)),
    "conv2d_circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular", stride=2),
        (2, 3, 5, 6),
    ),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 2, 5, 4)),
    "conv2d_replicate": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"), (2, 2, 3, 4)),
    "conv3d": (
        lambda: nn.Conv3d(2, 4, (2, 1, 3), stride=(1, 2, 1), padding=1, groups=2),
        (2, 2, 3, 2, 4),
    ),
    "conv3d_reflect": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="reflect"), (1, 2, 2, 3, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed1d_unbatched": (lambda: nn.ConvTranspose1d(4, 6, 2, stride=3), (4, 5)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(4, 3, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
        (2, 4, 3, 4),
    ),
    "transposed2d_groups": (
        lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, groups=3),
        (2, 6, 3, 2),
    ),
    "transposed2d_cropped": (lambda: nn.ConvTranspose2d(2, 4, 2, padding=1, groups=2), (2, 2, 4, 5)),
    "transposed3d": (
        lambda: nn.ConvTranspose3d(2, 4, (1, 2, 2), stride=(1, 2, 1), groups=2, output_padding=(0, 1, 0)),
        (1, 2, 2, 2, 3),
    ),
}


def seen_by(layer, x, call=None):
    """[outputs of a channel, *logical weight], in float64: what each weight multiplied at each output."""
    call = call or functional_call
    target = target_of(layer)
    weight = layer.weight.detach()

    def outputs(w):
        return call(layer, {"weight": w, "bias": torch.zeros_like(layer.bias)}, x)

    jacobian = torch.autograd.functional.jacobian(outputs, weight)
    shape = outputs(weight).shape
    dims = len(getattr(layer, "kernel_size", ()))
    channel = len(shape) - 1 - dims
    by_channel = jacobian.movedim(channel, 0).reshape(shape[channel], -1, *weight.shape)
    rows = [
        torch.stack([target.logical(one)[channel] for one in its]) for channel, its in enumerate(by_channel)
    ]
    return torch.stack(rows, dim=1)


def check_inputs(layer, batches, call=None):
    layer = layer.double()
    batches = [batch.double() for batch in batches]
    found = collect_one(layer, {"inputs", "hessian"}, batches)
    seen = torch.cat([seen_by(layer, x, call) for x in batches])  # [outputs, O, C, *taps]
    target = target_of(layer)
    norms = seen.square().sum(0).sqrt()
    assert found["inputs"].shape == layer.weight.shape
    torch.testing.assert_close(target.logical(found["inputs"]), norms)
    columns = seen.flatten(3).transpose(2, 3).flatten(2) if seen.ndim > 3 else seen
    rows = columns.shape[1] // target.groups
    assert found["hessian"].shape == (target.groups, columns.shape[2], columns.shape[2])
    for row in range(columns.shape[1]):
        expected = columns[:, row].t() @ columns[:, row] / len(columns)
        torch.testing.assert_close(found["hessian"][row // rows], expected)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_inputs_and_hessians(make, shape):
    check_inputs(make(), [torch.randn(shape), torch.randn(shape)])


def test_an_unfolded_input_in_parts(monkeypatch):
    monkeypatch.setattr("sparseops.train.inputs.CHUNK", 400)
    check_inputs(nn.Conv2d(4, 2, 3, groups=2), [torch.randn(5, 4, 4, 5), torch.randn(2, 4, 6, 6)])


class Resized(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, output_size=(8, 7))


def test_a_transposed_convolution_asked_for_a_size():
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    x = torch.randn(2, 4, 4, 4).double()
    model = Resized(layer)
    found = collect(model, [target_of(layer, "layer")], {"inputs"}, [x])["layer.weight"]
    seen = seen_by(layer, x, lambda layer, weights, x: functional_call(layer, weights, (x, (8, 7))))
    torch.testing.assert_close(target_of(layer).logical(found["inputs"]), seen.square().sum(0).sqrt())


def test_a_layer_called_twice_and_by_keyword():
    layer = nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(input=self.layer(x))

    x = torch.randn(3, 4)
    found = collect(Twice(), [target_of(layer, "layer")], {"inputs", "hessian"}, [x])["layer.weight"]
    both = torch.cat([x, layer(x).detach()])
    torch.testing.assert_close(found["inputs"], both.norm(dim=0).expand(4, 4))
    torch.testing.assert_close(found["hessian"][0], both.t() @ both / 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    layer = nn.Conv1d(4, 6, 3).to(dtype)
    x = (300 * torch.randn(2, 4, 9)).to(dtype)  # whose squares float16 does not hold

    def loss(y):  # whose gradients have squares that float16 does not hold either
        return (y.double() / 1e4).square().mean()

    found = collect_one(layer, ALL - {"scale"}, [x], loss)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in found.values()} == {wide}
    gradient = torch.autograd.grad(loss(layer(x)), layer.weight)[0]
    torch.testing.assert_close(found["gradient"].double(), gradient.double().abs(), rtol=1e-5, atol=0)
    seen = seen_by(layer.double(), x.double())
    torch.testing.assert_close(found["inputs"].double(), seen.square().sum(0).sqrt(), rtol=1e-5, atol=0)
    assert all(t.isfinite().all() for t in found.values())


def test_autocast_does_not_round_the_sums():
    layer, x = nn.Linear(8, 4), torch.randn(50, 8)
    expected = collect_one(layer, {"inputs", "hessian"}, [x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = collect_one(layer, {"inputs", "hessian"}, [x])
    assert all(torch.equal(found[need], expected[need]) for need in expected)


# Embeddings


@pytest.mark.parametrize("sparse", [False, True])
def test_embedding(sparse):
    layer = nn.Embedding(7, 3, sparse=sparse)
    batches = [torch.tensor([[0, 3, 3], [6, 3, 1]]), torch.tensor([6, 2])]
    found = collect_one(layer, {"inputs", "gradient", "movement"}, batches, lambda y: y.square().sum())
    counts = [[1, 1, 0, 3, 0, 0, 1], [0, 0, 1, 0, 0, 0, 1]]
    total = torch.tensor(counts, dtype=torch.float32)
    torch.testing.assert_close(found["inputs"], total.sum(0).sqrt().unsqueeze(1).expand(7, 3))
    slopes = 2 * layer.weight.detach() * total.unsqueeze(2)
    torch.testing.assert_close(found["gradient"], slopes.square().mean(0).sqrt())
    torch.testing.assert_close(found["movement"], -(layer.weight.detach() * slopes).sum(0))


# Recurrent layers: one sequence after the other, one step after the other


def step(rnn, suffix, x, h, c):
    """One step of one cell: h, c and the units before they are projected."""
    get = partial(getattr, rnn)
    b_ih, b_hh = (get(f"bias_ih_{suffix}"), get(f"bias_hh_{suffix}")) if rnn.bias else (0, 0)
    ih, hh = get(f"weight_ih_{suffix}") @ x + b_ih, get(f"weight_hh_{suffix}") @ h + b_hh
    if rnn.mode == "LSTM":
        i, f, g, o = (ih + hh).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        raw = o.sigmoid() * c.tanh()
        return (get(f"weight_hr_{suffix}") @ raw if rnn.proj_size else raw), c, raw
    if rnn.mode == "GRU":
        (r, z, n), (r_h, z_h, n_h) = ih.chunk(3), hh.chunk(3)
        r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
        h = (1 - z) * (n + r * n_h).tanh() + z * h
    else:
        h = (ih + hh).tanh() if rnn.mode == "RNN_TANH" else (ih + hh).relu()
    return h, c, h


@torch.no_grad()
def seen_by_cells(rnn, sequences, states):
    """What each weight multiplied, by name; and the outputs of each sequence."""
    seen = {name: [] for name, p in rnn.named_parameters() if p.dim() == 2}
    outputs = []
    for x, state_of in zip(sequences, states, strict=True):
        cell = 0
        for layer in range(rnn.num_layers):
            both = []
            for end in ["", "_reverse"][: 1 + rnn.bidirectional]:
                suffix = f"l{layer}{end}"
                (h, c), ys = state_of[cell], []
                for one in reversed(x) if end else x:
                    seen[f"weight_ih_{suffix}"].append(one)
                    seen[f"weight_hh_{suffix}"].append(h)
                    h, c, raw = step(rnn, suffix, one, h, c)
                    if rnn.proj_size:
                        seen[f"weight_hr_{suffix}"].append(raw)
                    ys.append(h)
                both.append(torch.stack(ys[::-1] if end else ys))
                cell += 1
            x = torch.cat(both, 1)
        outputs.append(x)
    return {name: torch.stack(its) for name, its in seen.items()}, outputs


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    "lstm_deep": (nn.LSTM, {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.9}),
    "gru_deep": (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False, "dropout": 0.9}),
    "tanh_deep": (nn.RNN, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm_projected": (nn.LSTM, {"proj_size": 3}),
    "lstm_projected_deep": (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("given_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed", "packed_in_order", "one_step"])
@pytest.mark.parametrize(("cls", "options"), RECURRENT.values(), ids=RECURRENT)
def test_recurrent(cls, options, kind, given_state):
    rnn = cls(4, 5, **options).double()
    lengths = {"unbatched": [6], "packed": [2, 5, 1, 3], "packed_in_order": [4, 2, 2], "one_step": [1, 1]}
    lengths = lengths.get(kind, [4, 4, 4])
    sequences = [torch.randn(length, 4).double() for length in lengths]
    cells = rnn.num_layers * (1 + rnn.bidirectional)
    widths = rnn.proj_size or 5, 5
    h, c = (torch.randn(cells, len(lengths), n).double() * given_state for n in widths)
    if kind == "unbatched":
        x, hx = sequences[0], (h[:, 0], c[:, 0])
    elif kind.startswith("packed"):
        x, hx = pack_sequence(sequences, enforce_sorted=kind == "packed_in_order"), (h, c)
    else:
        x, hx = pad(sequences, batch_first=rnn.batch_first), (h, c)
    args = (x,) if not given_state else (x, hx if rnn.mode == "LSTM" else hx[0])
    states = [[(h[cell, n], c[cell, n]) for cell in range(cells)] for n in range(len(lengths))]
    seen, outputs = seen_by_cells(rnn, sequences, states)
    rnn.eval()
    assert_outputs(rnn(*args)[0], outputs, rnn.batch_first)
    rnn.train()

    names = list(seen)
    targets = [target_of(rnn, "", name) for name in names]
    found = collect(rnn, targets, {"inputs", "hessian"}, [(args, None)] * 2)
    for name in names:
        tokens, shape = seen[name], getattr(rnn, name).shape
        norms = (2 * tokens.square().sum(0)).sqrt().expand(shape)
        torch.testing.assert_close(found[name]["inputs"], norms)
        torch.testing.assert_close(found[name]["hessian"][0], tokens.t() @ tokens / len(tokens))


def assert_outputs(found, expected, batch_first):
    """The loops are right about the layer."""
    if isinstance(found, PackedSequence):
        found, _ = nn.utils.rnn.pad_packed_sequence(found, batch_first)
    elif found.ndim == 2:
        found = found.unsqueeze(0 if batch_first else 1)
    torch.testing.assert_close(found, pad(expected, batch_first))


def test_one_weight_of_a_recurrent_layer_under_autocast():
    rnn, x = nn.LSTM(4, 5, 2), torch.randn(3, 2, 4)
    seen, _ = seen_by_cells(rnn, x.unbind(1), [[(torch.zeros(5), torch.zeros(5))] * 2] * 2)
    expected = seen["weight_hh_l1"].norm(dim=0).expand(20, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given, bound in ((x, 1e-5), (x.bfloat16(), 1e-2)):
            found = collect_one(rnn, {"inputs"}, [given], parameter="weight_hh_l1")
            torch.testing.assert_close(found["inputs"], expected, rtol=bound, atol=bound)


def test_gradients_of_a_recurrent_layer_know_no_dropout():
    rnn = nn.GRU(4, 5, 2, dropout=0.5)
    batches = [torch.randn(3, 2, 4) for _ in range(2)]
    targets = targets_of(rnn)
    for training in (True, False):
        rnn.train(training)
        found = collect(rnn, targets, {"gradient"}, batches, lambda y: y[0].square().sum())
        assert rnn.training == training and rnn.dropout == 0.5
    for target in targets:
        grads = [torch.autograd.grad(rnn(x)[0].square().sum(), target.weight)[0] for x in batches]
        expected = (sum(g.square() for g in grads) / 2).sqrt()
        torch.testing.assert_close(found[target.name]["gradient"], expected)
