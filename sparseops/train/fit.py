"""``fit_sparse``: prune, retrain and evaluate, as far as a budget of accuracy allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseops._replace import PLAN
from sparseops.prune import Criterion, Plan, Treatment
from sparseops.train.batches import lasting
from sparseops.train.distill import Distiller
from sparseops.train.loggers import Callback
from sparseops.train.loop import PRECISIONS, Loop
from sparseops.train.metrics import Evaluate
from sparseops.train.result import FitResult, Round
from sparseops.train.rounds import Candidate, Course, Snapshot

RAMP = 0.5
"""The share of a round's steps in which a gradual schedule prunes; the rest trains what is left."""

OPTIONS = ("every", "training", "decay", "example_inputs")
"""Of Pruner, which are handed on as they are."""


def fit_sparse(  # noqa: PLR0913
    model: nn.Module,
    plan: Treatment | Plan | Mapping[str, Tensor],
    train: Callable[..., Any],
    evaluate: Evaluate,
    *,
    batches: Iterable[Any] | None = None,
    max_drop: float | Mapping[str, float] = 0.01,
    rounds: int = 3,
    steps: int | None = None,
    criterion: str | Criterion = "l1",
    schedule: str | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    loss_weights: Mapping[str, float] | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    lr_schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None,
    distill: Distiller | None = None,
    precision: str | None = None,
    clip: float | None = None,
    recalibrate: Iterable[Any] | None = None,
    evaluate_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int | None = None,
    inplace: bool = False,
    **options: Any,
) -> FitResult:
    """The model pruned by ``plan`` and retrained, with no more than ``max_drop`` lost::

        def train(model, batch):
            x, y = batch
            return F.cross_entropy(model(x), y)

        result = fit_sparse(model, "2:4", train, accuracy, batches=loader, max_drop=0.01)
        result.print()
        sparse = convert(result.model, prune=None)

    A round prunes, retrains and evaluates. The first carries out the whole plan. While a metric falls by more
    than its budget, the next one takes the strength half-way between the largest that was within the budget
    (0, the dense model, at first) and the smallest that was not, and begins with the weights of that largest
    one. The result is the model of the largest strength within the budget, at its best evaluation: the one
    whose worst task has most of its budget left. If no round is within, it is the one that is least over
    it, ``within_budget`` is False, and a warning says so.

    Args:
        model: is not changed, unless ``inplace``, and never on an error.
        plan: as of ``Pruner``.
        train: with ``batches``, (model, batch) -> loss, a scalar tensor or a mapping of such by name, which
            are summed; the loop is ours. Without, (model, pruner) -> None or losses to note, a loop of yours
            that calls ``pruner.step()`` after each optimizer step.
        evaluate: model -> a metric, or a mapping of such by task; the higher the better. The model is in
            evaluation mode, without gradients.
        batches: gone through again whenever they end.
        max_drop: by how much a metric may fall below that of the dense model (a difference), for all tasks or
            by task; infinity for no limit.
        rounds: at most so many.
        steps: optimizer steps of a round. Default: one pass over ``batches``. With a loop of yours, the calls
            of ``pruner.step()`` until a gradual schedule is over.
        criterion, calibration, loss: as of ``Pruner``.
        schedule: as of ``Pruner``; gradual ones end after half of the steps. None: "cubic" where steps are
            known, else "oneshot".
        loss_weights: factors of named losses; 1 where there is none.
        optimizer: parameters -> optimizer, made anew in each round. Default: AdamW with learning rate 1e-3.
        lr_schedule: (optimizer, steps) -> a scheduler of torch, stepped after each optimizer step. Default:
            the learning rate stays.
        distill: mixes the loss with that of a teacher.
        precision: "bf16" or "fp16" for torch.autocast (with torch.amp.GradScaler for "fp16"), None for the
            model's own.
        clip: the largest norm of all gradients.
        recalibrate: batches for ``recalibrate``, run after pruning, before retraining.
        evaluate_every: steps between evaluations once all is pruned, of which the best counts. Default: one
            evaluation at the end of a round.
        callbacks: hear of each step, round and evaluation (``train.loggers``).
        seed: of torch's random numbers; those outside go on as if nothing had been drawn. None: they are
            drawn from.
        inplace: the given model takes the result's weights.
        options: further ones of ``Pruner``: every, training, decay, example_inputs.

    Raises:
        TypeError: an argument, or what a function returned, is of the wrong type.
        ValueError: an argument has a value that it must not have; a metric or loss is not finite;
            ``pruner.step()`` was not called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fit_sparse: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in (("rounds", rounds), ("steps", steps), ("evaluate_every", evaluate_every)):
        if name == "rounds" or value is not None:
            _check_count(name, value)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(f"fit_sparse: callbacks must be of train.loggers.Callback, got {callback!r}")
    if unknown := options.keys() - set(OPTIONS):
        raise TypeError(
            f"fit_sparse: options of Pruner must be of {', '.join(OPTIONS)}, got {', '.join(sorted(unknown))}"
        )
    if isinstance(plan, Mapping) and rounds > 1:
        raise ValueError(
            f"fit_sparse: rounds must be 1 with masks as plan, which have no strength, got {rounds}"
        )
    loop = None
    if batches is not None:
        loop = Loop(
            train,
            batches,
            _steps_of(batches, steps),
            optimizer,
            lr_schedule,
            loss_weights,
            distill,
            precision,
            clip,
        )
        _check_loop(loop)
    else:
        _check_no_loop(
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            loss_weights=loss_weights,
            distill=distill,
            precision=precision,
            clip=clip,
            evaluate_every=evaluate_every,
        )
    known = steps if loop is None else max(1, int(RAMP * loop.steps))
    if schedule is None:
        schedule = "oneshot" if known is None or isinstance(plan, Mapping) else "cubic"
    if known is None and schedule != "oneshot":
        raise ValueError(
            f"fit_sparse: steps must be given with schedule {schedule!r} and a loop of yours, got None"
        )
    options |= {"criterion": criterion, "schedule": schedule, "steps": known or 1}
    options |= {"calibration": lasting(calibration), "loss": loss}
    again = lasting(recalibrate)
    course = Course(model, plan, train, evaluate, loop, options, again, evaluate_every, callbacks)
    said = {"plan": repr(plan), "rounds": rounds, "steps": known if loop is None else loop.steps}
    said |= {"criterion": str(criterion), "schedule": schedule, "max_drop": str(max_drop)}
    result = None
    try:
        with _seeded(seed, model):
            for callback in callbacks:
                callback.on_start(said)
            course.begin(max_drop)
            chosen, history = _search(course, rounds)
        result = _finish(course, chosen, history, inplace)
    finally:
        for callback in callbacks:
            callback.on_end(result)
    return result


def _search(course: Course, rounds: int) -> tuple[Candidate, list[Round]]:
    """The best of all rounds, and their records."""
    history: list[Round] = []
    good: Candidate | None = None
    least_bad: Candidate | None = None
    strength = too_much = 1.0
    for place in range(1, rounds + 1):
        best, record = course.round(place, strength, good)
        history.append(record)
        if best.within:
            good = best
            if strength == 1.0:
                break
        else:
            too_much = strength
            if least_bad is None or best.rank < least_bad.rank:
                least_bad = best
        strength = ((good.strength if good is not None else 0.0) + too_much) / 2
    chosen = good or least_bad
    assert chosen is not None
    return chosen, history


def _finish(course: Course, chosen: Candidate, history: Sequence[Round], inplace: bool) -> FitResult:
    chosen.restore()
    sparsity, report = chosen.pruner.sparsity, chosen.pruner.report()
    final = chosen.pruner.finalize()
    final.zero_grad(set_to_none=True)
    for mine, given in zip(final.modules(), course.model.modules(), strict=True):
        mine.training = given.training
    if not chosen.within:
        drops = (f"{task} by {course.dense[task] - value:.4g}" for task, value in chosen.metrics.items())
        allowed = ", ".join(f"{task} {drop:g}" for task, drop in course.budgets.items())
        warnings.warn(
            f"fit_sparse: no round is within max_drop ({allowed}); the result, of strength "
            f"{chosen.strength:g}, is the least that is over it: {', '.join(drops)} (more rounds or "
            "steps, or a milder plan)",
            stacklevel=3,
        )
    elif not sparsity:
        warnings.warn(
            f"fit_sparse: strength {chosen.strength:g} of the plan prunes nothing, the result is dense",
            stacklevel=3,
        )
    if inplace:
        Snapshot.of(final).load(course.model)
        setattr(course.model, PLAN, getattr(final, PLAN))
        final = course.model
    return FitResult(
        model=final,
        plan=course.plan,
        strength=chosen.strength,
        sparsity=sparsity,
        within_budget=chosen.within,
        max_drop=course.budgets,
        dense=course.dense,
        metrics=chosen.metrics,
        stage=chosen.stage,
        history=tuple(history),
        round=chosen.round,
        report=report,
    )


@contextmanager
def _seeded(seed: int | None, model: nn.Module) -> Iterator[None]:
    """torch's random numbers begin at ``seed``, and go on afterwards where they were."""
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with torch.random.fork_rng(list(devices), enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _steps_of(batches: Iterable[Any], steps: int | None) -> int:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"fit_sparse: batches must be an iterable of batches (a list, a DataLoader), "
            f"got {type(batches).__name__}"
        )
    if steps is not None:
        return steps
    if not isinstance(batches, Sized):
        raise ValueError(
            f"fit_sparse: steps must be given with batches of unknown number, got None with a "
            f"{type(batches).__name__}"
        )
    if not len(batches):
        raise ValueError("fit_sparse: batches must hold at least one batch, got none")
    return len(batches)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"fit_sparse: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"fit_sparse: {name} must be at least 1, got {value}")


def _check_loop(loop: Loop) -> None:
    if loop.precision is not None and loop.precision not in PRECISIONS:
        words = ", ".join(f'"{word}"' for word in PRECISIONS)
        raise ValueError(f"fit_sparse: precision must be one of {words}, None, got {loop.precision!r}")
    if loop.clip is not None and not loop.clip > 0:
        raise ValueError(f"fit_sparse: clip must be greater than 0, got {loop.clip}")
    if loop.distill is not None and not isinstance(loop.distill, Distiller):
        raise TypeError(f"fit_sparse: distill must be a Distiller, got {type(loop.distill).__name__}")


def _check_no_loop(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"fit_sparse: {name} must be None without batches, where train has a loop of its own, "
                f"got {value!r}"
            )
