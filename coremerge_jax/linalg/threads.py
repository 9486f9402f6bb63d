"""Threads: processors, and LAPACK kept to one of them."""

import os
from pathlib import Path

import scipy.linalg.cython_lapack
from threadpoolctl import ThreadpoolController


def use_one_thread() -> None:
    """Has each LAPACK call that JAX makes on CPU use one thread, for the rest of the process.

    JAX takes LAPACK from SciPy's copy of OpenBLAS. Its threads and those of XLA wait for each
    other on the same cores: decompositions of small matrices then take many times longer on two
    threads than on one. NumPy has a copy of its own, which is left as it is; where both share one
    library, as in Conda environments, that one is limited.
    """
    package = Path(scipy.__file__).parent
    folders = package, package.with_name("scipy.libs")
    blas = ThreadpoolController().select(user_api="blas")
    paths = [Path(library["filepath"]) for library in blas.info()]
    own = [str(path) for path in paths if any(path.is_relative_to(folder) for folder in folders)]
    (blas.select(filepath=own) if own else blas).limit(limits=1)


def processors() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
