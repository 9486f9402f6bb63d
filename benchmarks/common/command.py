"""The command line in a fresh process: its time, peak memory and report."""

# Imports little: Linux counts the memory of the process that starts another one as the other's.
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GIB = 2**30


def run(arguments: Sequence[str | Path], cache: Path) -> dict[str, Any]:
    """Runs ``coremerge``; returns its seconds, peak memory in bytes, stages and expected cost."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "coremerge_jax", *arguments, "--json"]
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"exit code {process.returncode}: {' '.join(map(str, command))}")
        output.seek(0)
        report = json.load(output)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parts = {"stages": report["seconds"], "cost": report.get("cost")}
    return {"seconds": seconds, "peak": peak, **parts}


def gib(size: float) -> str:
    """Formats bytes in GiB."""
    return f"{size / GIB:.2f} GiB"
