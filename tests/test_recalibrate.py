"""``recalibrate``: the statistics against plain sums in float64, and all that must stay as it is."""

import copy

import pytest
import torch
from conftest import assert_untouched, state
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from sparseops.train.batches import Batch, batches_for
from sparseops.train.recalibrate import recalibrate

WEIGHTS = [7, 7, 2]  # samples per batch, the last one short


def batches(*shape, sizes=WEIGHTS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *shape, generator=generator).double() * 3 + size for size in sizes]


def expected_statistics(inputs):
    """Of a batch norm with these inputs [N, C, ...]: means of the batches' mean and unbiased variance, each
    weighted by its number of values, channel by channel."""
    means, variances = [], []
    for channel in range(inputs[0].shape[1]):
        mean = variance = total = 0.0
        for x in inputs:
            values = x[:, channel].flatten().tolist()
            centre = sum(values) / len(values)
            mean += sum(values)
            variance += len(values) * sum((v - centre) ** 2 for v in values) / (len(values) - 1)
            total += len(values)
        means.append(mean / total)
        variances.append(variance / total)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def assert_statistics(norm, inputs):
    mean, variance = expected_statistics(inputs)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-9, atol=1e-9)


def network(**options):
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5, **options),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(5, 4, 3),
    ).double()


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"momentum": 0.9}])
def test_statistics(options):
    model, data = network(**options), batches(3, 6, 5)
    model[1].running_mean.fill_(float("nan"))
    before = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("1.")
    }
    given = [x.clone() for x in data]
    assert recalibrate(model, data) is model
    assert_statistics(model[1], [model[0](x).detach() for x in data])
    assert model[1].num_batches_tracked == len(data)
    assert model[1].momentum == options.get("momentum", 0.1)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(x, y) for x, y in zip(data, given, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_mean_is_that_of_all_data():
    norm, data = nn.BatchNorm1d(4).double(), batches(4)
    recalibrate(norm, data)
    torch.testing.assert_close(norm.running_mean, torch.cat(data).mean(0))


def test_later_norms_see_what_the_batch_makes_of_earlier_ones():
    model, data = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4)).double(), batches(4)
    model[0].running_mean.fill_(100.0)
    recalibrate(model, data)
    normed = [(x - x.mean(0)) / (x.var(0, unbiased=False) + model[0].eps).sqrt() for x in data]
    assert_statistics(model[2], [x.tanh() for x in normed])


def test_a_norm_that_is_called_twice_counts_all_its_values():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()

        def forward(self, x):
            return self.norm(input=x), self.norm(x[:2] + 1)

    model, data = Twice(), batches(4)
    recalibrate(model, data)
    assert_statistics(model.norm, [y for x in data for y in (x, x[:2] + 1)])


@pytest.mark.parametrize("cls", [nn.SyncBatchNorm, nn.BatchNorm3d])
def test_other_classes(cls):
    norm, data = cls(4).double(), batches(4, 2, 3, 2)
    recalibrate(norm, data)
    assert_statistics(norm, data)


def test_training_modes_come_back():
    model = network()
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    recalibrate(model, batches(3, 6, 5))
    assert [module.training for module in model.modules()] == modes
    assert not model[1]._forward_pre_hooks


def test_dropout_is_off_and_batches_stay_what_they_are():
    model, data = (
        nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.BatchNorm1d(4)).double(),
        batches(4),
    )
    given = [x.clone() for x in data]
    recalibrate(model, data)
    assert_statistics(model[2], [x.relu() for x in given])
    assert all(torch.equal(x, y) for x, y in zip(data, given, strict=True))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.BatchNorm1d(4).double(), nn.BatchNorm1d(4).double()

    def forward(self, x, aside=None):
        return self.used(x) if aside is None else self.used(x) + self.idle(aside)


def test_a_norm_that_is_not_reached_keeps_its_statistics():
    model, data = Branches(), batches(4)
    model.idle.running_mean.fill_(3.0)
    with pytest.warns(UserWarning, match="recalibrate: idle kept the old statistics") as caught:
        recalibrate(model, data)
    assert len(caught) == 1
    assert_statistics(model.used, data)
    assert model.idle.running_mean.tolist() == [3.0] * 4
    assert model.idle.momentum == 0.1


@pytest.mark.parametrize(
    "shape",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, torch.zeros(len(x))],
        lambda x: [x],
        lambda x: {"x": x},
        lambda x: ({"x": x}, 0),
        lambda x: ((x,), 0),
    ],
)
@pytest.mark.filterwarnings("ignore:recalibrate")
def test_kinds_of_batches(shape):
    model, data = Branches(), batches(4)
    recalibrate(model, iter([shape(x) for x in data]))
    assert_statistics(model.used, data)


def test_several_arguments():
    model, data = Branches(), batches(4)
    recalibrate(model, [((x, x + 1), None) for x in data])
    assert_statistics(model.idle, [x + 1 for x in data])


def test_batches_go_to_the_models_device():
    model = Branches().to("meta")
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    given = [({"x": torch.ones(2, 4), "n": 3}, [torch.ones(2)]), packed]
    first, second = batches_for(model, given, caller="f", argument="batches")
    assert first.inputs.kwargs["x"].is_meta and first.target[0].is_meta
    assert first.inputs.kwargs["n"] == 3
    (sequence,) = second.inputs.args
    assert isinstance(sequence, PackedSequence) and sequence.data.is_meta
    assert second.target is None


def test_a_batch_as_a_call():
    batch = Batch.of(((2, 3), 4), caller="f", argument="batches")
    assert batch.call(lambda a, b: a * b) == 6
    assert batch.target == 4


def fails(x):
    raise RuntimeError("no such picture")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], ValueError, "recalibrate: batches must hold at least one batch, got none"),
        (torch.ones(4, 4), TypeError, "recalibrate: batches must be an iterable of batches .*got Tensor"),
        ({"x": torch.ones(4, 4)}, TypeError, "recalibrate: batches must be an iterable .*got dict"),
        (3, TypeError, "recalibrate: batches must be an iterable .*got int"),
        (
            [(1, 2, 3)],
            TypeError,
            r"recalibrate: batches must hold x, \(x, y\) or a mapping .*got a tuple of 3",
        ),
        (
            [torch.full((4, 4), torch.inf).double()],
            ValueError,
            "recalibrate: .*NaN or infinity in used.running_",
        ),
        ([torch.ones(4, 4).double(), torch.ones(4, 5).double()], RuntimeError, "running_mean"),
        ((fails(x) for x in [1]), RuntimeError, "no such picture"),
    ],
)
def test_errors_leave_the_model_untouched(given, error, words):
    model = Branches()
    model.used.running_mean.fill_(2.0)
    model.used.num_batches_tracked.fill_(9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        recalibrate(model, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and model.used.training and model.used.momentum == 0.1
    assert not model.used._forward_pre_hooks


def test_a_model_without_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    before = state(model)
    with pytest.warns(UserWarning, match="recalibrate: nothing was changed, Sequential has no batch norm"):
        assert recalibrate(model, [torch.ones(3, 4)]) is model
    assert_untouched(model, before)


def test_no_module():
    with pytest.raises(TypeError, match=r"recalibrate: model must be a torch.nn.Module, got list"):
        recalibrate([], [])
