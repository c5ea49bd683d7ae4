"""What this machine can build with: environment variables, g++, nvcc, ninja, jobs. Standard library only.

The one module of the build that reads the environment. `pip install -C name=value .` sets the same variables:
cuda is SPARSEOPS_CUDA, archs is TORCH_CUDA_ARCH_LIST, jobs is MAX_JOBS.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# One exact set: nvidia-cuda-nvcc leaves its siblings unpinned, and a newer nvidia-nvvm beside it emits PTX
# that its ptxas refuses.
CUDA_WHEELS = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2"
OLDEST_NVCC = (12, 8)  # the first that knows sm_100a and sm_120

CUDA, ARCHS, JOBS = "SPARSEOPS_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"
ARCHS_HELP = f"{ARCHS} (or -C archs)"
CONFIG_SETTINGS = {"cuda": CUDA, "archs": ARCHS, "jobs": JOBS}
SETUPTOOLS_SETTINGS = ("editable_mode", "editable-mode")

USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
LAUNCHERS = ("ccache", "sccache", "distcc")

GIB = 2**30
CGROUP_FILES = [  # limit and use, of control groups version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]
CXX_GIB, NVCC_GIB = 0.75, 2.0  # what one compiler process may take


def stop(sentence: str) -> NoReturn:
    """Ends the build with one sentence."""
    raise SystemExit(f"sparseops: {sentence}")


def say(sentence: str) -> None:
    """Writes one line to the build log (`pip install -v` shows it)."""
    print(f"sparseops: {sentence}", flush=True)


def variable(name: str, default: str = "") -> str:
    """An environment variable; an empty one counts as unset."""
    return os.environ.get(name, "").strip() or default


def apply_config_settings(settings: Mapping[str, str | list[str]] | None) -> None:
    """Turns pip's `-C name=value` into the environment variables that the build reads."""
    for name, value in (settings or {}).items():
        if name in CONFIG_SETTINGS:
            os.environ[CONFIG_SETTINGS[name]] = value[-1] if isinstance(value, list) else value
        elif not name.startswith("-") and name not in SETUPTOOLS_SETTINGS:
            stop(f"-C must set one of {', '.join(CONFIG_SETTINGS)}, got {name!r}")


def cuda_mode() -> str:
    """SPARSEOPS_CUDA: "0" leaves CUDA out, "1" insists on it, "auto" takes it where it can be had."""
    value = variable(CUDA, "auto").lower()
    if value not in ("0", "1", "auto"):
        stop(f"{CUDA} (or -C cuda) must be 0, 1 or auto, got {value!r}")
    return value


# ---- C++


def cxx() -> list[str]:
    """The C++ compiler as words: CXX, which may name a launcher first ("ccache g++"), else g++, else c++."""
    if sys.platform == "win32":
        stop("Windows is not supported: the build needs g++ or clang++ on Linux or macOS")
    words = shlex.split(variable("CXX"))
    if not words:
        found = shutil.which("g++") or shutil.which("c++")
        if not found:
            stop("no C++ compiler was found: install g++ (Debian: apt install g++) or name one in CXX")
        return [Path(found).name]
    if not shutil.which(words[0]):
        stop(f"CXX must name a C++ compiler, got {variable('CXX')!r}")
    return words


def cxx_version(compiler: list[str]) -> str:
    """The compiler's own first line, which names its version."""
    answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    if answer.returncode:
        stop(f"CXX must name a C++ compiler, got {shlex.join(compiler)!r}, which does not answer --version")
    return answer.stdout.partition("\n")[0]


