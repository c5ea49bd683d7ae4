"""How the benchmarks print, and put what they print into a page."""

from __future__ import annotations

from rich.console import Console


def console() -> Console:
    """Fitted to a terminal; wide enough for every table in a pipe or a log."""
    found = Console()
    return found if found.is_terminal else Console(width=190)


def spliced(page: str, name: str, table: str) -> str:
    """``page`` with ``table`` between ``<!-- name: begin -->`` and ``<!-- name: end -->``.

    Raises:
        ValueError: a marker is missing.
    """
    opening, closing = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, begin, rest = page.partition(opening)
    _, end, tail = rest.partition(closing)
    if not begin or not end:
        raise ValueError(f"the page must hold {opening} and {closing}, got none")
    return f"{head}{begin}\n{table}{end}{tail}"
