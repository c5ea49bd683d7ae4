"""docs/results.md says what the examples found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import page

FILES = sorted(page.FOLDER.glob("*.json"))


def test_page_holds_the_tables_of_all_files() -> None:
    assert page.PAGE.read_text() == page.with_tables(page.PAGE.read_text(), page.tables())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_is_of_a_committed_example(file: Path) -> None:
    found = json.loads(file.read_text())
    assert (page.TREE / "examples" / f"{file.stem}.py").exists()
    assert not found["commit"].endswith("-dirty")
    assert found["rows"][0]["name"] == "dense" and len(found["rows"]) > 2


def test_tables(tmp_path: Path) -> None:
    facts = {"title": "A net", "metric": "accuracy", "seed": 3, "threads": 2, "machine": "a machine"}
    facts |= {"torch": "2.13", "commit": "abc", "date": "2026-01-01"}
    row = {"name": "dense", "value": 0.91234, "kept": 1.0, "size": 2_500_000, "ms": 1.234}
    for name, others in (("some_net", {}), ("two_heads", {"turn": 0.5})):
        (tmp_path / f"{name}.json").write_text(json.dumps({**facts, "rows": [{**row, "others": others}]}))
    text = page.with_tables(f"before {page.BEGIN} old {page.END} after", page.tables(tmp_path))
    assert "| dense | 0.9123 | 100.0% | 2.50 | 1.23 |\n" in text and "seed 3; a machine, 2 threads" in text
    assert "| network | accuracy | turn | non-zero | MB | ms per batch |\n" in text
    assert "|---|---:|---:|---:|---:|\n" in text and "|---|---:|---:|---:|---:|---:|\n" in text
    assert "| dense | 0.9123 | 0.5 | 100.0% | 2.50 | 1.23 |\n" in text
    assert "[examples/some_net.py](../examples/some_net.py)" in text
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
