"""What batches of data tell about the weights of a model, for criteria that look at more than the weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from sparseops import _measure
from sparseops.train.batches import Batch, batches_for
from sparseops.train.inputs import columns_of, inputs_of, squares_of
from sparseops.train.metrics import evaluating
from sparseops.train.shards import is_shared
from sparseops.train.targets import Target, unwrapped

Evidence = dict[str, dict[str, Tensor]]
"""What was found out about each weight, by the names of the parameter and of the finding."""

BY_GRADIENT = frozenset({"gradient", "movement"})
BY_INPUTS = frozenset({"inputs", "hessian"})
NEEDS = (*sorted(BY_GRADIENT), *sorted(BY_INPUTS), "scale")

# The layers whose inputs are known; of an embedding they are numbers of rows, and a matrix of them is none.
_READERS = {
    "inputs": (nn.Linear, _ConvNd, nn.RNNBase, nn.Embedding),
    "hessian": (nn.Linear, _ConvNd, nn.RNNBase),
}


@torch.inference_mode(False)
def collect(  # noqa: PLR0913
    model: nn.Module,
    targets: Sequence[Target],
    needs: Collection[str] | Mapping[str, Collection[str]],
    batches: Iterable[Any],
    loss: Callable[..., Tensor] | None = None,
    *,
    caller: str = "Pruner",
) -> Evidence:
    """Run the model on ``batches`` and note what is needed of each weight, in float32 on the weight's device
    (float64 for a float64 weight):

    - "gradient": root of the mean over batches of the squared derivative of the loss, the weight's shape.
    - "movement": minus the sum over batches of weight times derivative, the weight's shape.
    - "inputs": the Euclidean norm, over all batches, samples and positions, of the input that each weight is
      multiplied by, expanded to the weight's shape; of an embedding the root of each row's count.
    - "hessian": the mean of x x^T over the inputs x of all output positions, [groups, K, K] with K = taps *
      channels of a group, the channels fastest: what ``sparsegpt`` takes.
    - "scale": the magnitude of gamma in the batch norm that reads the layer's output as it is, expanded to
      the weight's shape; missing where there is no such batch norm.

    The model runs in evaluation mode; activations are not kept. Afterwards its training flags, buffers,
    ``.grad`` and ``requires_grad`` and the random numbers are what they were, on an error too. In a
    distributed program every rank calls this with batches of its own, and all get what all batches tell.

    Args:
        model: holds the weights; under ``DistributedDataParallel`` the wrapped module runs.
        targets: the weights.
        needs: what is needed of all weights, or of each by its name.
        batches: an iterable of x, (x, y) or mappings of keyword arguments; moved to the model's device.
        loss: (output, y) -> one number, (output) -> one number for batches without y. None for what the model
            itself gives as ``output.loss``.
        caller: the function or class that a user called, which errors begin with.

    Raises:
        TypeError: ``batches`` is no iterable of batches, or the loss no tensor of one element.
        ValueError: there is no batch; a loss is missing, not finite, or does not depend on the weights; a
            layer is of a kind whose inputs are not known, or no batch reaches it.
    """
    model = unwrapped(model)
    by_name = needs if isinstance(needs, Mapping) else {target.name: needs for target in targets}
    tallies = [_Tally(target, frozenset(by_name.get(target.name, ())), caller) for target in targets]
    judged = [tally for tally in tallies if tally.needs & BY_GRADIENT]
    done = 0
    with (
        _undisturbed(model, [tally.target.weight for tally in judged]),
        _measure.progress("calibrating", length_hint(batches) or None) as advance,
        ExitStack() as stack,
    ):
        for handle in _watch(model, tallies):
            stack.callback(handle.remove)
        for batch in batches_for(model, batches, caller=caller, argument="calibration"):
            output = _measure.run(model, batch.inputs)
            if judged:
                _differentiate(_loss_of(output, batch, loss, done, caller), judged, caller)
            done += 1
            advance()
    done = _join(tallies, done)
    return {tally.target.name: tally.evidence(done, caller) for tally in tallies}


@contextmanager
def _undisturbed(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """The model ready to be run, with derivatives by ``weights`` if there are any; afterwards as it was."""
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    # The run has copies of them to write to, one of each that several modules hold.
    copies = {id(buffer): buffer.clone() for *_, buffer in buffers}
    frozen = [weight for weight in weights if not weight.requires_grad]
    recurrent = [its for its in model.modules() if isinstance(its, nn.RNNBase) and weights]
    dropout = [its.dropout for its in recurrent]
    # The fused kernels of torch's transformer layers read weights without calling the layers.
    is_fast = torch.backends.mha.get_fastpath_enabled()
    with (
        evaluating(model),
        torch.random.fork_rng(),
        torch.set_grad_enabled(bool(weights)),
    ):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, name, buffer in buffers:
                module._buffers[name] = copies[id(buffer)]
            for weight in frozen:
                weight.requires_grad_(True)
            for its in recurrent:
                # cuDNN differentiates them in training mode alone.
                its.training, its.dropout = True, 0.0
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(is_fast)
            for weight in frozen:
                weight.requires_grad_(False)
            for its, share in zip(recurrent, dropout, strict=True):
                its.training, its.dropout = False, share
            for module, name, buffer in buffers:
                module._buffers[name] = buffer


class _Tally:
    """What is added up about one weight.

    sums: by what is needed. calls: of the layer. tokens: inputs in the sum of their products. scale: |gamma|.
    logical: the shape [O, C, *taps] of the weight.
    """

    def __init__(self, target: Target, needs: frozenset[str], caller: str) -> None:
        for need in sorted(needs):
            if need not in NEEDS:
                raise ValueError(f"{caller}: needs must be among {', '.join(NEEDS)}, got {need!r}")
        self.target, self.needs = target, needs
        self.layer: Any = target.layer.module
        self.calls = self.tokens = 0
        self.scale: Tensor | None = None
        self._check(caller)
        weight = target.weight
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(needs & BY_GRADIENT, tuple(weight.shape))
        self.logical = target.logical(torch.empty(weight.shape, device="meta")).shape
        if "inputs" in needs:
            inputs = len(weight) if isinstance(self.layer, nn.Embedding) else self.logical[1] * target.groups
            shapes["inputs"] = (inputs, *self.logical[2:])
        if "hessian" in needs:
            columns = self.logical[1:].numel()
            shapes["hessian"] = (target.groups, columns, columns)
        self.sums = {
            need: torch.zeros(shape, dtype=self.dtype, device=weight.device) for need, shape in shapes.items()
        }

    def _check(self, caller: str) -> None:
        """ValueError where the layer is of a kind of which what is needed cannot be known."""
        name, kind = self.target.name, type(self.layer).__name__
        for need, kinds in _READERS.items():
            if need in self.needs and not isinstance(self.layer, kinds):
                raise ValueError(
                    f'{caller}: {name} must be the weight of a layer whose inputs are known for "{need}", '
                    f"got one of {kind} (leave it out of the plan, or use a criterion that needs no inputs)"
                )
        if self.needs & BY_GRADIENT and hasattr(self.target.weight, "placements"):
            raise ValueError(
                f"{caller}: {name} must lie on one device as a whole for its derivative, got a "
                f"{type(self.target.weight).__name__} (prune before fully_shard, or use a criterion that "
                "needs no gradient)"
            )

    def add(self, x: Tensor, output: Any) -> None:
        """Count what the weight is multiplied by in one call of the layer."""
        self.calls += 1
        if isinstance(self.layer, nn.Embedding):
            self.sums["inputs"] += torch.bincount(x.flatten(), minlength=self.layer.num_embeddings)
            return
        x = x.to(self.dtype)
        if "inputs" in self.needs:
            self.sums["inputs"] += squares_of(self.layer, x, output)
        if "hessian" in self.needs:
            for columns in columns_of(self.layer, x, output):
                self.sums["hessian"].baddbmm_(columns, columns.transpose(1, 2))
                self.tokens += columns.shape[2]

    def differentiate(self, gradient: Tensor | None) -> None:
        """Count the derivative of one batch's loss by the weight; None where the batch does not use it."""
        if gradient is None:
            return
        if not self.needs & BY_INPUTS:
            self.calls += 1
        gradient = gradient.to(self.dtype)
        if "gradient" in self.needs:
            self.sums["gradient"] += gradient.square()
        if "movement" in self.needs:
            self.sums["movement"] -= self.target.weight.detach() * gradient

    def evidence(self, batches: int, caller: str) -> dict[str, Tensor]:
        """What the sums over ``batches`` come to.

        Raises:
            ValueError: no batch reached the layer.
        """
        if not self.calls and self.needs & (BY_GRADIENT | BY_INPUTS):
            raise ValueError(
                f"{caller}: calibration must reach every layer that is pruned, got no batch that calls the "
                f"one of {self.target.name} (leave it out of the plan, or give batches that use it)"
            )
        found = dict(self.sums)
        if "gradient" in found:
            found["gradient"] = (found["gradient"] / batches).sqrt()
        if "hessian" in found:
            found["hessian"] = found["hessian"] / max(1, self.tokens)
        if "inputs" in found:
            found["inputs"] = self._spread(found["inputs"].sqrt())
        if self.scale is not None:
            column = self.scale.view(-1, *(1,) * (len(self.logical) - 1))
            found["scale"] = self.target.physical(column.expand(self.logical))
        return found

    def _spread(self, norms: Tensor) -> Tensor:
        """Norms of inputs, each at the weights that multiply it."""
        shape = self.target.weight.shape
        if isinstance(self.layer, nn.Embedding) or getattr(self.layer, "transposed", False):
            return norms.unsqueeze(1).expand(shape)
        by_group = norms.unflatten(0, (self.target.groups, 1, -1))
        rows = shape[0] // self.target.groups
        return by_group.expand(-1, rows, *by_group.shape[2:]).flatten(0, 1)


