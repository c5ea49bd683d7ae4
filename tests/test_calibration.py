"""What calibration finds out by gradients and from batch norms, what it leaves behind, and its errors."""

import gc
import math
import types
import weakref
from datetime import timedelta

import pytest
import torch
from calibrated import ALL, collect_one, squared, targets_of
from conftest import assert_untouched, state
from torch import nn

from sparseops.train.calibration import collect

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
    return collect(model, targets_of(model), {"scale"}, [torch.randn(2, 4, 4, 6)])


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
        lambda self, x: self.bn(self.conv(x) + x),
        lambda self, x: self.bn(self.conv(x).transpose(1, 2)),
        lambda self, x: self.bn(self.conv(x.repeat(1, 1, 2, 1)).narrow(2, 3, 2).transpose(1, 3)[:, :4]),
        lambda self, x: (self.conv(x), self.bn(x)),
    ],
    ids=["relu", "added", "residual", "transposed", "part", "beside"],
)
def test_another_batch_norm_gives_no_scale(forward):
    found = scale_of(forward, conv=nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), bn=nn.BatchNorm2d(4))
    assert found == {"conv.weight": {}}


def test_a_batch_norm_of_some_of_the_outputs_gives_no_scale():
    layers = {"conv": nn.Conv2d(4, 8, 3), "bn": nn.BatchNorm2d(4)}
    found = scale_of(lambda self, x: self.bn(self.conv(x)[:, :4]), **layers)
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


def test_a_buffer_of_two_modules_stays_one():
    model, batches = Net(), make_batches()
    model.norm.register_buffer("calls", model.calls)
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(model.norm.calls.item()))
    collect(model, targets_of(model), {"inputs"}, batches)
    assert seen == [1, 2, 3] and model.norm.calls is model.calls and model.calls == 0


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
    """A convolution, and a layer that some batches do not reach. The buffers of its batch norm would be sent
    around at each call of the wrapped model, of which one process makes more."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)
        self.rare = nn.Linear(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x, rarely=False):
        x = self.norm(self.conv(x)).mean(2)
        return self.rare(x) if rarely else self.head(x)


def switched():
    torch.manual_seed(3)
    model = Switch().double()
    return model, [((torch.randn(n, 3, 6).double(), n == 5), None) for n in (4, 3, 2, 5)]


def work(rank, folder):
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", timeout=timedelta(seconds=60), rank=rank, world_size=2
    )
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
        assert its.keys() == found[0][name].keys() == (ALL if name == "conv.weight" else ALL - {"scale"})
        for need, value in its.items():
            assert torch.equal(found[0][name][need], found[1][name][need])
            torch.testing.assert_close(found[0][name][need], value, rtol=1e-12, atol=1e-14)
    assert torch.load(tmp_path / "grad0") is None
