"""What every sparse format offers. A new format is one file beside this one and one line in ``FORMATS``."""

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class SparseFormat(Protocol):
    """A dense weight held in fewer numbers.

    ``shape`` is the logical, dense shape. The tensors a format stores are its attributes; a module registers
    them as parameters and buffers under the same names.
    """

    key: ClassVar[str]
    """Lower-case name, the first half of the name of each op that takes the format."""

    options: ClassVar[tuple[str, ...]]
    """What a format object has to be told of the layer besides its shape and tensors: names of attributes."""

    positional: ClassVar[tuple[str, ...]]
    """The tensors that ops take behind ``values``, in their order."""

    by_keyword: ClassVar[tuple[str, ...]]
    """Those that ops take by keyword, and that a weight may be without."""

    needs_outputs: ClassVar[bool]
    """Whether ops have to be told the outputs of the dense weight, because no tensor shows them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        ...

    @property
    def energy_kept(self) -> float:
        """Share of the squared weight that ``from_dense`` kept, 1.0 when nothing was pruned."""
        ...

    @property
    def density(self) -> float:
        """Share of the dense weight's elements that are non-zero."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        ...

    @classmethod
    def from_dense(cls, w: Tensor, *, prune: Any = None, groups: int = 1) -> "SparseFormat":
        """Pack ``w``, of a convolution of so many groups; ``prune`` says how to choose what to drop, None
        refuses to drop anything.

        Raises:
            ValueError: ``w`` does not have the format's pattern and ``prune`` is None, or ``prune`` is
                unknown.
            TypeError: ``w`` is not a floating-point tensor.
        """
        ...

    def to_dense(self) -> Tensor:
        """The dense weight, contiguous, of shape ``shape`` and the stored dtype; exact."""
        ...

    def validate(self) -> None:
        """Check every buffer before a kernel reads it.

        Raises:
            ValueError: a buffer is malformed; the text names it, the rule and what was found.
        """
        ...
