"""2:4 sparsity in its canonical form: the one that is saved, and that the kernels of every device start from.

A dense weight is first laid out as rows of *packed columns*, and every four neighbouring packed columns form
a *group* of which two are kept::

    linear [O, K]            columns are k                                   padded to a multiple of 32
    conv   [O, C, R, S]      columns are (r, s, c), c fastest; the channels of each tap are padded to a
                             multiple of 4 so that no group spans two taps; the total to a multiple of 32
    conv   [O, C, L]         the same with one tap index

(C counts the channels of one convolution group.) A row of P packed columns is stored as::

    values [O, P/2]   v0 v1 | v2 v3 | ...     two kept elements per group, in ascending column order
    meta   [O, P/8]   byte b = nibble(group 2b) | nibble(group 2b + 1) << 4

    nibble = i0 | i1 << 2, the columns (0..3) of the two kept elements inside the group, i0 < i1:

        i0,i1   0,1   0,2   1,2   0,3   1,3   2,3
        nibble  0x4   0x8   0x9   0xC   0xD   0xE      nothing else is legal

A group with fewer than two non-zeros keeps its lowest free columns, so an all-zero group and padding store
0x4 with values 0. The pitch of 32 columns makes a row of meta whole 32-bit words and a row of 16-bit values
whole 32-byte vectors.

Source: the ordered metadata of ``mma.sp`` (PTX ISA 9.7, "Sparse matrix storage"); read as little-endian
16-bit words, a row of meta is what CUTLASS 2.x calls E before it is reordered. Grouping along the input
channels of each tap is what TensorRT asks of a 2:4 convolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

GROUP = 4
PITCH = 32
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
"""The legal metadata nibbles, in the order of the table above."""

# Nibble of a group by the bit set of its kept columns (bit i = column i kept); other sets never occur.
_NIBBLE_OF_KEPT = torch.zeros(16, dtype=torch.uint8, device="cpu")
for _nibble in NIBBLES:
    _NIBBLE_OF_KEPT[(1 << (_nibble & 3)) | (1 << (_nibble >> 2))] = _nibble

_LEGAL_BYTE = torch.tensor([(b & 15) in NIBBLES and (b >> 4) in NIBBLES for b in range(256)], device="cpu")


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``n``."""
    return (n + multiple - 1) // multiple * multiple


def packed_cols(shape: tuple[int, ...] | torch.Size) -> int:
    """Packed columns P of a weight of the logical ``shape`` [O, K], [O, C, L] or [O, C, R, S]."""
    return round_up(prod(shape[2:]) * round_up(shape[1], GROUP), PITCH)


def pack_columns(w: Tensor) -> Tensor:
    """Dense weight [O, K], [O, C, L] or [O, C, R, S] as rows of packed columns [O, P]; differentiable."""
    taps = w.flatten(2).transpose(1, 2) if w.ndim > 2 else w.unsqueeze(1)
    taps = _pad(taps, round_up(taps.shape[2], GROUP))
    return _pad(taps.reshape(taps.shape[0], taps.shape[1] * taps.shape[2]), packed_cols(w.shape))


def _pad(w: Tensor, columns: int) -> Tensor:
    """``w`` with zeros behind its last dimension; itself if there is nothing to add, since torch's own pad by
    nothing copies, to other strides than its fake promises."""
    missing = columns - w.shape[-1]
    return torch.nn.functional.pad(w, (0, missing)) if missing else w


