"""The networks that benchmarks and tests prune: that they are the published ones, and their small forms."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # behind everything else, as in test_benchmarks.py

from benchmarks.networks import NETWORKS, randomise_batch_norm  # noqa: E402

every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vgg16", 138_357_544),
        ("vgg16_bn", 138_365_992),
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("mobilenet_v2", 3_504_872),
        ("mobilenet_v3", 2_542_856),
        ("densenet", 7_978_856),
    ],
)
def test_they_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = NETWORKS[name].build.__wrapped__()
    assert sum(p.numel() for p in model.parameters()) == parameters


@every_network
def test_small_ones_run_and_nothing_vanishes(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.small(), network.small_example(3)
    assert not model.training and x.shape == (3, *network.small_shape)
    with torch.inference_mode():
        y = model(x)
        other = model(x.roll(1, 0))
    assert y.isfinite().all() and 0.05 < float(y.std()) < 50
    torch.testing.assert_close(other, y.roll(1, 0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(y[0], y[1])


@every_network
def test_the_seed_decides_the_weights_and_torchs_own_is_left_alone(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    network = NETWORKS[name]
    a, b, c = (network.small(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


@every_network
def test_nothing_that_pruning_folds_is_0_or_1(name: str) -> None:
    model = NETWORKS[name].small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None and ((tensor != 0) & (tensor != 1)).all()
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            assert (module.bias != 0).all()


def test_scales_of_batch_norms_have_both_signs() -> None:
    norm = randomise_batch_norm(nn.Sequential(nn.BatchNorm2d(64)))[0]
    assert (norm.weight < 0).any() and (norm.weight > 0).any()
