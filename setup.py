"""Builds sparseops._C: build_backend/ says how, pyproject.toml all the rest."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TREE = Path(__file__).resolve().parent
sys.path.insert(0, str(TREE / "build_backend"))

import ninja_file  # noqa: E402


class NinjaBuild(build_ext):
    """Hands the one extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        ninja_file.build(TREE, Path(self.get_ext_fullpath(ext.name)).resolve())


setup(ext_modules=[Extension("sparseops._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
