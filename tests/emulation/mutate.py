"""Changes one token of a kernel at a time and asks its test whether it notices.

    python tests/emulation/mutate.py nm24_linear [--count 40] [--seed 1] [--jobs 2] [--write]

A mutant is built in a copy of the tree and run in the plain build (seeds 0 and 1), then, if it lives, under
AddressSanitizer, then with the race check. It is killed by a wrong result, an error, a race, traffic above
the ideal, or a test that no longer ends. A mutant that changes nothing that matters is listed, with the
reason, in equivalent_mutants.txt. Every one that is neither is a hole in the test. `--write` puts the counts
into docs/kernels.md and leaves those of other kernels there.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent.parent
PAGE = TREE / "docs" / "kernels.md"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
COPIED = ("csrc", "tests/emulation", "build_backend", "benchmarks")  # benchmarks: one of the programs
SECONDS = 120  # a test that takes longer no longer ends

# The files in which a kernel's test has to find mutants; those that two kernels share belong to the first.
FILES = {
    "nm24_linear": ("nm24_linear", "mainloop", "epilogue", "tile_index"),
    "nm24_conv": ("nm24_conv",),
    "nm24_linear_sm90": ("nm24_linear_sm90", "mainloop_sm90", "epilogue_sm90"),
    "nm24_conv_sm90": ("nm24_conv_sm90",),
    "nm24_few_tokens": ("nm24_few_tokens",),
    "nm24_compress": ("nm24_compress",),
    "nm24_grad_values": ("nm24_grad_values",),
    "nm24_to_dense": ("nm24_to_dense",),
}

# Tokens and what becomes of them. Operators are recognised by the spaces that clang-format puts around them.
RULES = [
    (re.compile(re.escape(token)), replacement)
    for token, replacement in (
        (" < ", " <= "),
        (" <= ", " < "),
        (" > ", " >= "),
        (" >= ", " > "),
        (" == ", " != "),
        (" != ", " == "),
        (" + ", " - "),
        (" - ", " + "),
        (" * ", " + "),
        (" / ", " % "),
        (" % ", " / "),
        (" ^ ", " | "),
        (" & ", " | "),
        (" | ", " & "),
        (" && ", " || "),
        (" || ", " && "),
        (" << ", " >> "),
        (" >> ", " << "),
        (" += ", " -= "),
        ("min(", "max("),
        ("__syncthreads();", ";"),
        ("__syncwarp();", ";"),
        ("consumer_barrier();", ";"),
        ("ptx::fence_proxy_async();", ";"),
        ("ptx::fence_mbarrier_init();", ";"),
        ("ptx::wgmma_fence();", ";"),
        ("wgmma_wait<1>", "wgmma_wait<2>"),
        ("bulk_wait_read<0>", "bulk_wait_read<1>"),
        ("ptx::cp_async_commit();", ";"),
        ("kStages - 2>", "kStages - 1>"),
    )
]
NUMBER = re.compile(r"(?<![\w.<])\d+(?![\w.>])")
LEFT_ALONE = ("static_assert", "#", "template", "using ", "__global__", "struct alignas")


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int  # from 0
    begin: int
    end: int
    replacement: str
    text: str  # the line, stripped
    token: str

    def apply(self, lines: list[str]) -> str:
        line = lines[self.line]
        changed = line[: self.begin] + self.replacement + line[self.end :]
        return "\n".join([*lines[: self.line], changed, *lines[self.line + 1 :], ""])

    def __str__(self) -> str:
        return f"{self.file}.cuh:{self.line + 1}: {self.text}   [{self.token} -> {self.replacement.strip()}]"


def mutants_of(file: str) -> list[Mutant]:
    found = []
    for number, line in enumerate(source(TREE, file).read_text().splitlines()):
        code = line.split("//")[0]
        if code.strip().startswith(LEFT_ALONE):
            continue
        sites = [(match, text) for pattern, text in RULES for match in pattern.finditer(code)]
        sites += [(match, str(int(match[0]) + 1)) for match in NUMBER.finditer(code)]
        found += [
            Mutant(file, number, m.start(), m.end(), text, line.strip(), m[0].strip()) for m, text in sites
        ]
    return found


def source(tree: Path, file: str) -> Path:
    return tree / "csrc" / "cuda" / f"{file}.cuh"


def known_equivalent() -> dict[tuple[str, str, str], str]:
    """(file, line, "token -> replacement") to the reason. A record is three lines and an empty one."""
    records = {}
    for record in EQUIVALENT.read_text().split("\n\n"):
        lines = [line for line in record.splitlines() if line and not line.startswith("#")]
        if lines:
            place, change, reason = lines
            file, _, text = place.partition(": ")
            records[file, text, change] = reason
    return records


def is_equivalent(mutant: Mutant, known: dict[tuple[str, str, str], str]) -> bool:
    change = f"{mutant.token} -> {mutant.replacement.strip()}"
    return (f"{mutant.file}.cuh", mutant.text, change) in known


def copy_tree(to: Path) -> None:
    for folder in COPIED:
        shutil.copytree(TREE / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))


def build(tree: Path, kind: str, kernel: str) -> bool:
    command = [sys.executable, "tests/emulation/build.py", kind, f"{kernel}_test"]
    environment = os.environ | {"MAX_JOBS": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True).returncode == 0


def run(tree: Path, kind: str, kernel: str, seed: int) -> bool:
    """Whether the test passes."""
    program = tree / "build" / "emulation" / kind / f"{kernel}_test"
    environment = os.environ | {"EMU_SEED": str(seed)}
    try:
        done = subprocess.run([program], env=environment, capture_output=True, timeout=SECONDS)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False


def verdict(tree: Path, kernel: str, mutant: Mutant) -> str:
    """The build that killed it, "survived", or "does not compile"."""
    path = source(tree, mutant.file)
    original = path.read_text()
    path.write_text(mutant.apply(original.splitlines()))
    try:
        for kind, seeds in (("plain", (0, 1)), ("asan", (0,)), ("race", (0,))):
            if not build(tree, kind, kernel):
                return "does not compile"
            if not all(run(tree, kind, kernel, seed) for seed in seeds):
                return kind
        return "survived"
    finally:
        path.write_text(original)


def judge(kernel: str, picked: list[Mutant], jobs: int) -> list[tuple[Mutant, str]]:
    """Every mutant with its verdict, each job in a copy of the tree of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        trees: queue.Queue[Path] = queue.Queue()
        first = Path(scratch) / "0"
        copy_tree(first)
        for kind in ("plain", "asan", "race"):
            if not (build(first, kind, kernel) and run(first, kind, kernel, 0)):
                raise SystemExit(f"mutate.py: {kernel}_test must pass unchanged, got a failure ({kind})")
        for job in range(jobs):
            if job:
                shutil.copytree(first, Path(scratch) / str(job), symlinks=True)
            trees.put(Path(scratch) / str(job))

        def one(mutant: Mutant) -> tuple[Mutant, str]:
            tree = trees.get()
            try:
                result = verdict(tree, kernel, mutant)
            finally:
                trees.put(tree)
            print(f"{result:16} {mutant}", flush=True)
            return mutant, result

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, picked))