def _differentiate(value: Tensor, tallies: list[_Tally], caller: str) -> None:
    weights = [tally.target.weight for tally in tallies]
    if not value.requires_grad:
        raise ValueError(
            f"{caller}: loss must depend on the weights, got one without a gradient (is it detached, or made "
            "under no_grad?)"
        )
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    for tally, gradient in zip(tallies, gradients, strict=True):
        tally.differentiate(gradient)


def _loss_of(
    output: Any, batch: Batch, loss: Callable[..., Tensor] | None, number: int, caller: str
) -> Tensor:
    """The loss of a batch, a finite tensor of one element."""
    value: Any
    if loss is not None:
        value = loss(output) if batch.target is None else loss(output, batch.target)
    else:
        value = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if value is None:
            raise ValueError(
                f"{caller}: loss must be given with a criterion that needs gradients where the model's "
                "output has no .loss, got None"
            )
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{caller}: loss must give a tensor of one element, got {got}")
    if not value.isfinite():
        raise ValueError(f"{caller}: loss must be finite, got {value.item()} for batch {number}")
    return value.reshape(())


def _join(tallies: Sequence[_Tally], batches: int) -> int:
    """The number of batches; where several processes work on it, that and all sums are those of all."""
    if not tallies or not is_shared():
        return batches
    counts = [batches, *(count for tally in tallies for count in (tally.calls, tally.tokens))]
    joined = torch.tensor(counts, device=tallies[0].target.weight.device)
    distributed.all_reduce(joined)
    total, *others = joined.tolist()
    for tally in tallies:
        tally.calls, tally.tokens, *others = others
        for need in sorted(tally.sums):
            distributed.all_reduce(tally.sums[need])
    return int(total)


