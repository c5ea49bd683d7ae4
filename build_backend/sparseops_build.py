"""PEP 517 backend: setuptools' own hooks, with build requirements that depend on the machine.

nvcc's wheels are asked for only when this machine has no nvcc that is new enough and SPARSEOPS_CUDA is not 0.
Every hook holds the tree's lock, since setuptools keeps its own folders in the tree too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from archs import check_list
from setuptools import build_meta as setuptools_hooks
from toolchain import apply_config_settings, cxx, jobs, say, tree_lock, wheels_to_require

TREE = Path(__file__).resolve().parent.parent
Settings = dict[str, "str | list[str]"] | None


def _call(hook: str, *arguments: object) -> object:
    with tree_lock(TREE):
        return getattr(setuptools_hooks, hook)(*arguments)


def _nvcc_wheels(settings: Settings) -> list[str]:
    """Checks the settings first: a bad one should not cost a download."""
    apply_config_settings(settings)
    cxx()
    jobs()
    check_list()
    wheels, why = wheels_to_require()
    say(why)
    return wheels


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _call("get_requires_for_build_wheel", config_settings) + _nvcc_wheels(config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _call("get_requires_for_build_editable", config_settings) + _nvcc_wheels(config_settings)


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return _call("get_requires_for_build_sdist", config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    return _call("prepare_metadata_for_build_wheel", metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    return _call("prepare_metadata_for_build_editable", metadata_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return _call("build_sdist", sdist_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Builds a wheel, without what an older build left in build/lib: setuptools would pack that too."""
    apply_config_settings(config_settings)
    with tree_lock(TREE):
        for stale in (TREE / "build").glob("lib*"):
            shutil.rmtree(stale)
        return _call("build_wheel", wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Builds the module into ./sparseops and a wheel that points there."""
    apply_config_settings(config_settings)
    return _call("build_editable", wheel_directory, config_settings, metadata_directory)