def cxx_accepts(compiler: list[str], flags: str) -> bool:
    """Whether the compiler knows these flags."""
    command = [*compiler, *flags.split(), "-Werror", "-x", "c++", "-c", "-o", os.devnull, os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def ccbin(compiler: list[str]) -> str:
    """nvcc's host compiler: the same one, without a launcher before it."""
    return next((word for word in compiler if Path(word).name not in LAUNCHERS), compiler[0])


def python_include() -> str:
    """The folder of Python.h."""
    folder = sysconfig.get_paths()["include"]
    if not Path(folder, "Python.h").exists():
        stop(
            f"Python.h must lie in {folder}: install this Python's headers (Debian: apt install python3-dev)"
        )
    return folder


def ninja() -> str:
    """The ninja program: the wheel's before PATH's, which may be too old to read the wheel's log."""
    if importlib.util.find_spec("ninja"):
        from ninja import BIN_DIR

        return os.path.join(BIN_DIR, "ninja")
    return shutil.which("ninja") or stop("ninja was not found: pip install ninja")


# ---- nvcc


def release(version: tuple[int, int]) -> str:
    """(13, 0) as "13.0"."""
    return f"{version[0]}.{version[1]}"


@dataclass(frozen=True)
class Nvcc:
    """An nvcc, its version and the folder of its toolkit (which holds bin/ and include/)."""

    path: str
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"nvcc {self.release} at {self.path}"

    @property
    def release(self) -> str:
        return release(self.version)

    def root(self) -> Path:
        """The toolkit's folder, asked of nvcc itself: a wrapper script or a link may stand on PATH."""
        command = [self.path, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull]
        top = re.search(r"^#\$ TOP=(.+)$", _run(command, "stderr"), re.MULTILINE)
        return Path(os.path.realpath(top[1].strip() if top else Path(self.path).parent.parent))

    def known_archs(self) -> list[int]:
        """The architecture numbers it can build, ascending."""
        names = _run([self.path, "--list-gpu-code"], "stdout")
        return sorted({int(number) for number in re.findall(r"sm_(\d+)", names)})


def _run(command: list[str], stream: str) -> str:
    try:
        return getattr(subprocess.run(command, capture_output=True, text=True, timeout=60), stream)
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _nvcc_at(path: str) -> Nvcc | None:
    release = re.search(r"release (\d+)\.(\d+)", _run([path, "--version"], "stdout"))
    return Nvcc(path, (int(release[1]), int(release[2]))) if release else None


def system_nvcc() -> tuple[Nvcc | None, str]:
    """nvcc from CUDA_HOME or CUDA_PATH, then PATH, then /usr/local/cuda; or None and the reason."""
    candidates = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := variable(name):
            candidates.append(os.path.join(home, "bin", "nvcc"))
            if not os.path.exists(candidates[-1]):
                stop(f"{name} must hold bin/nvcc, got {home!r} ({CUDA}=0 builds without CUDA)")
    candidates += filter(None, [shutil.which("nvcc"), shutil.which(USUAL_NVCC)])
    refused = []
    for path in candidates:
        nvcc = _nvcc_at(path)
        if nvcc and nvcc.version >= OLDEST_NVCC:
            return nvcc, str(nvcc)
        fault = f"is {nvcc.release}, older than {release(OLDEST_NVCC)}" if nvcc else "does not run"
        refused.append(f"{path} {fault}")
    return None, "; ".join(refused) or "no nvcc was found"


def wheel_nvcc() -> Nvcc | None:
    """nvcc from NVIDIA's wheels in the environment that this process runs in."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for root in sorted(Path(folder).glob("cu[0-9]*"), reverse=True):
            if (root / "bin" / "nvcc").exists() and (root / "nvvm" / "bin" / "cicc").exists():
                return _nvcc_at(str(root / "bin" / "nvcc"))
    return None


def find_nvcc() -> Nvcc | None:
    """The nvcc to build with, None for a build without CUDA; SPARSEOPS_CUDA=1 stops where there is none."""
    mode = cuda_mode()
    if mode == "0":
        return None
    found, why = system_nvcc()
    found = found or wheel_nvcc()
    if not found and mode == "1":
        stop(f"{CUDA}=1 needs nvcc, but {why}: set CUDA_HOME, or pip install '{CUDA_WHEELS}'")
    if not found:
        say(f"{why}: CPU kernels only")
    return found


def _has_wheels() -> bool:
    return sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64")


def wheels_to_require() -> tuple[list[str], str]:
    """Build requirements that bring nvcc, none when they are not needed, and the reason."""
    mode = cuda_mode()
    if mode == "0":
        return [], f"{CUDA}=0: CPU kernels only"
    found, why = system_nvcc()
    if found:
        return [], why
    if _has_wheels():
        return [CUDA_WHEELS], f"{why}: nvcc comes as {CUDA_WHEELS}, 105 MB; {CUDA}=0 builds without CUDA"
    if mode == "1":
        stop(f"{CUDA}=1 needs nvcc, but {why} and there are no nvcc wheels for this platform: set CUDA_HOME")
    return [], f"{why}, and there are no nvcc wheels for this platform: CPU kernels only"


# ---- jobs and the lock


def free_gib() -> float:
    """Free memory, and no more than what a control group still allows; 4 where nothing tells."""
    free = [4.0]
    with contextlib.suppress(OSError, TypeError):
        free = [int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20]
    for limit, used in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            free.append((int(Path(limit).read_text()) - int(Path(used).read_text())) / GIB)
    return max(min(free), 0.0)


def jobs() -> tuple[int, int]:
    """How many compilers may run at once, and how many nvcc: MAX_JOBS, else by cores and free memory."""
    if text := variable(JOBS):
        if not text.isdecimal() or int(text) < 1:
            stop(f"{JOBS} (or -C jobs) must be a whole number of at least 1, got {text!r}")
        return int(text), int(text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = free_gib()
    return max(1, min(cores, int(memory / CXX_GIB))), max(1, min(cores, int(memory / NVCC_GIB)))


_lock_depth = 0


@contextlib.contextmanager
def tree_lock(tree: Path) -> Iterator[None]:
    """Lets one process at a time build in a source tree; a second one waits. May be nested."""
    global _lock_depth
    import fcntl

    (tree / "build").mkdir(exist_ok=True)
    with open(tree / "build" / "lock", "w") as file:
        if not _lock_depth:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another build is at work in {tree}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        _lock_depth += 1
        try:
            yield
        finally:
            _lock_depth -= 1
