"""One direction of one recurrent layer, from its first step to its last: over sequences of equal or of
different lengths, with 2:4 or dense weights, and in closed form for hidden units without weights.

The equations and the order of the gates (LSTM i, f, g, o; GRU r, z, n) are those of ``torch.nn.LSTM`` and
``torch.nn.GRU``. A *state* is what a step hands to the next one: (h, c) of an LSTM, (h,) of a GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops.ops import registry
from sparseops.ops.nm24_linear import nm24_linear

State: TypeAlias = "tuple[Tensor, ...]"

GATES = {"LSTM": 4, "GRU": 3}
"""Rows of the weights per hidden unit, by kind of cell."""

STATES = {"LSTM": 2, "GRU": 1}
"""Tensors of a state, by kind of cell."""


class Padded:
    """Sequences of one length: tensors are [steps, sequences, features]."""

    batch_sizes = None

    def __init__(self, x: Tensor) -> None:
        self.steps, self.batch = x.shape[:2]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """One tensor [sequences that are still running, features] per step."""
        return x.unbind(0)

    def join(self, steps: list[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        return torch.stack(steps)

    def flip(self, x: Tensor) -> Tensor:
        """Each sequence backwards."""
        return x.flip(0)

    def last(self, y: Tensor) -> Tensor:
        """The last element of each sequence, [sequences, features]."""
        return y[-1]

    def count(self, like: Tensor) -> Tensor:
        """The number of the step (from 1) of each element, to be broadcast over ``like``'s features."""
        return torch.arange(1, self.steps + 1, device=like.device, dtype=like.dtype).view(-1, 1, 1)

    def spread(self, state: Tensor) -> Tensor:
        """A tensor [sequences, features], to be broadcast over the elements of each sequence."""
        return state


