"""Pictures of what networks make, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from support.packages import needed


def draw_rows(file: Path, rows: Mapping[str, Tensor]) -> None:
    """Writes a picture of rows of pictures, each with its name above it.

    rows: as many in each, [N, H, W] grey or [N, 3, H, W] red, green and blue, values in [0, 1].

    Raises:
        DataError: matplotlib is missing.
    """
    count = max(len(pictures) for pictures in rows.values())
    figure = needed("matplotlib.figure").Figure(figsize=(1.3 * count, 1.55 * len(rows)), layout="constrained")
    for part, (name, pictures) in zip(
        figure.subfigures(len(rows), squeeze=False)[:, 0], rows.items(), strict=True
    ):
        part.suptitle(name, fontsize=10)
        for axes, picture in zip(part.subplots(1, count, squeeze=False)[0], pictures, strict=True):
            shown = picture if picture.dim() == 2 else picture.permute(1, 2, 0)
            axes.imshow(shown.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
    figure.savefig(file, dpi=110)
