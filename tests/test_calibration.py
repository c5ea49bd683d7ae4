"""What calibration finds out about weights, against loops and derivatives of single outputs."""

import gc
import math
import types
import weakref
from functools import partial

import pytest
import torch
from conftest import assert_untouched, state
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.nn.utils.rnn import pad_sequence as pad

from sparseops._eligible import Layer
from sparseops.train.calibration import collect
from sparseops.train.targets import Target

ALL = {"gradient", "inputs", "hessian", "movement", "scale"}


def target_of(module, name="", parameter="weight"):
    weight = getattr(module, parameter)
    kind = type(module).__name__
    return Target(Layer((name,), module, kind, tuple(weight.shape), weight.nbytes), parameter)


def targets_of(model):
    """Every matrix of the model's layers."""
    return [
        target_of(module, name, parameter)
        for name, module in model.named_modules()
        for parameter, p in module._parameters.items()
        if p is not None and p.dim() >= 2
    ]


def collect_one(module, needs, batches, loss=None, parameter="weight", **options):
    return collect(module, [target_of(module, "", parameter)], needs, batches, loss, **options)[parameter]


def squared(output, y=None):
    return (output - (0 if y is None else y)).square().mean()


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
    found = collect_one(layer, ALL - {"scale"}, [x], lambda y: (y / 300).double().square().mean())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in found.values()} == {wide}
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
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = collect_one(rnn, {"inputs"}, [x], parameter="weight_hh_l1")
    torch.testing.assert_close(found["inputs"], seen["weight_hh_l1"].norm(dim=0).expand(20, 5))


def test_gradients_of_a_recurrent_layer_know_no_dropout():
    rnn = nn.GRU(4, 5, 2, dropout=0.5)
    batches = [torch.randn(3, 2, 4) for _ in range(2)]
    targets = targets_of(rnn)
    found = collect(rnn, targets, {"gradient"}, batches, lambda y: y[0].square().sum())
    assert rnn.training and rnn.dropout == 0.5
    rnn.eval()
    for target in targets:
        grads = [torch.autograd.grad(rnn(x)[0].square().sum(), target.weight)[0] for x in batches]
        expected = (sum(g.square() for g in grads) / 2).sqrt()
        torch.testing.assert_close(found[target.name]["gradient"], expected)


# Gradients


