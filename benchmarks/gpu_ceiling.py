"""``python -m benchmarks.gpu_ceiling``: what a warpgroup's sparse product takes at best on a GPU of compute
capability 9.0, beside what two models say.

Builds and runs benchmarks/wgmma_ceiling.cu. The models count the clocks of a multiprocessor for half of a
stage, which is two steps of 32 columns. Shared memory moves 128 bytes a clock:

    products   n / 2 clocks for 64 features, n tokens and one step
    reads      n / 2 for the activations, 16 for the weight unless it is in registers
    fills      128 bytes for each token, 64 for each feature unless it is in registers

In the first model fills are free and reads run beside the products; in the second fills and reads take turns.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_results import CEILINGS, Ceiling, append
from benchmarks.provenance import TREE

SOURCE = TREE / "benchmarks" / "wgmma_ceiling.cu"
TARGET = ("-gencode", "arch=compute_90a,code=sm_90a")
SLOW = re.compile(r"\(C7\d\d\d\)")  # ptxas makes wgmma wait: what is measured would be something else
SHARED_BYTES = 128  # a clock
STEPS = 2  # in half of a stage


def models(form: str, features: int, tokens: int, fills: bool) -> tuple[float, float]:
    """The shares of the tensor cores' peak if fills are free, and if they take turns with reads."""
    instructions = STEPS * features // 64
    products = instructions * tokens / 2
    reads = instructions * (tokens * 64 + (2048 if form == "SS" else 0)) / SHARED_BYTES
    filled = (tokens * 128 + (features * 64 if form == "SS" else 0)) / SHARED_BYTES if fills else 0
    return products / max(products, reads), products / max(products, reads + filled)


def rows(text: str) -> list[Ceiling]:
    """What the program printed, as far as it got."""
    head, *lines = text.splitlines() or [""]
    names = head.split(",")
    found = []
    for line in lines:
        values = dict(zip(names, line.split(","), strict=False))
        if len(values) < len(names):
            continue
        form, features, tokens = values["form"], int(values["features"]), int(values["tokens"])
        cluster, clocks = int(values["cluster"]), float(values["clocks"])
        if_free, if_shared = models(form, features, tokens, cluster > 0)
        found.append(
            Ceiling(
                form=form,
                features=features,
                tokens=tokens,
                consumers=int(values["consumers"]),
                cluster=cluster,
                clocks=clocks,
                slowest=float(values["slowest"]),
                wrong=int(values["wrong"]),
                peak=round(tokens / 2 / clocks, 3) if clocks else 0.0,
                if_free=round(if_free, 3),
                if_shared=round(if_shared, 3),
            )
        )
    return found


def compile_to(program: Path) -> None:
    """Builds the program; a sentence in RuntimeError when that fails or gives something slow."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        raise RuntimeError("no nvcc on this machine")
    include = f"-I{TREE / 'csrc'}"
    command = [nvcc, "-std=c++17", "-O3", *TARGET, include, "-o", str(program), str(SOURCE)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(answer.stdout, end="")
    if answer.returncode or not program.exists():
        raise RuntimeError("nvcc failed")
    if found := SLOW.search(answer.stdout):
        raise RuntimeError(f"ptxas makes the products wait: {found[0]}")


def run(program: Path, seconds: float) -> tuple[str, str]:
    """What the program printed, and what went wrong, "" if nothing did."""
    with subprocess.Popen([program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, said = process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            return out, "it hung"
    last = said.strip().splitlines()[-1:] or [f"it ended with status {process.returncode}"]
    return out, last[0] if process.returncode else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 when it failed or a sum was wrong."""
    options = argparse.ArgumentParser("python -m benchmarks.gpu_ceiling", description="wgmma.sp in a loop.")
    add = options.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help=f"write FOLDER/{CEILINGS}")
    add("--until", type=float, metavar="SECONDS", help="stop at this time (since 1970; in a minute)")
    add("--dry-run", action="store_true", help="without a GPU: do nothing")
    chosen = options.parse_args(argv)
    until = chosen.until or time.time() + 60
    if chosen.dry_run:
        print("no GPU to ask")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            compile_to(Path(folder, "wgmma_ceiling"))
        except RuntimeError as error:
            print(error)
            return 1
        text, fault = run(Path(folder, "wgmma_ceiling"), until - time.time())
    found = rows(text)
    (chosen.out / CEILINGS).unlink(missing_ok=True)
    append(chosen.out / CEILINGS, found)
    for row in found:
        tile = f"{row.form} {row.features}x{row.tokens}"
        print(
            f"{tile:<11} cluster {row.cluster}: {row.clocks:7.2f} clocks, {row.peak:.3f} of the peak "
            f"(models {row.if_shared:.3f} to {row.if_free:.3f})"
        )
    wrong = sum(row.wrong > 0 for row in found)
    print(f"{len(found)} cases, {wrong} with wrong sums" + (f"; {fault}" if fault else ""))
    return 1 if fault or wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
