"""What a benchmark ran on."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("coremerge-jax", "jax", "jaxlib", "numpy", "scipy", "torch", "peft")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """The machine, the versions, and the BLAS libraries loaded so far with their threads."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": _memory(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "blas": _blas(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def summary(machine: dict[str, Any]) -> str:
    """The machine in two sentences."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['os']}; load average "
        f"{machine['load_average']} at the start. Python {machine['python']}, {versions}."
    )


def _cpu() -> str:
    name = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return name or platform.processor() or platform.machine()


def _memory() -> float | None:
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    module = sys.modules.get(package.replace("-", "_"))  # from a checkout
    return getattr(module, "__version__", None)


def _blas() -> list[dict[str, Any]]:
    try:
        import threadpoolctl
    except ImportError:
        return []
    return [
        {
            "of": Path(pool["filepath"]).parent.name,
            "library": pool["prefix"],
            "version": pool["version"],
            "threads": pool["num_threads"],
            "kernels": pool.get("architecture"),
        }
        for pool in threadpoolctl.threadpool_info()
    ]
