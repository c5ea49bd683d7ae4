"""``Pruner`` in two processes: the same masks on both, with DistributedDataParallel and ``fully_shard``."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparseops import Channels, Plan, Pruner, Unstructured

RANKS = 2
PLAN = Plan({"0": Channels(ratio=0.5), "2": "2:4t", "4": "2:4", "6": Unstructured(ratio=0.6)})

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def make_net():
    torch.manual_seed(3)
    sizes = [(32, 64), (64, 36), (36, 33), (33, 10)]  # not all of which two processes can halve
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def data(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, 32, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def train(model, pruner, optimizer, rank, first, steps):
    for step in range(first, first + steps):
        x, y = data(rank, step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()


def whole(model):
    """Every parameter, gathered."""
    gathered = {}
    for name, p in model.named_parameters():
        full = p.full_tensor() if hasattr(p, "full_tensor") else p
        gathered[name.removeprefix("module.")] = full.detach().clone()
    return gathered


def start(kind, options):
    model = make_net()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    pruner = Pruner(model, PLAN, **options)
    return model, pruner, torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)


def scores_of(rank, weight, dim):
    """Another opinion on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(weight.shape if dim is None else weight.shape[dim], generator=generator)


def work(rank, folder, kind, options):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=RANKS)
    try:
        if options.get("criterion") == "gradient":
            # of its own on each rank
            options = {**options, "calibration": [data(rank, 100)], "loss": F.cross_entropy}
        if options.get("criterion") == "of_the_rank":
            options = {**options, "criterion": lambda weight, dim: scores_of(rank, weight, dim)}
        model, pruner, optimizer = start(kind, options)
        train(model, pruner, optimizer, rank, 0, 3)
        state = copy.deepcopy([whole(model), pruner.state_dict(), optimizer.state_dict()])
        train(model, pruner, optimizer, rank, 3, 3)
        found = {"weights": whole(model), "masks": pruner.masks, "sparsity": pruner.sparsity}

        again, second, optimizer = start(kind, options)
        for name, p in again.named_parameters():
            full = state[0][name.removeprefix("module.")]
            with torch.no_grad():
                if kind == "fsdp":
                    from torch.distributed.tensor import distribute_tensor

                    full = distribute_tensor(full, p.device_mesh, p.placements)
                p.copy_(full)
        second.load_state_dict(state[1])
        optimizer.load_state_dict(state[2])
        train(again, second, optimizer, rank, 3, 3)
        found["resumed"] = whole(again)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


CASES = {
    "ddp_gradient": ("ddp", {"criterion": "gradient", "schedule": "linear", "steps": 5}),
    "ddp_straight_through": ("ddp", {"training": "straight-through"}),
    "ddp_of_the_rank": ("ddp", {"criterion": "of_the_rank"}),
    "fsdp_magnitude": ("fsdp", {"schedule": "cubic", "steps": 4}),
    "fsdp_straight_through": ("fsdp", {"schedule": "linear", "steps": 4, "training": "straight-through"}),
    "fsdp_movement": ("fsdp", {"criterion": "movement", "schedule": "linear", "steps": 4}),
}


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_masks_are_the_same_on_all_ranks(tmp_path, kind, options):
    torch.multiprocessing.spawn(work, (str(tmp_path), kind, options), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    assert first["masks"].keys() == {f"{n}.weight" for n in (0, 2, 4, 6)}
    assert 0.5 < first["sparsity"] == second["sparsity"] < 0.6
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        assert torch.equal(weight, first["resumed"][name]), name
        if name in first["masks"]:
            mask = first["masks"][name]
            assert torch.equal(mask, second["masks"][name])
            assert (weight[~mask] == 0).all() and (weight[mask] != 0).any()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_masks_are_those_of_one_process(tmp_path, kind):
    torch.multiprocessing.spawn(work, (str(tmp_path), kind, {}), nprocs=RANKS)
    found = torch.load(tmp_path / "0.pt", weights_only=True)["masks"]
    for name, mask in Pruner(make_net(), PLAN).masks.items():
        assert torch.equal(found[name], mask), name