def unpack_columns(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Rows of packed columns [O, P] as a contiguous dense weight of the logical ``shape``; differentiable."""
    rows, channels = shape[:2]
    taps, pitch = prod(shape[2:]), round_up(channels, GROUP)
    by_tap = packed[:, : taps * pitch].reshape(rows, taps, pitch)[:, :, :channels]
    return by_tap.transpose(1, 2).reshape(shape).contiguous()


def column_index(meta: Tensor) -> Tensor:
    """Packed column (int64) of each kept value: meta [O, P/8] gives [O, P/2], ascending along a row."""
    rows, row_bytes = meta.shape
    shift = torch.arange(0, 8, 2, device=meta.device, dtype=torch.uint8)
    within = (meta.unsqueeze(-1) >> shift & 3).long()
    group = torch.arange(row_bytes * 2, device=meta.device).mul(GROUP).repeat_interleave(2)
    return within.reshape(rows, row_bytes * 4) + group


def expand(values: Tensor, meta: Tensor) -> Tensor:
    """values [O, P/2] and meta [O, P/8] as packed columns [O, P] with zeros; differentiable in values."""
    rows, kept = values.shape
    return values.new_zeros((rows, kept * 2)).scatter(1, column_index(meta), values)


def gather(packed: Tensor, meta: Tensor) -> Tensor:
    """The elements of packed columns [O, P] that meta keeps, [O, P/2]: the adjoint of ``expand``."""
    return packed.gather(1, column_index(meta))


def is_24(w: Tensor) -> bool:
    """Whether no group of ``w`` has more than two non-zeros (NaN counts as non-zero)."""
    return bool((_groups(pack_columns(w)) != 0).sum(-1).le(2).all())


def _groups(packed: Tensor) -> Tensor:
    return packed.reshape(packed.shape[0], packed.shape[1] // GROUP, GROUP)


def _keep_two(groups: Tensor) -> Tensor:
    """Nibble [O, P/4] that keeps the two largest magnitudes of each group [O, P/4, 4].

    NaN counts as infinite; of equal magnitudes the lower column wins. Ranks come from the six comparisons
    between the four columns, which is much faster than sorting along a dimension of four.
    """
    size = groups.abs().nan_to_num_(nan=float("inf"), posinf=float("inf")).unbind(-1)
    losses = [torch.zeros_like(size[0], dtype=torch.uint8) for _ in range(GROUP)]
    for low in range(GROUP):
        for high in range(low + 1, GROUP):
            low_loses = size[high] > size[low]
            losses[low] += low_loses
            losses[high] += ~low_loses
    kept = torch.zeros_like(losses[0])
    for column, lost in enumerate(losses):
        kept |= (lost < 2).to(torch.uint8) << column
    return _NIBBLE_OF_KEPT.to(groups.device)[kept.int()]


def compress(packed: Tensor) -> tuple[Tensor, Tensor]:
    """values [O, P/2] and meta [O, P/8] of packed columns [O, P], pruned by magnitude."""
    nibbles = _keep_two(_groups(packed))
    meta = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous()
    return gather(packed, meta), meta


compressor: Callable[[Tensor], tuple[Tensor, Tensor]] = compress
"""What ``NM24.from_dense`` compresses with. The ops, which a format does not know, put one here that has a
kernel."""


def energy_share(values: Tensor, packed: Tensor) -> float:
    """Share of the squared finite weight ``packed`` in ``values``, in float64 and safe from overflow."""
    finite = packed.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = finite.abs().amax().double() if finite.numel() else torch.zeros(())
    if largest == 0:
        return 1.0
    total = (finite.double() / largest).square_().sum()
    kept = (values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).double() / largest).square_().sum()
    return min(1.0, float(kept / total))


def _where(shape: tuple[int, ...], row: int, group: int) -> str:
    """Where a group lies, in the words of the logical weight."""
    if len(shape) == 2:
        return f"row {row}, group {group} (columns {group * GROUP}-{group * GROUP + 3})"
    groups_per_tap = round_up(shape[1], GROUP) // GROUP
    tap, first = group // groups_per_tap, group % groups_per_tap * GROUP
    where = (tap,) if len(shape) == 3 else divmod(tap, shape[3])
    return f"row {row}, group {group} (tap {', '.join(map(str, where))}, channels {first}-{first + 3})"


@dataclass(frozen=True, eq=False)
class NM24:
    """A 2:4 weight in the canonical layout drawn at the top of this file.

    Attributes:
        values: kept elements [O, P/2], contiguous, of the weight's dtype.
        meta: their columns [O, P/8], uint8, contiguous.
        shape: logical dense shape, (O, K), (O, C, L) or (O, C, R, S), C being the channels of one group.
        energy_kept: share of the squared (finite) weight that ``from_dense`` kept.
        nonfinite: NaN and infinite elements that ``from_dense`` saw.
    """

    key: ClassVar[str] = "nm24"
    options: ClassVar[tuple[str, ...]] = ()
    positional: ClassVar[tuple[str, ...]] = ("meta",)
    by_keyword: ClassVar[tuple[str, ...]] = ()
    needs_outputs: ClassVar[bool] = False

    values: Tensor
    meta: Tensor
    shape: tuple[int, ...]
    energy_kept: float = 1.0
    nonfinite: int = 0

    @classmethod
    def from_dense(cls, w: Tensor, *, prune: str | None = None, groups: int = 1) -> "NM24":
        """Pack a dense weight [O, K], [O, C, L] or [O, C, R, S].

        Args:
            w: the weight; no gradient flows to it.
            prune: ``"magnitude"`` keeps the two largest magnitudes of each group, of equal ones the lower
                column; NaN and infinities count as the largest. None demands that ``w`` is 2:4 already.
            groups: of the convolution, which make no difference.

        Raises:
            TypeError: ``w`` is not a float16, bfloat16, float32 or float64 tensor.
            ValueError: ``w`` has another number of dimensions, is not 2:4 although ``prune`` is None (the
                text names the first offending row, group and its four values), or ``prune`` is unknown.
        """
        if not isinstance(w, Tensor) or w.dtype not in DTYPES or w.layout != torch.strided:
            got = f"{w.dtype}, {w.layout}" if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"NM24.from_dense: w must be a dense floating-point tensor, got {got}")
        if w.device.type == "meta":
            raise ValueError("NM24.from_dense: w must hold data, got a tensor on the meta device")
        if w.ndim not in (2, 3, 4):
            raise ValueError(f"NM24.from_dense: w must have 2, 3 or 4 dimensions, got shape {tuple(w.shape)}")
        if prune not in (None, "magnitude"):
            raise ValueError(f'NM24.from_dense: prune must be None or "magnitude", got {prune!r}')
        shape = tuple(w.shape)
        packed = pack_columns(w.detach())
        quads = _groups(packed)
        crowded = (quads != 0).sum(-1) > 2
        is_pruned = bool(crowded.any())
        if is_pruned and prune is None:
            row, group = crowded.nonzero()[0].tolist()
            raise ValueError(
                "NM24.from_dense: w must have at most two non-zeros in each group of four "
                f'(prune="magnitude" drops the smallest), got {quads[row, group].tolist()} '
                f"in {_where(shape, row, group)}"
            )
        values, meta = compressor(packed)
        return cls(
            values,
            meta,
            shape,
            energy_kept=energy_share(values, packed) if is_pruned else 1.0,
            nonfinite=int(w.numel() - torch.isfinite(w).sum()),
        )

    def to_dense(self) -> Tensor:
        """The dense weight, contiguous and exact (dropped zeros are +0); differentiable in values."""
        return unpack_columns(expand(self.values, self.meta), self.shape)

    @property
    def packed_cols(self) -> int:
        """Packed columns P of a row."""
        return packed_cols(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values and meta."""
        return self.values.nbytes + self.meta.nbytes

    @property
    def density(self) -> float:
        """Non-zero values over elements of the dense weight; 0.0 for a weight without elements."""
        numel = prod(self.shape)
        return int(self.values.count_nonzero()) / numel if numel else 0.0

    def validate(self) -> None:
        """Check values and meta before a kernel reads them.

        Raises:
            ValueError: a buffer has the wrong type, dtype, layout, device or shape, a metadata nibble is not
                one of the six legal ones (the text says row, group and nibble), or a value in a padding
                column is not zero.
        """
        for name, buffer, dtypes in (("values", self.values, DTYPES), ("meta", self.meta, (torch.uint8,))):
            if not isinstance(buffer, Tensor):
                raise ValueError(f"NM24: {name} must be a tensor, got {type(buffer).__name__}")
            if buffer.dtype not in dtypes:
                rule = " or ".join(str(dtype) for dtype in dtypes)
                raise ValueError(f"NM24: {name} must have dtype {rule}, got {buffer.dtype}")
        if len(self.shape) not in (2, 3, 4) or not all(isinstance(n, int) and n >= 0 for n in self.shape):
            raise ValueError(f"NM24: shape must be 2, 3 or 4 sizes of at least 0, got {self.shape}")
        if self.values.device != self.meta.device:
            raise ValueError(
                f"NM24: meta must be on the device of values ({self.values.device}), got {self.meta.device}"
            )
        rows, cols = self.shape[0], packed_cols(self.shape)
        for name, buffer, width in (("values", self.values, cols // 2), ("meta", self.meta, cols // 8)):
            if tuple(buffer.shape) != (rows, width):
                rule = f"shape {(rows, width)} for a weight of shape {self.shape}"
                raise ValueError(f"NM24: {name} must have {rule}, got {tuple(buffer.shape)}")
            if not buffer.is_contiguous():
                raise ValueError(f"NM24: {name} must be contiguous, got strides {buffer.stride()}")
        if self.meta.device.type != "meta":
            self._validate_contents()

    def _validate_contents(self) -> None:
        illegal = ~_LEGAL_BYTE.to(self.meta.device)[self.meta.int()]
        if illegal.any():
            row, byte = illegal.nonzero()[0].tolist()
            pair = int(self.meta[row, byte])
            group, nibble = (2 * byte, pair & 15) if (pair & 15) not in NIBBLES else (2 * byte + 1, pair >> 4)
            raise ValueError(
                "NM24: meta must hold only the nibbles 0x4 0x8 0x9 0xC 0xD 0xE, "
                f"got 0x{nibble:X} in row {row}, group {group}"
            )
        is_real = pack_columns(torch.ones((1, *self.shape[1:]), dtype=torch.bool, device=self.meta.device))
        stray = (self.values != 0) & ~gather(is_real.expand(self.shape[0], -1), self.meta)
        if stray.any():
            row, slot = stray.nonzero()[0].tolist()
            raise ValueError(
                "NM24: values must be 0 in padding columns, "
                f"got {float(self.values[row, slot])} in row {row}, group {slot // 2}"
            )