class Packed:
    """Sequences of different lengths, longest first, as in a ``PackedSequence``: tensors are [elements,
    features], all first elements, then all second ones, and so on.

    batch_sizes: int64 on the CPU, how many sequences have an element at each step.
    """

    def __init__(self, batch_sizes: Tensor) -> None:
        self.batch_sizes = batch_sizes
        self.sizes: list[int] = batch_sizes.tolist()
        self.batch = self.sizes[0]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """One tensor [sequences that are still running, features] per step."""
        return x.split(self.sizes)

    def join(self, steps: list[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        return torch.cat(steps)

    @cached_property
    def _starts(self) -> Tensor:
        """Where each step's elements begin."""
        return self.batch_sizes.cumsum(0) - self.batch_sizes

    @cached_property
    def _step(self) -> Tensor:
        """The step (from 0) of each element."""
        return torch.arange(len(self.sizes)).repeat_interleave(self.batch_sizes)

    @cached_property
    def _sequence(self) -> Tensor:
        """The sequence of each element."""
        return torch.arange(len(self._step)) - self._starts[self._step]

    @cached_property
    def _ends(self) -> Tensor:
        """The last step of each sequence."""
        return (self.batch_sizes.unsqueeze(1) > torch.arange(self.batch)).sum(0) - 1

    def flip(self, x: Tensor) -> Tensor:
        """Each sequence backwards."""
        mirrored = self._starts[self._ends[self._sequence] - self._step] + self._sequence
        return x.index_select(0, mirrored.to(x.device))

    def last(self, y: Tensor) -> Tensor:
        """The last element of each sequence, [sequences, features]."""
        at = self._starts[self._ends] + torch.arange(self.batch)
        return y.index_select(0, at.to(y.device))

    def count(self, like: Tensor) -> Tensor:
        """The number of the step (from 1) of each element, to be broadcast over ``like``'s features."""
        return (self._step + 1).to(like.device, like.dtype).unsqueeze(1)

    def spread(self, state: Tensor) -> Tensor:
        """A tensor [sequences, features], to be broadcast over the elements of each sequence."""
        return state.index_select(0, self._sequence.to(state.device))


Layout: TypeAlias = "Padded | Packed"


def select(x: Tensor, index: Tensor) -> Tensor:
    """Some features of ``x`` [..., features]. Torch is several times faster at this in two dimensions."""
    rows = x.flatten(0, -2) if x.ndim > 2 else x
    return rows.index_select(1, index).view(*x.shape[:-1], index.shape[0])


def run_nm24(
    mode: str,
    x: Tensor,
    layout: Layout,
    state: State,
    ih: tuple[Tensor, Tensor, Tensor | None],
    hh: tuple[Tensor, Tensor, Tensor | None],
) -> tuple[Tensor, State]:
    """Outputs of all steps, laid out as ``x``, and the last state of each sequence.

    ih, hh: values, meta and bias of the two 2:4 weights.
    """
    inputs = nm24_linear(x, *ih)
    is_plain = registry.fast(state[0], *hh) or registry.fast_on_gpu(state[0], *hh)
    if not is_plain or (torch.is_grad_enabled() and any(t.requires_grad for t in (inputs, *state))):
        return _loop(mode, inputs, layout, state, lambda h: nm24_linear(h, *hh))
    y = x.new_empty(*x.shape[:-1], state[0].shape[-1])
    others = tuple(s.clone() for s in state[1:])
    _loop_in_place(_STEPPER[mode], layout.split(inputs), state[0], others, hh, layout.split(y))
    return y, (layout.last(y), *others)


def _loop(
    mode: str, inputs: Tensor, layout: Layout, state: State, recur: Callable[[Tensor], Tensor]
) -> tuple[Tensor, State]:
    """The same from the products of all ``inputs``. Sequences end from the last one on."""
    step, steps = _STEP[mode], []
    ended: list[State] = []
    for x in layout.split(inputs):
        running = x.shape[0]
        if running < state[0].shape[0]:
            ended.append(tuple(s[running:] for s in state))
            state = tuple(s[:running] for s in state)
        state = step(x, recur(state[0]), state)
        steps.append(state[0])
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return layout.join(steps), state


def _lstm_step(x: Tensor, z: Tensor, state: State) -> State:
    i, f, g, o = (x + z).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, z: Tensor, state: State) -> State:
    width = state[0].shape[-1]
    x_gates, x_new = x.split((2 * width, width), -1)
    z_gates, z_new = z.split((2 * width, width), -1)
    r, u = (x_gates + z_gates).sigmoid().chunk(2, -1)
    n = torch.addcmul(x_new, r, z_new).tanh()
    return (torch.lerp(n, state[0], u),)


def _loop_in_place(  # noqa: PLR0913
    stepper: Callable[[Tensor, State], Callable[..., None]],
    inputs: Sequence[Tensor],
    h: Tensor,
    others: State,
    hh: tuple[Tensor, Tensor, Tensor | None],
    outs: Sequence[Tensor],
) -> None:
    """The same where nothing watches, with as few calls of torch as there can be: h of each step goes to
    ``outs``, and ``others``, the rest of the state, is overwritten up to where each sequence ends."""
    running = -1
    for x, out in zip(inputs, outs, strict=True):
        if x.shape[0] != running:
            running = x.shape[0]
            h = h[:running]
            step = stepper(h, tuple(s[:running] for s in others))
        step(x, nm24_linear(h, *hh), h, out)
        h = out


def _lstm_stepper(h: Tensor, others: State) -> Callable[..., None]:
    (c,), width = others, h.shape[-1]
    gates, squashed = h.new_empty(h.shape[0], 4 * width), torch.empty_like(c)
    i_f, g, o = gates.split((2 * width, width, width), -1)
    i, f = i_f.chunk(2, -1)

    def step(x: Tensor, z: Tensor, h: Tensor, out: Tensor) -> None:
        torch.add(x, z, out=gates)
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c.mul_(f).addcmul_(i, g)
        torch.tanh(c, out=squashed)
        torch.mul(o, squashed, out=out)

    return step


def _gru_stepper(h: Tensor, _: State) -> Callable[..., None]:
    width = h.shape[-1]
    gates, n = h.new_empty(h.shape[0], 2 * width), torch.empty_like(h)
    r, u = gates.chunk(2, -1)

    def step(x: Tensor, z: Tensor, h: Tensor, out: Tensor) -> None:
        x_gates, x_new = x.split((2 * width, width), -1)
        z_gates, z_new = z.split((2 * width, width), -1)
        torch.add(x_gates, z_gates, out=gates)
        gates.sigmoid_()
        torch.addcmul(x_new, r, z_new, out=n)
        n.tanh_()
        torch.lerp(n, h, u, out=out)

    return step


_STEP = {"LSTM": _lstm_step, "GRU": _gru_step}
_STEPPER = {"LSTM": _lstm_stepper, "GRU": _gru_stepper}


def run_dense(  # noqa: PLR0913
    mode: str, x: Tensor, layout: Layout, state: State, weights: list[Tensor], training: bool
) -> tuple[Tensor, State]:
    """The same by torch's own kernels. weights: ih, hh and, if there are any, their biases."""
    if torch.compiler.is_dynamo_compiling():  # which oneDNN's LSTM does not survive
        ih, hh = weights[:2]
        b_ih, b_hh = weights[2:] or (None, None)
        return _loop(mode, F.linear(x, ih, b_ih), layout, state, lambda h: F.linear(h, hh, b_hh))
    run: Any = torch._VF.lstm if mode == "LSTM" else torch._VF.gru
    first = [s.unsqueeze(0) for s in state]
    batch_sizes = () if layout.batch_sizes is None else (layout.batch_sizes,)
    batch_first = (False,) if layout.batch_sizes is None else ()
    y, *last = run(
        x,
        *batch_sizes,
        first if mode == "LSTM" else first[0],
        weights,
        len(weights) > 2,
        1,  # layer
        0.0,  # dropout
        training,
        False,  # bidirectional
        *batch_first,
    )
    return y, tuple(s.squeeze(0) for s in last)


def run_constant(
    mode: str, layout: Layout, state: State | None, biases: tuple[Tensor, Tensor], like: Tensor
) -> tuple[Tensor, State]:
    """The same for hidden units whose weights are all zero, which biases and first state alone move.

    Their gates never change, so that c_t = f c_(t-1) + i g of an LSTM and h_t = z h_(t-1) + (1 - z) n of a
    GRU are geometric series. At least float32, rounded once.

    state: None for zeros. like: an input, for shape and dtype.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    b_ih, b_hh = (bias.to(dtype) for bias in biases)
    if mode == "LSTM":
        i, f, g, o = (b_ih + b_hh).chunk(4)
        keep, drive = f, i.sigmoid() * g.tanh()
    else:
        (r_ih, z_ih, n_ih), (r_hh, z_hh, n_hh) = b_ih.chunk(3), b_hh.chunk(3)
        keep = z_ih + z_hh
        drive = (-keep).sigmoid() * (n_ih + (r_ih + r_hh).sigmoid() * n_hh).tanh()
    steps = layout.count(b_ih)
    log_keep = F.logsigmoid(keep)
    lost = (-keep).sigmoid()  # 1 - sigmoid(keep), which may be nothing
    is_small = lost < torch.finfo(dtype).tiny
    series = torch.where(is_small, steps, -torch.expm1(steps * log_keep) / lost.masked_fill(is_small, 1))
    moved = drive * series
    if state is not None:
        moved = moved + torch.exp(steps * log_keep) * layout.spread(state[-1].to(dtype))
    y = moved if mode == "GRU" else o.sigmoid() * moved.tanh()
    whole = (*like.shape[:-1], y.shape[-1])
    tensors = (y,) if mode == "GRU" else (y, moved)
    y, *others = (t.to(like.dtype).expand(whole) for t in tensors)
    return y, (layout.last(y), *map(layout.last, others))
