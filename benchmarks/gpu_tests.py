"""``python -m benchmarks.gpu_tests LOG FOLDER``: what ``pytest -v`` said, by op, into FOLDER/tests.csv.

The lines are read, not a report that pytest writes when it ends: a run that was cut off counts as far as it
got.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_results import TESTS, OpTests, append
from sparseops.ops import REGISTRY

LINE = re.compile(r"^(\S+\.py::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
COLUMN = {"PASSED": "passed", "XPASS": "failed", "FAILED": "failed", "ERROR": "failed"}
OTHER = "other"


def count(log: str) -> list[OpTests]:
    """The tests of each op that a test's name holds, and the rest."""
    outcomes: dict[str, Counter[str]] = {}
    names = sorted(REGISTRY, key=len, reverse=True)
    # a test that fails as it is taken down has two lines
    for test, outcome in {test: outcome for test, outcome in LINE.findall(log)}.items():
        op = next((name for name in names if name in test), OTHER)
        outcomes.setdefault(op, Counter())[COLUMN.get(outcome, "skipped")] += 1
    return [OpTests(op, n["passed"], n["failed"], n["skipped"]) for op, n in sorted(outcomes.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 when a test failed or none ran."""
    options = argparse.ArgumentParser("python -m benchmarks.gpu_tests", description="Counts tests by op.")
    options.add_argument("log", type=Path, help="what pytest -v printed")
    options.add_argument("folder", type=Path, help=f"where {TESTS} goes")
    chosen = options.parse_args(argv)
    counts = count(chosen.log.read_text(errors="replace"))
    (chosen.folder / TESTS).unlink(missing_ok=True)
    append(chosen.folder / TESTS, counts)
    passed, failed, skipped = (
        sum(getattr(c, name) for c in counts) for name in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
