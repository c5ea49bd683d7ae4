"""The callback for the Trainer of transformers, against a plain loop with a ``Pruner``."""

import importlib
import sys

import pytest
import torch
from torch import nn

from sparseops._replace import PLAN
from sparseops.prune import Unstructured
from sparseops.train.pruner import Pruner

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
callbacks = importlib.import_module("sparseops.train.huggingface")

RULE = Unstructured(0.6)
DATA = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
# of transformers itself
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        self.zeros = []

    def forward(self, x):
        self.zeros.append(int((self.net[0].weight == 0).sum()))
        y = self.net(x)
        return {"loss": (y - x).square().mean(), "logits": y}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def trainer_of(model, path, callback, max_steps=8, accumulate=1, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=3,
        logging_strategy="no",
        **options,
    )
    optimizer = optimizer_of(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return InOrder(
        model=model,
        args=arguments,
        train_dataset=[{"x": x} for x in DATA],
        callbacks=[callback],
        optimizers=(optimizer, constant),
    )


def by_hand(accumulate=1, **options):
    model = Net()
    pruner = Pruner(model, RULE, **options)
    optimizer = optimizer_of(model)
    for start in range(0, len(DATA), accumulate):
        optimizer.zero_grad()
        for x in DATA[start : start + accumulate]:
            (model(x[None])["loss"] / accumulate).backward()
        optimizer.step()
        pruner.step()
    return pruner.finalize()


def assert_same(model, expected):
    for mine, its in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)
        assert torch.equal(mine == 0, its == 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "cubic", "steps": 5}, {"schedule": "linear", "steps": 4, "criterion": "movement"}],
)
def test_training(tmp_path, options):
    model = Net()
    callback = callbacks.PrunerCallback(RULE, **options)
    assert callback.pruner is None
    trainer_of(model, tmp_path, callback).train()
    assert_same(model, by_hand(**options))
    assert int((model.net[0].weight == 0).sum()) == int(0.6 * 48)
    assert PLAN in vars(model) and len(callback.pruner.report().pruned) == 2
    assert (model.zeros[0] > 0) == (not options) and model.zeros[-1] == int(0.6 * 48)


def test_gradients_of_several_batches(tmp_path):
    model = Net()
    options = {"schedule": "linear", "steps": 4}
    callback = callbacks.PrunerCallback(RULE, **options)
    trainer_of(model, tmp_path, callback, max_steps=4, accumulate=2).train()
    assert callback.pruner.count == 4
    assert_same(model, by_hand(accumulate=2, **options))


@pytest.mark.parametrize("training", ["fixed", "straight-through"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_training_goes_on_from_a_checkpoint(tmp_path, training, elsewhere):
    options = {"schedule": "cubic", "steps": 6, "training": training}
    trainer_of(Net(), tmp_path / "a", callbacks.PrunerCallback(RULE, **options), max_steps=3).train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert (checkpoint / "pruner.pt").exists()
    model = Net()
    model.net[0].weight.data.zero_()
    resume = checkpoint if elsewhere else None
    callback = callbacks.PrunerCallback(RULE, resume=resume, **options)
    trainer = trainer_of(model, tmp_path / ("b" if elsewhere else "a"), callback)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert callback.pruner.count == 8 and callback.pruner.level == 1.0
    assert_same(model, by_hand(**options))


def test_a_checkpoint_without_the_pruner_is_said(tmp_path):
    options = {"schedule": "cubic", "steps": 6}
    trainer_of(Net(), tmp_path, callbacks.PrunerCallback(RULE, **options), max_steps=3).train()
    (tmp_path / "checkpoint-3" / "pruner.pt").unlink()
    trainer = trainer_of(Net(), tmp_path, callbacks.PrunerCallback(RULE, **options))
    with pytest.raises(FileNotFoundError, match="^PrunerCallback: resume must be .* got no .*pruner.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_training_that_is_broken_off(tmp_path):
    model = Net()
    trainer = trainer_of(model, tmp_path, callbacks.PrunerCallback(RULE))
    whole = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.compute_loss = whole
    trainer.train()
    assert int((model.net[0].weight == 0).sum()) == int(0.6 * 48)


def test_another_training_begins_anew(tmp_path):
    callback = callbacks.PrunerCallback(RULE, schedule="linear", steps=8)
    for _ in range(2):
        model = Net()
        trainer_of(model, tmp_path, callback).train()
        assert callback.pruner.count == 8 and model.zeros[0] == 0


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "sparseops.train.huggingface")
    with pytest.raises(
        ImportError, match=r"^sparseops.train.huggingface: transformers must .* \(pip install"
    ):
        importlib.import_module("sparseops.train.huggingface")
