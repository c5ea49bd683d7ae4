"""``python -m sparseops``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparseops import __version__
from sparseops.doctor import doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 when ``doctor`` finds a CPU kernel off or a bad
    variable."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["demo"]:
        from sparseops import demo

        return demo.main(argv[1:]) or 0
    parser = argparse.ArgumentParser(
        prog="python -m sparseops",
        description="Structured sparsity for PyTorch.",
        epilog="Each command explains itself: python -m sparseops COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"sparseops {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    check = commands.add_parser(
        "doctor",
        help="say what is installed, and for every kernel that is off why and what to do",
        description="Say what is installed, what the machine has, and for every kernel that is off why and "
        "what to do. The exit status is 1 when a CPU kernel is off or a SPARSEOPS_ variable has a bad value.",
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of tables")
    commands.add_parser(
        "demo", add_help=False, help="convert a real pretrained network and run it on real photographs"
    )
    options = parser.parse_args(argv)
    found = doctor()
    if options.json:
        print(found.to_json())
    else:
        found.print()
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
