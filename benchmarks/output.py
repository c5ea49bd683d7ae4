"""How the benchmarks print."""

from __future__ import annotations

from rich.console import Console


def console() -> Console:
    """Fitted to a terminal; wide enough for every table in a pipe or a log."""
    found = Console()
    return found if found.is_terminal else Console(width=160)
