"""``Pruner``: makes a model sparse while it is trained, and keeps its zeros zero."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparseops._measure import Inputs
from sparseops._replace import PLAN
from sparseops._select import last_layers, meeting
from sparseops.prune import CRITERIA, Channels, Criterion, Plan, Treatment
from sparseops.prune.criteria import check_criterion
from sparseops.train import shards
from sparseops.train.batches import batches_for, lasting
from sparseops.train.calibration import collect
from sparseops.train.given import fixed_targets
from sparseops.train.masks import Judgement, Masks, choose_masks
from sparseops.train.options import SCHEDULES, check_options, check_plan, check_sparsegpt
from sparseops.train.record import recorded_plan
from sparseops.train.report import PruneReport, PruneRow
from sparseops.train.strength import weaken
from sparseops.train.targets import Left, Target, find_targets, unwrapped
from sparseops.train.zeros import Movement, Zeros

_VERSION = 1
_BATCHES = {
    "gradient": "(x, y), and a loss",
    "movement": "(x, y), and a loss",
    "inputs": "x",
    "hessian": "x",
    "scale": "x, of which one shows which batch norm follows which layer",
}
# Which pruner a weight has; no weight has two.
_pruners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Pruner:
    """Zeros in the weights of a model, in the patterns of a plan, kept while it is trained::

        pruner = Pruner(model, "2:4")
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        model = convert(pruner.finalize(), prune=None)

    The model stays an ordinary one. Its dropped weights are exactly zero once the pruner is made and after
    each ``step()``, whatever the optimizer did to them. "oneshot" prunes when the pruner is made, the other
    schedules as training goes on. Where ``torch.distributed`` is initialised, every process has to make the
    same pruner, of the model as DistributedDataParallel or ``fully_shard`` left it: the masks are the same
    everywhere.

    Args:
        model: changed in place.
        plan: a pattern ("2:4"; "2:4t", which is 2:4 along inputs and outputs; ``Channels``,
            ``Unstructured``, ``Layers``), a ``Plan``, or a mapping of parameter names to bool masks of their
            shape, True for what is kept.
        criterion: what a weight or channel matters, where the pattern does not say: a name of
            ``prune.CRITERIA`` or a function (weight [O, C, ...], dim) -> scores, of each weight where dim is
            None.
        schedule: how the share of the plan that is carried out grows: "oneshot", "linear", "cubic".
        steps: calls of ``step`` until all of it is.
        calibration: batches that criteria learn from: x, (x, y), or a dict of keyword arguments. Run again
            each time that masks are chosen; a generator is read into memory.
        loss: loss(output, y), or loss(output) where there is no y, for criteria of gradients. None: the
            output's own ``.loss``.
        every: steps from one choice of masks to the next while the schedule runs.
        strength: share of the plan, in (0, 1]: ratios and thresholds are multiplied by it, and of the layers
            that are to be 2:4 that share is, those that lose the least.
        training: "fixed": what is dropped stays zero, and its gradient is made zero. "straight-through": the
            dropped weights live on beside the model, take the gradients that they get at zero, and may come
            back (SR-STE; Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks").
        decay: the share that dropped weights shrink by at each step of "straight-through": lambda of the
            paper times the learning rate.
        example_inputs: a tensor, tuple or dict that the model is called with, by which ``Channels`` knows the
            last layer and those that meet; None: the first batch of ``calibration``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that it must not have; the plan names no layer; the criterion
            needs calibration data; the model is converted already; a weight has another pruner.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        plan: Treatment | Plan | Mapping[str, Tensor],
        *,
        criterion: str | Criterion = "l1",
        schedule: str = "oneshot",
        steps: int = 1,
        calibration: Iterable[Any] | None = None,
        loss: Callable[..., Tensor] | None = None,
        every: int = 1,
        strength: float = 1.0,
        training: str = "fixed",
        decay: float = 2e-5,
        example_inputs: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Pruner: model must be a torch.nn.Module, got {type(model).__name__}")
        check_options(schedule, steps, every, strength, training, decay)
        check_criterion(criterion, "Pruner", ())
        model = unwrapped(model)
        targets: list[Target]
        left: list[Left]
        given = plan if isinstance(plan, Mapping) else None
        if given is not None:
            if schedule != "oneshot":
                raise ValueError(f'Pruner: schedule must be "oneshot" with masks as plan, got {schedule!r}')
            targets, left = fixed_targets(model, given), []
        else:
            check_plan(plan)
            targets, left = find_targets(model, plan, "Pruner")  # type: ignore[arg-type]
        for target in targets:
            if (other := _pruners.get(target.weight)) is not None and other() is not None:
                raise ValueError(
                    f"Pruner: plan must not name {target.name}, which another Pruner keeps, got a second one "
                    "(finalize the first)"
                )
        self.model = model
        self.plan = plan
        self.criterion = criterion
        self.schedule, self.steps, self.every = schedule, steps, every
        self.training, self.decay, self.strength = training, decay, strength
        self.loss = loss
        self._calibration = lasting(calibration)
        self._inputs = None if example_inputs is None else Inputs.of(example_inputs, "Pruner")
        self._given = given
        self._check_needs(targets)
        for target in targets:
            if "hessian" in self._needs(target):
                check_sparsegpt(target.layer.treatment, schedule)
        self.count, self.level = 0, 0.0
        self._targets, self._left = targets, left
        self._energy = {target.name: 1.0 for target in targets}
        self._zeros: Zeros | None = None
        self._movement: Movement | None = None
        self._done = False
        judged = None
        if strength < 1.0:
            judged = self._judge()
            self._targets, weak = weaken(targets, strength, judged)
            self._left = left + weak
        first = self._masks_at(1.0, judged) if schedule == "oneshot" else None
        # From here on the model is changed, and nothing can fail any more.
        for target in self._targets:
            _pruners[target.weight] = weakref.ref(self)
        self._zeros = Zeros(self._targets, keeps_dropped=training == "straight-through")
        if schedule != "oneshot" and any("movement" in self._needs(target) for target in self._targets):
            self._movement = Movement(self._targets)
        if first is not None:
            self._take(*first, level=1.0)
        if frozen := [t.name for t in self._targets if not t.weight.requires_grad]:
            warnings.warn(
                f"Pruner: {len(frozen)} frozen weights are pruned too, {frozen[0]} first", stacklevel=2
            )

    # What a training loop calls.

    def step(self) -> None:
        """After each optimizer step: the dropped weights are zero again, and more of them are dropped when
        the schedule says so.

        Raises:
            RuntimeError: the pruner is finalized.
        """
        self._check_alive("step")
        self.count += 1
        if self._movement is not None:
            self._movement.learn()
        self._held.release(self.decay)
        runs = self.schedule != "oneshot" and self.count <= self.steps
        due = self.count % self.every == 0
        if runs and (due or self.count == self.steps):
            level = SCHEDULES[self.schedule](self.count / self.steps)
            self._take(*self._masks_at(level), level=level)
        elif self.training == "straight-through" and due and self._given is None and self.level > 0:
            self._take(*self._masks_at(self.level), level=self.level)
        else:
            self._held.settle()
        if self._movement is not None:
            self._movement.note()

    def prune(self, level: float = 1.0) -> None:
        """Carry out this share of the plan now, whatever the schedule.

        Raises:
            ValueError: level is not in [0, 1], or is below the one that is reached and what is dropped stays.
            RuntimeError: the pruner is finalized.
        """
        self._check_alive("prune")
        if not 0 <= level <= 1:
            raise ValueError(f"Pruner.prune: level must be in [0, 1], got {level}")
        if level < self.level and self.training == "fixed":
            raise ValueError(
                f"Pruner.prune: level must be at least the one that is reached, {self.level:g}, got {level:g}"
            )
        self._held.release(0.0)
        self._take(*self._masks_at(level), level=level)
        if self._movement is not None:
            self._movement.note()

    def follow(self, model: nn.Module) -> None:
        """Keep the zeros of a copy of the model too, such as a moving average of its weights (also the one
        that ``torch.optim.swa_utils.AveragedModel`` wraps): at each ``step``, which then comes after the
        copy's own update.

        Raises:
            ValueError: the copy has no parameter of a pruned weight's name and shape.
        """
        self._check_alive("follow")
        self._held.follow(model)

    def finalize(self) -> nn.Module:
        """The model, an ordinary one with exact zeros, without anything of the pruner's but the plan, which
        ``convert(model, prune=None)`` finds there. A warning says so if the schedule is not over."""
        self._check_alive("finalize")
        self._held.mask()
        if self.level < 1.0:
            warnings.warn(
                f"Pruner.finalize: {self.level:.0%} of the plan is carried out, at step {self.count} of "
                f"{self.steps} (Pruner.prune() carries out the rest)",
                stacklevel=2,
            )
        self._held.close()
        for target in self._targets:
            _pruners.pop(target.weight, None)
        self._movement, self._done = None, True
        setattr(self.model, PLAN, recorded_plan(self._targets, self.masks))
        return self.model

    # What it tells.

    @property
    def masks(self) -> Masks:
        """By a parameter's name, bool of its shape: what is kept. Whole ones, also of a sharded model."""
        return dict(self._held.masks)

    @property
    def sparsity(self) -> float:
        """Share of the elements of all pruned weights that is dropped."""
        total = sum(target.weight.numel() for target in self._targets)
        return sum(int((~mask).sum()) for mask in self._held.masks.values()) / max(total, 1)

    def report(self) -> PruneReport:
        """A row for each layer: what is dropped of it, what that costs, or why nothing is."""
        rows = {}
        for target in self._targets:
            mask = self._held.masks.get(target.name)
            rows[target.name] = PruneRow(
                target.name,
                target.layer.kind,
                tuple(target.weight.shape),
                "given" if self._given is not None else str(target.layer.treatment),
                0.0 if mask is None else float((~mask).sum()) / max(mask.numel(), 1),
                self._energy[target.name],
                target.note,
            )
        left = [
            PruneRow(its.layer.name, its.layer.kind, its.layer.shape, reason=its.reason) for its in self._left
        ]
        return PruneReport(
            [*rows.values(), *left],
            model=type(self.model).__name__,
            criterion="masks" if self._given is not None else self._criterion_name,
            schedule=self.schedule,
            count=self.count,
            steps=self.steps,
            level=self.level,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, to be saved beside the model's and the optimizer's; of a sharded model
        with this process's part of the dropped weights."""
        return {
            "version": _VERSION,
            **self._settings(),
            "count": self.count,
            "level": self.level,
            "energy": dict(self._energy),
            "masks": self.masks,
            "dropped": dict(self._held.dropped),
            "movement": dict(self._movement.sums) if self._movement is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another pruner stopped; the model's own weights are loaded after the pruner is made.

        Raises:
            ValueError: the state is of another plan, criterion or schedule, or of another model.
        """
        self._check_alive("load_state_dict")
        if state.get("version") != _VERSION:
            raise ValueError(
                f"Pruner.load_state_dict: version must be {_VERSION}, got {state.get('version')!r}"
            )
        for name, mine in self._settings().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"Pruner.load_state_dict: {name} must be that of this pruner, {mine!r}, "
                    f"got {state.get(name)!r}"
                )
        masks = state["masks"]
        targets = {target.name: target for target in self._targets}
        for name, mask in masks.items():
            if name not in targets or targets[name].weight.shape != mask.shape:
                raise ValueError(
                    f"Pruner.load_state_dict: masks must be of this model's pruned weights, got {name} "
                    f"of shape {tuple(mask.shape)}"
                )
        self.count, self.level = state["count"], state["level"]
        self._energy = dict(state["energy"])
        self._held.set({name: mask.to(targets[name].weight.device) for name, mask in masks.items()})
        self._held.dropped = {name: _like(targets[name], t) for name, t in state["dropped"].items()}
        self._held.mask()
        if self._movement is not None:
            self._movement.sums = {name: _like(targets[name], t) for name, t in state["movement"].items()}
            self._movement.note()

    # How it does it.

    def _settings(self) -> dict[str, Any]:
        plan: Any = sorted(self._given) if self._given is not None else repr(self.plan)
        names = ("schedule", "steps", "every", "training")
        its = {name: getattr(self, name) for name in ("strength", *names)}
        return {"plan": plan, "criterion": self._criterion_name, **its}

    @property
    def _criterion_name(self) -> str:
        criterion = self.criterion
        if isinstance(criterion, str):
            return criterion
        return getattr(criterion, "__name__", type(criterion).__name__)

    def _needs(self, target: Target) -> set[str]:
        """The evidence that the target's criterion takes."""
        criterion = target.criterion(self.criterion)
        return set(CRITERIA[criterion].needs) if isinstance(criterion, str) else set()

    def _check_needs(self, targets: list[Target]) -> None:
        """Raises ValueError where calibration data is needed and there is none."""
        if self._given is not None or self._calibration is not None:
            return
        learns = {"movement"} if self.schedule != "oneshot" else set()  # as training goes on
        for target in targets:
            for need in self._needs(target) - learns:
                criterion = target.criterion(self.criterion)
                raise ValueError(
                    f'Pruner: calibration must be given with criterion "{criterion}" '
                    f"(an iterable of batches {_BATCHES[need]}), got None"
                )

    def _judge(self) -> Judgement:
        targets = self._targets
        needs = {target.name: self._needs(target) for target in targets}
        evidence: dict[str, dict[str, Any]] = {target.name: {} for target in targets}
        if self._movement is not None:
            for target in targets:
                evidence[target.name]["movement"] = self._movement.whole(target)
                needs[target.name] -= {"movement"}
        if any(needs.values()) and self._calibration is not None:
            for name, its in collect(self.model, targets, needs, self._calibration, self.loss).items():
                evidence[name].update(its)
        inputs = self._inputs
        of_channels = any(isinstance(target.layer.treatment, Channels) for target in targets)
        if inputs is None and self._calibration is not None and of_channels:
            first = next(batches_for(self.model, self._calibration, caller="Pruner", argument="calibration"))
            inputs = first.inputs
        layers = {id(target.layer.module): target.layer for target in targets}
        places = {id(module): place for place, module in enumerate(self.model.modules())}
        everything = [*(its.layer for its in targets), *(its.layer for its in self._left)]
        everything.sort(key=lambda layer: places[id(layer.module)])
        return Judgement(
            {target.name: shards.whole(target.weight) for target in targets},
            evidence,
            self.criterion,
            self.masks if self._zeros is not None and self.training == "fixed" else {},
            last_layers(self.model, everything, inputs),
            meeting(self.model, layers, inputs, "Pruner"),
        )

    def _masks_at(self, level: float, judged: Judgement | None = None) -> tuple[Masks, Masks]:
        if self._given is not None:
            masks = {t.name: self._given[t.name].to(t.weight.device) for t in self._targets}
            return masks, {}
        with torch.no_grad():
            masks, updated = choose_masks(self._targets, judged or self._judge(), level)
        return shards.agreed(masks), updated

    def _take(self, masks: Masks, updated: Masks, *, level: float) -> None:
        """New masks, and with some criteria new values of what they keep."""
        for target in self._targets:
            weight = shards.whole(target.weight)
            self._energy[target.name] *= _energy_share(weight, masks[target.name])
            if target.name in updated:
                shards.assign(target.weight, updated[target.name])
        self.level = level
        self._held.set(masks)
        self._held.settle()

    @property
    def _held(self) -> Zeros:
        assert self._zeros is not None
        return self._zeros

    def _check_alive(self, method: str) -> None:
        if self._done:
            raise RuntimeError(f"Pruner.{method}: pruner must not be finalized, got one that is")


def _like(target: Target, t: Tensor) -> Tensor:
    """A loaded tensor as this process's part of a weight, in memory of its own."""
    weight = shards.local(target.weight)
    return t.to(weight.device, weight.dtype, copy=True)


def _energy_share(weight: Tensor, mask: Tensor) -> float:
    """Of the squared finite weight, what the mask keeps."""
    squares = weight.detach().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square()
    total = float(squares.sum())
    return float((squares * mask).sum()) / total if total else 1.0
