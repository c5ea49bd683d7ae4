"""Access to the built module ``sparseops._C``: ``C`` is the module, or None and ``error`` says why.

The variables of ``sparseops.env`` take effect here, when this module is first imported. A bad value is kept
as ``config_error`` and raised when a kernel is first asked for, so that ``import sparseops`` never fails.
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sparseops import env


class Config(NamedTuple):
    """What the environment asks for: fast path on or off, how products on a GPU run, and if their kernels run
    on the CPU the compute capability that it stands for. ``interpret``: the CPU stands for a GPU whose
    kernels are Triton's, interpreted. ``error``: one sentence on a bad variable, and then the defaults
    hold."""

    fast_path: bool = True
    impl: str = "auto"
    emulate: env.Capability | None = None
    interpret: bool = False
    error: str | None = None


def _read() -> Config:
    try:
        env.cpu_isa()
        impl = env.impl()
        return Config(env.fast_path(), impl, env.emulate(), impl == "triton" and env.interpret())
    except ValueError as exc:
        return Config(fast_path=False, error=str(exc))


def _load(emulate: env.Capability | None) -> tuple[ModuleType | None, str | None]:
    """The built module and None, or None and one sentence that says why it cannot be used."""
    package = Path(__file__).resolve().parent
    name = "sparseops._C_emulated" if emulate else "sparseops._C"
    found = importlib.util.find_spec(name)
    # An editable install's import hook offers the module of its own tree to every tree.
    if found is None or found.origin is None or Path(found.origin).resolve().parent != package:
        if emulate:
            return None, (
                f"{package} has no module with emulated CUDA kernels: "
                "run `python tests/emulation/build.py module` in a source tree, or unset SPARSEOPS_EMULATE"
            )
        if (package.parent / "csrc").is_dir():
            return None, (
                f"the source tree at {package.parent} has no built module: "
                "run `pip install -e .` there, or run Python from another directory"
            )
        return None, f"the installation at {package} has no built module: reinstall sparseops"
    if emulate:
        env.tell_emulator(emulate)
    try:
        return importlib.import_module(name), None
    except ImportError as exc:
        return None, f"the built module {found.origin} cannot be imported ({exc}): reinstall sparseops"


def _configure(module: ModuleType | None) -> Config:
    """What the environment asks for, its instruction set applied to ``module``."""
    config = _read()
    if config.error is None and module is not None and (isa := env.cpu_isa()) is not None:
        if not module.cpu_supports(isa):
            usable = ", ".join(name for name in env.CPU_ISAS if module.cpu_supports(name))
            return Config(
                fast_path=False,
                error="SPARSEOPS_CPU_ISA must name an instruction set that was built and that this processor "
                f"has ({usable}), got {isa!r}",
            )
        module.cpu_use_isa(isa)
    return config


C: Any  # the module, or None; not ModuleType, which would hide that its functions exist
C, error = _load(_read().emulate)
fast_path, impl, emulated, interpreted, config_error = _configure(C)


def require(op: str) -> ModuleType:
    """The built module, for ``op``.

    Raises:
        ValueError: a ``SPARSEOPS_*`` variable has a bad value.
        RuntimeError: there is no usable built module; the text says why and what to do.
    """
    if config_error is not None:
        raise ValueError(config_error)
    if C is None:
        raise RuntimeError(f"{op}: no kernel can run, {error}")
    return C
