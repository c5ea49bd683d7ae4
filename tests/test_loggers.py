"""Loggers: what they write of a fit, read back."""

import csv
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparseops.prune import Unstructured
from sparseops.train.fit import fit_sparse
from sparseops.train.loggers import Callback, CSVLogger, TensorBoardLogger, WandbLogger


def fit(*callbacks, fail_at=None):
    """Two rounds of three steps; the losses are 1, 2, 3, ..."""
    steps = []

    def train(model, x):
        steps.append(1)
        if len(steps) == fail_at:
            raise RuntimeError("broken")
        loss = model(x).mean() * 0 + len(steps)
        return {"a": loss, "b": loss * 0}

    def evaluate(model):
        zeros = float((model[0].weight == 0).float().mean())
        return {"kept": 1 - zeros, "steps": float(len(steps))}

    return fit_sparse(
        nn.Sequential(nn.Linear(10, 10)),
        Unstructured(0.8),
        train,
        evaluate,
        batches=[torch.ones(2, 10)] * 3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        max_drop={"kept": 0.45, "steps": 1.0},
        rounds=2,
        callbacks=callbacks,
    )


# (step, name, value) of that fit, without those of steps
ROUNDS = [
    (0, "dense/kept", 1.0),
    (0, "dense/steps", 0.0),
    (0, "round", 1.0),
    (0, "strength", 1.0),
    (0, "pruned/kept", 0.2),
    (0, "pruned/steps", 0.0),
    (3, "retrained/kept", 0.2),
    (3, "retrained/steps", 3.0),
    (3, "round", 2.0),
    (3, "strength", 0.5),
    (3, "pruned/kept", 0.6),
    (3, "pruned/steps", 3.0),
    (6, "retrained/kept", 0.6),
    (6, "retrained/steps", 6.0),
]
STEP = {"loss", "loss/a", "loss/b", "learning_rate", "sparsity"}


def assert_written(rows, every=1):
    """rows: (step, name, value) in any order."""
    assert sorted(row[:2] for row in rows if not row[1].startswith("train/")) == sorted(r[:2] for r in ROUNDS)
    found = {row[:2]: row[2] for row in rows}
    for step, name, value in ROUNDS:
        assert found[step, name] == pytest.approx(value)
    steps = range(every, 7, every)
    names = {(step, f"train/{name}") for step in steps for name in STEP}
    assert {row[:2] for row in rows if row[1].startswith("train/")} == names
    for step in steps:
        assert found[step, "train/loss"] == found[step, "train/loss/a"] == step
        assert found[step, "train/loss/b"] == 0 and found[step, "train/learning_rate"] == 0.5
    assert found[6, "train/sparsity"] == pytest.approx(0.4)


def rows_of(path):
    header, *rows = csv.reader(path.open(newline=""))
    assert header == ["step", "name", "value"]
    return [(int(step), name, float(value)) for step, name, value in rows]


@pytest.mark.parametrize("every", [1, 2])
def test_csv(tmp_path, every):
    path = tmp_path / "log.csv"
    path.write_text("old")
    logger = CSVLogger(path, every=every)
    fit(logger)
    rows = rows_of(path)
    assert_written(rows, every)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert logger._file.closed
    fit(logger)
    assert_written(rows_of(path), every)


def test_csv_of_a_fit_that_fails(tmp_path):
    logger = CSVLogger(tmp_path / "log.csv")
    with pytest.raises(RuntimeError, match="broken"):
        fit(logger, fail_at=3)
    assert {row[0] for row in rows_of(tmp_path / "log.csv")} == {0, 1, 2}
    assert logger._file.closed
    # one that fails before it begins
    with pytest.raises(FileNotFoundError):
        fit(CSVLogger(tmp_path / "nowhere" / "log.csv"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("own", [True, False])
def test_tensorboard(tmp_path, own):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = None if own else SummaryWriter(str(tmp_path))
    logger = TensorBoardLogger(tmp_path if own else writer, every=2)
    fit(logger)
    assert (logger._writer.all_writers is None) == own  # as close leaves it
    events = EventAccumulator(str(tmp_path)).Reload()
    names = events.Tags()["scalars"]
    assert_written([(e.step, name, e.value) for name in names for e in events.Scalars(name)], every=2)
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "plan: Unstructured(ratio=0.8)" in text and "rounds: 2" in text
    if writer is not None:
        writer.add_scalar("more", 1.0)  # which a closed one refuses
        writer.close()


class Run:
    def __init__(self):
        self.rows, self.config, self.codes = [], {}, []

    def log(self, values, step):
        # as the real one does
        assert not self.rows or step >= self.rows[-1][0]
        self.rows += [(step, name, value) for name, value in values.items()]

    def finish(self, exit_code):
        self.codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    module = SimpleNamespace(runs=[], asked=[])

    def init(**options):
        module.asked.append(options)
        module.runs.append(Run())
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb(wandb):
    logger = WandbLogger(project="pruning", every=3)
    assert not wandb.runs
    fit(logger)
    (run,) = wandb.runs
    assert wandb.asked == [{"project": "pruning"}] and run.codes == [0] and logger.run is run
    assert run.config["rounds"] == 2 and run.config["plan"] == "Unstructured(ratio=0.8)"
    assert run.config["criterion"] == "l1" and run.config["steps"] == 3
    assert_written(run.rows, every=3)
    with pytest.raises(RuntimeError):
        fit(logger, fail_at=1)
    assert wandb.runs[1].codes == [1]


def test_a_run_of_ones_own_stays_open(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = Run()
    fit(WandbLogger(run))
    assert_written(run.rows)
    assert run.codes == []
    with pytest.raises(ValueError, match=r"^WandbLogger: run must be None with .* got both \(project\)$"):
        WandbLogger(run, project="a")


def test_missing_packages_are_said(monkeypatch, tmp_path):
    for name in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"^TensorBoardLogger: tensorboard .* \(pip install tensorboard\)"):
        TensorBoardLogger(tmp_path)
    with pytest.raises(ImportError, match=r"^WandbLogger: wandb must .* \(pip install wandb\), got"):
        WandbLogger()


@pytest.mark.parametrize("every", [0, 1.5, True])
def test_every_must_be_a_count(every):
    with pytest.raises(ValueError, match="^CSVLogger: every must be an integer of at least 1, got"):
        CSVLogger("log.csv", every=every)


def test_a_callback_need_not_do_anything():
    assert fit(Callback()).history[1].losses == {"loss": 5.0, "loss/a": 5.0, "loss/b": 0.0}


def test_optional_packages_are_imported_at_use_alone():
    code = (
        "import sys, sparseops.train.loggers, sparseops.train.fit\n"
        "names = {'tensorboard', 'wandb', 'lightning', 'pytorch_lightning', 'transformers', 'matplotlib'}\n"
        "print(names & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