# Hooks


def _watch(model: nn.Module, tallies: Sequence[_Tally]) -> Iterator[RemovableHandle]:
    """Hooks that tell the tallies what they need."""
    by_module: dict[nn.Module, list[_Tally]] = {}
    scaled: dict[nn.Module, list[_Tally]] = {}
    for tally in tallies:
        if tally.needs & BY_INPUTS:
            by_module.setdefault(tally.layer, []).append(tally)
        if "scale" in tally.needs and isinstance(tally.layer, (nn.Linear, _ConvNd)):
            scaled.setdefault(tally.layer, []).append(tally)
    for module, its in by_module.items():
        readers = {tally.target.parameter: tally for tally in its}
        yield module.register_forward_hook(partial(_note_inputs, readers), with_kwargs=True)
    if scaled:
        made: dict[StorageWeakRef, tuple[Any, list[_Tally]]] = {}
        for module, its in scaled.items():
            yield module.register_forward_hook(partial(_note_output, made, its))
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.weight is not None:
                yield module.register_forward_pre_hook(partial(_note_scale, made))


@torch.no_grad()
def _note_inputs(
    readers: dict[str, _Tally], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    device = next(iter(readers.values())).target.weight.device
    with torch.autocast(device.type, enabled=False):
        for name, x in inputs_of(layer, args, kwargs):
            if name in readers:
                readers[name].add(x, output)


def _note_output(
    made: dict[StorageWeakRef, tuple[Any, list[_Tally]]],
    tallies: list[_Tally],
    layer: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> None:
    dims = len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0
    # Weak, so that no activation is kept, and the memory of one that is gone is not taken for it.
    made[StorageWeakRef(output.untyped_storage())] = _channels(output, output.ndim - 1 - dims), tallies


def _note_scale(
    made: dict[StorageWeakRef, tuple[Any, list[_Tally]]], norm: _BatchNorm, args: tuple[Any, ...]
) -> None:
    if not args:
        return
    channels, tallies = made.get(StorageWeakRef(args[0].untyped_storage()), (None, []))
    if channels == _channels(args[0], 1):
        for tally in tallies:
            tally.scale = norm.weight.detach().abs().to(tally.dtype)


def _channels(x: Tensor, dim: int) -> tuple[Any, ...]:
    """How the channels lie in memory, and how often that was written: what is the same in a view of the
    tensor that has the same channels, and no longer where something was added in place."""
    return x._version, x.shape[dim], x.stride(dim)
