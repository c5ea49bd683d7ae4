"""``Distiller``: a pruned model learns from the dense one that it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseops import _measure
from sparseops.train.metrics import evaluating

Feature: TypeAlias = "str | tuple[str, str]"
"""A module by its name in student and teacher, or by the pair of names where they differ."""


class Distiller:
    """The loss of a student that shall give what its teacher gives::

        distiller = Distiller(dense_model, features=["layer3"])
        output, loss = distiller(student, x)
        distiller.mix(F.cross_entropy(output, y), loss).backward()

    ``fit_sparse`` takes one as ``distill``. The loss is T^2 KL(softmax(teacher / T) || softmax(student / T)),
    averaged over samples and positions (Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural
    network", section 2; T^2 keeps the gradient's size), and for each feature the mean squared difference over
    the mean square of the teacher's (hints after Romero et al. 2015, "FitNets"). It is computed in float32.

    The teacher is not copied, and not changed: it runs in evaluation mode without gradients, on the very
    inputs that the student got, and under the same autocast.

    Args:
        teacher: a model that is called as the student is.
        temperature: T; None for a loss of features alone.
        alpha: share of this loss in what ``mix`` gives, in [0, 1].
        features: names of modules, or pairs (in the student, in the teacher); as a mapping, each with its
            weight in the sum, else 1. The first tensor of a module's output counts.
        logits: function output -> logits, one tensor or several heads (a mapping, tuple or list), whose
            losses are summed. By default the output itself, or its ``logits`` if it has such.
        dim: where the classes lie in logits; None for the last dimension, but 1 of logits with four or more
            ([N, classes, H, W], as cross_entropy has them).

    Raises:
        TypeError: the teacher is no module.
        ValueError: temperature or alpha is out of range, a feature is no module of the teacher, or neither
            temperature nor features are given.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float | None = 4.0,
        alpha: float = 0.5,
        features: Mapping[Feature, float] | Iterable[Feature] | None = None,
        logits: Callable[[Any], Any] | None = None,
        dim: int | None = None,
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"Distiller: teacher must be a torch.nn.Module, got {type(teacher).__name__}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"Distiller: temperature must be greater than 0, got {temperature}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"Distiller: alpha must be in [0, 1], got {alpha}")
        if isinstance(features, str):
            raise TypeError(f"Distiller: features must be a list of module names, got {features!r}")
        self.teacher = teacher
        self.temperature = temperature
        self.alpha = alpha
        self.features = dict(
            features if isinstance(features, Mapping) else dict.fromkeys(features or (), 1.0)
        )
        self.logits = logits
        self.dim = dim
        if temperature is None and not self.features:
            raise ValueError("Distiller: features must be given with temperature=None, got none")
        self._find(teacher, 1)

    def __call__(self, student: nn.Module, x: Any) -> tuple[Any, Tensor]:
        """The student's output on ``x`` and the loss, a scalar. x: the one argument, a tuple of arguments, or
        a dict of keyword arguments.

        Raises:
            ValueError: a feature is no module of the student, or is not called as often as in the teacher;
                or logits or a feature differ in shape.
        """
        inputs = _measure.Inputs.of(x, "Distiller")
        with self.watch(student) as loss:
            output = student(*inputs.args, **inputs.kwargs)
            return output, loss()

    def mix(self, task_loss: Tensor, loss: Tensor) -> Tensor:
        """(1 - alpha) task_loss + alpha loss."""
        return (1 - self.alpha) * task_loss + self.alpha * loss

    @contextmanager
    def watch(self, student: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """For code that calls the student by itself: the teacher follows each of its calls with gradients;
        yields a function that gives the mean of their losses so far.

        Raises:
            ValueError: as a call does; or the student is the teacher. The function: there was no call.
        """
        if student is self.teacher:
            raise ValueError(
                "Distiller: student must be another model than the teacher, got the same "
                "(copy.deepcopy(model) makes a teacher that stays)"
            )
        losses: list[Tensor] = []
        modules = self._find(student, 0)
        answers: list[tuple[Any, dict[Feature, list[Tensor]]]] = []
        seen: dict[Feature, list[Tensor]] = {}

        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.clear()
            # Before the student, which may change its inputs in place.
            answers[:] = [self._teach(args, kwargs)] if torch.is_grad_enabled() else []

        def after_forward(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for answer, known in answers:
                losses.append(self._loss(output, seen, answer, known))
            answers.clear()

        def loss() -> Tensor:
            if not losses:
                raise ValueError(
                    "Distiller: student must be called (by its own forward, with gradients) where it is "
                    "watched, got no call"
                )
            return torch.stack(losses).mean()

        handles = [
            student.register_forward_pre_hook(before_forward, with_kwargs=True),
            student.register_forward_hook(after_forward, with_kwargs=True),
        ]
        try:
            with _tapped(modules, seen):
                yield loss
        finally:
            for handle in handles:
                handle.remove()

    def _find(self, model: nn.Module, side: int) -> dict[Feature, nn.Module]:
        """The modules of the features. side: 0 for the student's, 1 for the teacher's."""
        modules = dict(model.named_modules())
        found = {}
        for feature in self.features:
            name = feature if isinstance(feature, str) else feature[side]
            if name not in modules:
                who = ("student", "teacher")[side]
                raise ValueError(f"Distiller: features must name modules of the {who}, got {name!r}")
            found[feature] = modules[name]
        return found

    def _teach(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[Feature, list[Tensor]]]:
        known: dict[Feature, list[Tensor]] = {}
        # Not inference_mode, whose tensors backward cannot save.
        with torch.no_grad(), evaluating(self.teacher), _tapped(self._find(self.teacher, 1), known):
            return self.teacher(*args, **kwargs), known

    def _loss(
        self, output: Any, seen: dict[Feature, list[Tensor]], answer: Any, known: dict[Feature, list[Tensor]]
    ) -> Tensor:
        terms = []
        if self.temperature is not None:
            ours, theirs = self._heads(output), self._heads(answer)
            if ours.keys() != theirs.keys():
                raise ValueError(
                    f"Distiller: logits of the student must have the teacher's heads, {sorted(theirs)}, "
                    f"got {sorted(ours)}"
                )
            for head in theirs:
                _check_shapes("logits" + (f" {head!r}" if head else ""), ours[head], theirs[head])
                terms.append(
                    _divergence(ours[head].float(), theirs[head].float(), self.temperature, self.dim)
                )
        for feature, weight in self.features.items():
            mine, its = seen.get(feature, []), known.get(feature, [])
            if len(mine) != len(its) or not its:
                raise ValueError(
                    f"Distiller: feature {feature!r} must be called as often in the student as in the "
                    f"teacher, and at least once, got {len(mine)} calls for {len(its)}"
                )
            for found, expected in zip(mine, its, strict=True):
                _check_shapes(f"feature {feature!r}", found, expected)
                terms.append(weight / len(its) * _relative_error(found.float(), expected.float()))
        return torch.stack(terms).sum()

    def _heads(self, output: Any) -> Mapping[str, Tensor]:
        found = self.logits(output) if self.logits is not None else _logits_of(output)
        if isinstance(found, Tensor):
            return {"": found}
        if isinstance(found, (list, tuple)):
            found = {str(place): head for place, head in enumerate(found)}
        if isinstance(found, Mapping) and found and all(isinstance(head, Tensor) for head in found.values()):
            return {str(name): head for name, head in found.items()}
        raise TypeError(
            "Distiller: logits must be a tensor, or a mapping, tuple or list of some, "
            f"got {type(found).__name__} (logits=function finds them in the output)"
        )


@contextmanager
def _tapped(
    modules: Mapping[Feature, nn.Module], outputs: dict[Feature, list[Tensor]]
) -> Iterator[dict[Feature, list[Tensor]]]:
    """The first tensors of the modules' outputs, call by call, land in ``outputs``."""

    def tap(feature: Feature) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _measure.tensors(output):
                outputs.setdefault(feature, []).append(tensor)
                return

        return after_forward

    handles = [module.register_forward_hook(tap(feature)) for feature, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _logits_of(output: Any) -> Any:
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


def _check_shapes(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise ValueError(
            f"Distiller: {what} of the student must have the teacher's shape, {tuple(expected.shape)}, "
            f"got {tuple(found.shape)} (distil before channels are removed)"
        )


def _divergence(found: Tensor, expected: Tensor, temperature: float, dim: int | None) -> Tensor:
    if dim is None:
        dim = 1 if found.dim() >= 4 else -1
    ours, theirs = F.log_softmax(found / temperature, dim), F.log_softmax(expected / temperature, dim)
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim)
    return temperature**2 * divergence.mean()


def _relative_error(found: Tensor, expected: Tensor) -> Tensor:
    # A layer that gives nothing but zeros has no scale.
    scale = expected.square().mean().clamp_min(torch.finfo(expected.dtype).tiny)
    return F.mse_loss(found, expected) / scale
