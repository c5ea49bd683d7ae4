"""docs/results.md from what the examples wrote: ``PYTHONPATH=examples python -m support.page`` renews it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[2]
FOLDER = TREE / "benchmarks" / "results" / "examples"
PAGE = TREE / "docs" / "results.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def tables(folder: Path = FOLDER) -> str:
    """A section for each file of ``--json`` in the folder, by the name of its example."""
    sections = []
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text())
        metrics = [found["metric"], *found["rows"][0]["others"]]
        columns = " | ".join(("network", *metrics, "non-zero", "MB", "ms per batch"))
        script = f"examples/{file.stem}.py"
        threads = f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}"
        sections.append(
            f"### {found['title']}\n\n"
            f"[{script}](../{script}); seed {found['seed']}; {found['machine']}, {threads}; "
            f"torch {found['torch']}; commit `{found['commit']}`; {found['date']}.\n\n"
            f"| {columns} |\n|---|{'---:|' * (len(metrics) + 3)}\n"
            + "".join(f"| {' | '.join(_cells(row))} |\n" for row in found["rows"])
        )
    return "\n".join(sections)


def _cells(row: dict[str, Any]) -> Iterable[str]:
    return (
        row["name"],
        *(f"{value:.4g}" for value in (row["value"], *row["others"].values())),
        f"{100 * row['kept']:.1f}%",
        f"{row['size'] / 1e6:.2f}",
        f"{row['ms']:.2f}",
    )


def with_tables(text: str, found: str) -> str:
    """The page with these tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{found}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), tables()))