@dataclass
class Tally:
    kernel: str
    commit: str
    sites: int
    tried: int
    equivalent: int
    killed: dict[str, int]
    survivors: list[Mutant]

    @property
    def share(self) -> float:
        dead = sum(self.killed.values())
        return dead / max(1, dead + len(self.survivors))

    def row(self) -> str:
        killed = [self.killed[kind] for kind in ("plain", "asan", "race")]
        counts = [self.sites, self.tried, *killed, self.equivalent, len(self.survivors)]
        cells = [self.kernel, f"`{self.commit}`", *map(str, counts), f"{self.share:.1%}"]
        return f"| {' | '.join(cells)} |"


def tally(kernel: str, sites: int, judged: list[tuple[Mutant, str]]) -> Tally:
    known = known_equivalent()
    lives = [mutant for mutant, result in judged if result == "survived"]
    killed = {kind: sum(result == kind for _, result in judged) for kind in ("plain", "asan", "race")}
    survivors = [mutant for mutant in lives if not is_equivalent(mutant, known)]
    compiled = sum(killed.values()) + len(lives)
    return Tally(kernel, commit(), sites, compiled, len(lives) - len(survivors), killed, survivors)


def commit() -> str:
    """The commit whose kernels are mutated, "unknown" without git."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty"]
    try:
        return subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


HEAD = [
    "| kernel | commit | sites | tried | plain | asan | race | change nothing | survive | share killed |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
]
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"


def write_page(result: Tally) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    inside, _, after = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in inside.splitlines() if line.startswith("| nm24")}
    rows[result.kernel] = result.row()
    ordered = [rows[kernel] for kernel in FILES if kernel in rows]
    PAGE.write_text("\n".join([before + BEGIN, *HEAD, *ordered, END + after]))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("kernel", choices=FILES)
    parser.add_argument("--count", type=int, default=40, help="how many of the mutants to try; 0 is all")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the counts into docs/kernels.md")
    options = parser.parse_args()

    sites = [mutant for file in FILES[options.kernel] for mutant in mutants_of(file)]
    picked = sites
    if 0 < options.count < len(sites):
        picked = random.Random(options.seed).sample(sites, options.count)
    result = tally(options.kernel, len(sites), judge(options.kernel, picked, options.jobs))
    print("\n".join(["", *HEAD, result.row(), *map(str, result.survivors)]))
    if options.write:
        write_page(result)


if __name__ == "__main__":
    main()
