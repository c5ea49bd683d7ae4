"""The callback for Lightning's Trainer, against a plain loop with a ``Pruner``."""

import copy
import importlib
import sys

import pytest
import torch
from torch import nn

from sparseops._replace import PLAN
from sparseops.prune import Unstructured
from sparseops.train.pruner import Pruner

pytest.importorskip("lightning")
callbacks = importlib.import_module("sparseops.train.lightning")

RULE = Unstructured(0.6)
DATA = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(2))
# of Lightning itself, about the number of workers and the like
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    pytest.importorskip(request.param)
    return importlib.import_module(request.param)


def module_of(package):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
            self.zeros = []

        def training_step(self, batch, batch_idx):
            self.zeros.append(int((self.net[0].weight == 0).sum()))
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    return Module()


def loss_of(net, x):
    return (net(x) - x).square().mean()


def trainer_of(package, path, callback, **options):
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    return package.Trainer(
        accelerator="cpu",
        callbacks=callback,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        **options,
    )


def loader():
    return torch.utils.data.DataLoader(DATA, batch_size=None)


def by_hand(package, accumulate=1, epochs=1, **options):
    module = module_of(package)
    pruner = Pruner(module, RULE, **options)
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for start in range(0, len(DATA), accumulate):
            optimizer.zero_grad()
            for x in DATA[start : start + accumulate]:
                (loss_of(module.net, x) / accumulate).backward()
            optimizer.step()
            pruner.step()
    return pruner.finalize()


def assert_same(model, expected):
    for mine, its in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "cubic", "steps": 5}, {"schedule": "linear", "steps": 4, "criterion": "movement"}],
)
def test_training(package, tmp_path, options):
    module = module_of(package)
    callback = callbacks.PrunerCallback(RULE, **options)
    assert callback.pruner is None
    # one callback, not in a list, must be of the Trainer's own package
    trainer_of(package, tmp_path, callback).fit(module, loader())
    assert_same(module, by_hand(package, **options))
    assert int((module.net[0].weight == 0).sum()) == int(0.6 * 48)
    assert PLAN in vars(module) and len(callback.pruner.report().pruned) == 2
    assert (module.zeros[0] > 0) == (not options) and module.zeros[-1] == int(0.6 * 48)


def test_gradients_of_several_batches(package, tmp_path):
    module = module_of(package)
    options = {"schedule": "linear", "steps": 4}
    callback = callbacks.PrunerCallback(RULE, **options)
    trainer_of(package, tmp_path, [callback], accumulate_grad_batches=2).fit(module, loader())
    assert callback.pruner.count == 4
    assert_same(module, by_hand(package, accumulate=2, **options))


@pytest.mark.parametrize("training", ["fixed", "straight-through"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_goes_on_from_a_checkpoint(package, tmp_path, training, accumulate):
    options = {"schedule": "cubic", "steps": 12 // accumulate, "training": training}
    batches = {"accumulate_grad_batches": accumulate}
    first, second = module_of(package), module_of(package)
    callback = callbacks.PrunerCallback(RULE, **options)
    trainer = trainer_of(package, tmp_path, [callback], **batches)
    trainer.fit(first, loader())
    assert callback.pruner.level < 1.0
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second.net[0].weight.data.zero_()
    callback = callbacks.PrunerCallback(RULE, **options)
    trainer = trainer_of(package, tmp_path, [callback], max_epochs=2, **batches)
    trainer.fit(second, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.pruner.count == 16 // accumulate and callback.pruner.level == 1.0
    assert_same(second, by_hand(package, accumulate, epochs=2, **options))
    # what was loaded is for that training alone
    third = module_of(package)
    trainer_of(package, tmp_path, [callback]).fit(third, loader())
    assert callback.pruner.count == 8 and third.zeros[0] == 0


def test_a_training_that_is_broken_off(package, tmp_path):
    module = module_of(package)
    callback = callbacks.PrunerCallback(RULE)
    whole = module.training_step

    def broken(batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("broken")
        return whole(batch, batch_idx)

    module.training_step = broken
    with pytest.raises(RuntimeError, match="broken"):
        trainer_of(package, tmp_path, [callback]).fit(module, loader())
    module.training_step = whole
    trainer_of(package, tmp_path, [callback]).fit(module, loader())
    assert int((module.net[0].weight == 0).sum()) == int(0.6 * 48)


def test_another_fit_begins_anew(package, tmp_path):
    callback = callbacks.PrunerCallback(RULE, schedule="linear", steps=8)
    for _ in range(2):
        module = module_of(package)
        trainer_of(package, tmp_path, [callback]).fit(module, loader())
        assert callback.pruner.count == 8 and module.zeros[0] == 0


def test_errors_come_when_training_starts(package, tmp_path):
    callback = callbacks.PrunerCallback(RULE, schedule="quartic")
    module = module_of(package)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="Pruner: schedule must be"):
        trainer_of(package, tmp_path, [callback]).fit(module, loader())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_a_missing_package_is_said(monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sparseops.train.lightning")
    with pytest.raises(
        ImportError, match=r"^sparseops.train.lightning: lightning must .* \(pip install light"
    ):
        importlib.import_module("sparseops.train.lightning")