class Net(nn.Module):
    """Layers in several modes, with a state that a forward changes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.frozen.weight.requires_grad_(False)
        self.dropout.eval()
        self.norm.weight.data = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.5, 1.5, -1.0, 4.0])

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + torch.rand(())
        x = self.dropout(self.norm(self.conv(x)).relu().mean(2))
        return self.head(self.frozen(x).tanh())


def make_batches(number=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 3, 6, generator=generator), torch.randn(4, 2, generator=generator))
        for _ in range(number)
    ]


def slow_gradients(model, loss, batches):
    """By backward() into .grad, one batch after the other, by parameter."""
    twin = Net()
    twin.load_state_dict(model.state_dict())
    twin.eval().requires_grad_(True)
    found = []
    for x, y in batches:
        twin.zero_grad()
        loss(twin(x), y).backward()
        found.append({name: p.grad.clone() for name, p in twin.named_parameters()})
    return found


def test_gradient_and_movement():
    model, batches = Net(), make_batches()
    found = collect(model, targets_of(model), ALL, batches, squared)
    grads = slow_gradients(model, squared, batches)
    for name in ("conv.weight", "frozen.weight", "head.weight"):
        its = [one[name] for one in grads]
        weight = model.get_parameter(name).detach()
        torch.testing.assert_close(found[name]["gradient"], torch.stack(its).square().mean(0).sqrt())
        torch.testing.assert_close(found[name]["movement"], -(weight * sum(its)))
        assert not any(t.requires_grad for t in found[name].values())


def test_a_weight_that_a_batch_does_not_use_counts_as_zero():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, which):
            return getattr(self, which)(x)

    model, x = Either(), torch.randn(3, 2)
    batches = [((x, "a"), None), ((x, "b"), None), ((x, "b"), None)]
    found = collect(model, targets_of(model), {"gradient"}, batches, squared)
    for name, share in (("a", 1 / 3), ("b", 2 / 3)):
        weight = model.get_parameter(f"{name}.weight")
        grad = torch.autograd.grad(squared(getattr(model, name)(x)), weight)[0]
        torch.testing.assert_close(found[f"{name}.weight"]["gradient"], grad.abs() * math.sqrt(share))


def test_each_weight_gets_what_it_needs():
    model, batches = Net(), make_batches()
    needs = {"conv.weight": {"inputs", "scale"}, "frozen.weight": {"gradient"}}
    found = collect(model, targets_of(model), needs, batches, squared)
    assert {name: set(its) for name, its in found.items()} == {**needs, "head.weight": set()}
    everything = collect(model, targets_of(model), ALL, batches, squared)
    for name, its in needs.items():
        assert all(torch.equal(found[name][need], everything[name][need]) for need in its)


def test_forms_of_batches():
    layer, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    expected = collect_one(layer, {"gradient"}, [(x, y)], squared)["gradient"]
    for batch in ([x, y], ((x,), y), ({"input": x}, y)):
        assert torch.equal(collect_one(layer, {"gradient"}, [batch], squared)["gradient"], expected)
    alone = collect_one(layer, {"gradient"}, [x], squared)["gradient"]
    for batch in ([x], (x,), (x, None), {"input": x}):
        assert torch.equal(collect_one(layer, {"gradient"}, iter([batch]), squared)["gradient"], alone)


@pytest.mark.parametrize("wrap", [lambda loss: {"loss": loss}, lambda loss: types.SimpleNamespace(loss=loss)])
def test_a_model_that_gives_its_loss(wrap):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, labels):
            return wrap(squared(self.layer(x), labels))

    model, x, y = Own(), torch.randn(4, 3), torch.randn(4, 2)
    found = collect(model, targets_of(model), {"gradient"}, [{"x": x, "labels": y}])
    expected = torch.autograd.grad(squared(model.layer(x), y), model.layer.weight)[0]
    torch.testing.assert_close(found["layer.weight"]["gradient"], expected.abs())


def test_no_loss_is_asked_where_none_is_needed():
    layer = nn.Linear(3, 2)

    def loss(*args):
        raise AssertionError

    collect_one(layer, {"inputs"}, [torch.randn(2, 3)], loss)
    with torch.no_grad():
        collect_one(layer, {"gradient"}, [torch.randn(2, 3)], squared)
    with torch.inference_mode():
        collect_one(layer, {"gradient", "inputs"}, [torch.randn(2, 3)], squared)


# Batch norms behind layers


def scale_of(forward, **layers):
    model = nn.Module()
    for name, layer in layers.items():
        model.add_module(name, layer)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            nn.init.normal_(layer.weight)
    model.forward = types.MethodType(forward, model)
    return collect(model, targets_of(model), {"scale"}, [torch.randn(2, 4, 6, 6)])


def test_the_scale_is_that_of_the_batch_norm_that_reads_the_output():
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(6), nn.BatchNorm1d(5), nn.SyncBatchNorm(5)]

    def forward(self, x):
        x = self.t(self.bn1(self.conv(x)).relu_())
        x = self.bn2(x).flatten(2).transpose(1, 2)  # [2, n, 6]
        x = self.bn3(self.linear(x).transpose(1, 2)).transpose(1, 2)
        return self.bn4(self.flat(x.flatten(0, 1)))

    found = scale_of(
        forward,
        conv=nn.Conv2d(4, 8, 3, groups=2),
        t=nn.ConvTranspose2d(8, 6, 2, groups=2),
        linear=nn.Linear(6, 5),
        flat=nn.Linear(5, 5),
        bn1=norms[0],
        bn2=norms[1],
        bn3=norms[2],
        bn4=norms[3],
    )
    gammas = [norm.weight.detach().abs() for norm in norms]
    assert torch.equal(found["conv.weight"]["scale"], gammas[0].view(8, 1, 1, 1).expand(8, 2, 3, 3))
    scale = found["t.weight"]["scale"]
    assert scale.shape == (8, 3, 2, 2)
    for group in range(2):
        for c in range(4):
            for o in range(3):
                assert (scale[4 * group + c, o] == gammas[1][3 * group + o]).all()
    assert torch.equal(found["linear.weight"]["scale"], gammas[2].view(5, 1).expand(5, 6))
    assert torch.equal(found["flat.weight"]["scale"], gammas[3].view(5, 1).expand(5, 5))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.bn(self.conv(x).relu()),
        lambda self, x: self.bn(self.conv(x).add_(1)),
        lambda self, x: self.bn(self.conv(x) + x[:, :, 1:-1]),
        lambda self, x: self.bn(self.conv(x).transpose(1, 2)),
        lambda self, x: self.bn(self.conv(x.repeat(1, 1, 2, 1)).narrow(2, 3, 2).transpose(1, 3)[:, :4]),
        lambda self, x: (self.conv(x), self.bn(x)),
    ],
    ids=["relu", "added", "residual", "transposed", "part", "beside"],
)
def test_another_batch_norm_gives_no_scale(forward):
    found = scale_of(forward, conv=nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), bn=nn.BatchNorm2d(4))
    assert found == {"conv.weight": {}}


def test_a_batch_norm_without_gamma_gives_no_scale():
    found = scale_of(
        lambda self, x: self.bn(self.conv(x)),
        conv=nn.Conv2d(4, 4, 3),
        bn=nn.BatchNorm2d(4, affine=False),
    )
    assert found == {"conv.weight": {}}


# What is left behind


def everything_of(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: (id(p.grad), p.grad is not None and p.grad.clone()) for name, p in model.named_parameters()},
        {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()},
    )


def assert_left_alone(model, before, act):
    """The model, random numbers and modes of torch are the same after ``act``."""
    marks = everything_of(model)
    generator = torch.get_rng_state()
    act()
    assert_untouched(model, before)
    after = everything_of(model)
    assert after[:2] == marks[:2] and after[3] == marks[3]
    for name, (key, grad) in marks[2].items():
        assert after[2][name][0] == key
        assert grad is False or torch.equal(after[2][name][1], grad)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def shuffled(batches):
    torch.rand(3)
    yield from batches


@pytest.mark.parametrize("needs", [ALL, {"inputs"}], ids=["all", "inputs"])
def test_the_model_is_as_it_was(needs):
    model, batches = Net(), make_batches()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.add_module("rnn", nn.LSTM(3, 3, 2, dropout=0.3))
    before = state(model)
    targets = [target for target in targets_of(model) if "rnn" not in target.name]
    assert_left_alone(model, before, lambda: collect(model, targets, needs, shuffled(batches), squared))
    assert model.rnn.training and model.rnn.dropout == 0.3


def failing(number, error):
    """A loss that fails at a batch."""
    calls = []

    def loss(output, y):
        torch.rand(())
        calls.append(1)
        if len(calls) == number:
            raise error
        return squared(output, y)

    return loss


def test_the_model_is_as_it_was_where_the_loss_fails():
    model, batches = Net(), make_batches()

    def act():
        with pytest.raises(KeyError, match="mine"):
            collect(model, targets_of(model), ALL, batches, failing(2, KeyError("mine")))
        with pytest.raises(KeyboardInterrupt):
            collect(model, targets_of(model), ALL, batches, failing(1, KeyboardInterrupt()))

    assert_left_alone(model, state(model), act)


def test_no_activation_is_kept():
    model, seen = Net(), []
    model.head.register_forward_pre_hook(lambda layer, args: seen.append(weakref.ref(args[0])))
    alive = []

    def batches():
        for batch in make_batches():
            gc.collect()
            alive.append(sum(ref() is not None for ref in seen))
            yield batch

    collect(model, targets_of(model), {"inputs", "hessian", "scale"}, batches())
    assert len(seen) == 3 and alive == [0, 0, 0]


# Attention


def test_attention_has_gradients_alone():
    model, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    targets = targets_of(model)
    assert [target.name for target in targets] == ["in_proj_weight", "out_proj.weight"]
    batches = [((x, x, x), None)]
    found = collect(model, targets, {"gradient"}, batches, lambda y: y[0].square().sum())
    for target in targets:
        grad = torch.autograd.grad(model(x, x, x)[0].square().sum(), target.weight)[0]
        torch.testing.assert_close(found[target.name]["gradient"], grad.abs())
    for need in ("inputs", "hessian"):
        with pytest.raises(
            ValueError,
            match="^Pruner: in_proj_weight must be the weight of a layer whose inputs are known for "
            rf'"{need}", got one of MultiheadAttention \(leave it out of the plan, or use a criterion that '
            r"needs no inputs\)$",
        ):
            collect(model, targets[:1], {need}, batches)
    with pytest.raises(ValueError, match=r"got no batch that calls the one of out_proj\.weight"):
        collect(model, targets[1:], {"inputs"}, batches)


def test_the_fused_transformer_layer_is_seen_through():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 4, 8), torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2:] = True
    targets = [target for target in targets_of(model) if "linear" in target.name]
    batch = {"src": x, "src_key_padding_mask": mask}
    found = collect(model, targets, {"inputs"}, [batch])
    seen = {}
    for target in targets:
        target.layer.module.register_forward_pre_hook(
            lambda layer, args, name=target.name: seen.update({name: args[0]})
        )
    model.train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    model(**batch)
    for target in targets:
        norms = seen[target.name].flatten(0, 1).norm(dim=0).expand(target.weight.shape)
        torch.testing.assert_close(found[target.name]["inputs"], norms)


# Errors


def test_errors():
    model, batches = Net(), make_batches()
    targets = targets_of(model)

    def fails(error, message, needs=("gradient",), batches=batches, loss=squared, **options):
        def act():
            with pytest.raises(error, match=f"^{message}$"):
                collect(model, targets, set(needs), batches, loss, **options)

        assert_left_alone(model, state(model), act)

    fails(ValueError, "Pruner: calibration must hold at least one batch, got none", batches=[])
    fails(ValueError, "auto: calibration must hold .* got none", batches=[], caller="auto")
    fails(TypeError, "Pruner: calibration must be an iterable of batches .* got int", batches=3)
    fails(
        ValueError,
        r"Pruner: loss must be given with a criterion that needs gradients where the model's output has no "
        r"\.loss, got None",
        loss=None,
    )
    fails(
        ValueError,
        "Pruner: loss must be finite, got nan for batch 2",
        batches=[*batches[:2], (batches[0][0] * math.nan, batches[0][1])],
    )
    fails(
        TypeError,
        r"Pruner: loss must give a tensor of one element, got shape \(4, 2\)",
        loss=lambda output, y: output - y,
    )
    fails(
        TypeError,
        "Pruner: loss must give a tensor of one element, got float",
        loss=lambda output, y: squared(output, y).item(),
    )
    fails(
        ValueError,
        r"Pruner: loss must depend on the weights, got one without a gradient \(is it detached, .*\)",
        loss=lambda output, y: squared(output, y).detach(),
    )
    fails(
        ValueError,
        "Pruner: needs must be among gradient, movement, hessian, inputs, scale, got 'fisher'",
        needs=["fisher"],
    )


@pytest.mark.parametrize("need", ["gradient", "movement", "inputs", "hessian"])
def test_a_layer_that_no_batch_reaches(need):
    model = Net()
    model.idle = nn.Linear(2, 2)
    with pytest.raises(
        ValueError,
        match="^Pruner: calibration must reach every layer that is pruned, got no batch that calls the one "
        r"of idle\.weight \(leave it out of the plan, or give batches that use it\)$",
    ):
        collect(model, targets_of(model), {need}, make_batches(), squared)


@pytest.mark.parametrize(
    ("layer", "need"),
    [(nn.Embedding(4, 3), "hessian"), (nn.EmbeddingBag(4, 3), "inputs"), (nn.Bilinear(2, 2, 2), "inputs")],
)
def test_layers_whose_inputs_are_not_known(layer, need):
    with pytest.raises(ValueError, match=f'for "{need}", got one of {type(layer).__name__}'):
        collect_one(layer, {need}, [torch.zeros(1, dtype=torch.long)])


# Several processes


class Switch(nn.Module):
    """A convolution, and a layer that some batches do not reach."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.rare = nn.Linear(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x, rarely=False):
        x = self.conv(x).mean(2)
        return self.rare(x) if rarely else self.head(x)


def switched():
    torch.manual_seed(3)
    model = Switch().double()
    return model, [((torch.randn(n, 3, 6).double(), n == 5), None) for n in (4, 3, 2, 5)]


def work(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model, batches = switched()
    targets = targets_of(model)
    model = nn.parallel.DistributedDataParallel(model)
    mine = batches[:3] if rank == 0 else batches[3:]
    torch.save(collect(model, targets, ALL, mine, squared), f"{folder}/{rank}")
    torch.save(model.module.head.weight.grad, f"{folder}/grad{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_all_processes_know_what_all_batches_tell(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    model, batches = switched()
    expected = collect(model, targets_of(model), ALL, batches, squared)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for name, its in expected.items():
        assert its.keys() == found[0][name].keys() == {"gradient", "movement", "inputs", "hessian"}
        for need, value in its.items():
            assert torch.equal(found[0][name][need], found[1][name][need])
            torch.testing.assert_close(found[0][name][need], value, rtol=1e-12, atol=1e-14)
    assert torch.load(tmp_path / "grad0") is None
