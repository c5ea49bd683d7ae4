"""Train a dense model, make it 2:4 sparse, fine-tune it, save it, and load it again.

The task is real and on every machine: predict the next character of the Python standard library's own source
text from the 32 characters before it. Needs torch and sparseops alone.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import pickle
import tarfile
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseops

CONTEXT, CHARACTERS = 32, 128


def make_model() -> nn.Sequential:
    """Characters [N, CONTEXT] -> logits of the next one [N, CHARACTERS]."""
    return nn.Sequential(
        nn.Embedding(CHARACTERS, 16),
        nn.Flatten(),
        nn.Linear(16 * CONTEXT, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, CHARACTERS),
    )


def read_text() -> Tensor:
    """ASCII codes of a few of the standard library's modules."""
    text = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, pickle, tarfile, typing))
    return torch.tensor([ord(c) for c in text if ord(c) < CHARACTERS])


def batch(text: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``size`` random places in ``text``: the characters before, and the one that follows."""
    start = torch.randint(len(text) - CONTEXT, (size, 1), generator=generator)
    window = text[start + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, -1]


def train(model: nn.Module, text: Tensor, steps: int, rate: float) -> None:
    """Adam on random batches."""
    generator = torch.Generator().manual_seed(1)
    # Made after the conversion: a converted layer has parameters of its own.
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        characters, following = batch(text, 128, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(characters), following).backward()
        optimizer.step()
    model.eval()


def accuracy(model: nn.Module, text: Tensor) -> float:
    """Share of next characters guessed right, on text the model was not trained on."""
    characters, following = batch(text, 4096, torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return (model(characters).argmax(1) == following).float().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the accuracies it prints."""
    options = argparse.ArgumentParser(description="Train, prune to 2:4, fine-tune, save, load.")
    options.add_argument("--steps", type=int, default=300, help="training steps of the dense model")
    steps = options.parse_args(argv).steps

    torch.manual_seed(0)
    text = read_text()
    split = len(text) * 9 // 10
    train_text, test_text = text[:split], text[split:]
    found = {}

    model = make_model()
    train(model, train_text, steps, rate=2e-3)
    found["dense"] = accuracy(model, test_text)

    sparse = sparseops.convert(model)
    sparseops.explain(sparse).print()
    found["2:4, one shot"] = accuracy(sparse, test_text)

    # Only the kept weights are parameters, so the pattern cannot be lost.
    train(sparse, train_text, steps // 3, rate=5e-4)
    found["2:4, fine-tuned"] = accuracy(sparse, test_text)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sparse.pt"
        torch.save(sparse.state_dict(), file)
        again = sparseops.convert(make_model()).eval()
        again.load_state_dict(torch.load(file, weights_only=True))
    found["2:4, loaded again"] = accuracy(again, test_text)

    for name, share in found.items():
        print(f"{name:<18} {100 * share:.1f}% of the next characters right")
    return found


if __name__ == "__main__":
    main()
