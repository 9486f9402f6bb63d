"""The machine that a benchmark runs on, and its load."""

import contextlib
import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("coremerge-jax", "jax", "jaxlib", "numpy", "scipy", "torch", "peft")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


BUSY = 0.1


class Watch:
    """A measurement of the load of other processes, from its creation on; Linux only.

    Threads that wait for each other while others have their cores take ten times as long, or
    longer: PyTorch's do. On a busy machine a comparison shows nothing.
    """

    def __init__(self) -> None:
        self._start = self._read()

    def others(self) -> float | None:
        """Returns their share of all cores; None if it is not known."""
        start, now = self._start, self._read()
        if start is None or now is None:
            return None
        busy, own, wall = (y - x for x, y in zip(start, now, strict=True))
        if wall < 1:  # /proc/stat counts in hundredths of a second
            return None
        return max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Returns seconds: of all processes, of this one and its children, of the clock."""
        try:
            line = Path("/proc/stat").read_text().split("\n", 1)[0]
        except OSError:
            return None
        user, nice, system, _, _, *rest = map(int, line.split()[1:9])
        busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.monotonic()


def is_busy(machine: dict[str, Any]) -> bool:
    """Returns whether others used so much that times mean little; prints a warning if so."""
    busy = (machine["others"] or 0) > BUSY
    if busy:
        share = f"{machine['others']:.0%}"
        print(f"the machine was busy: others used {share} of it; repeat this", file=sys.stderr)
    return busy


def describe(watch: Watch) -> dict[str, Any]:
    """Returns the machine, versions, and the BLAS libraries loaded by now with their threads.

    Args:
        watch: made before the measurements.
    """
    return {
        "others": watch.others(),
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": _memory(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "blas": _blas(),
    }


def summary(machine: dict[str, Any]) -> str:
    """Returns the machine in two sentences."""
    others = machine["others"]
    share = "" if others is None else f"; other processes used {others:.0%} of the cores"
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['os']}{share}. "
        f"Python {machine['python']}, {versions}."
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
