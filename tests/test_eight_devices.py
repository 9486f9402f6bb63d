"""Sharded models and checkpoints, on eight simulated devices: see `eight_devices.py`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import assert_same, random_adapters

import coremerge_jax as cm

HERE = Path(__file__).parent


def test_eight_devices(tmp_path):
    shapes = {f"layers.{i}.x": (32, 16) for i in range(4)}
    adapter = random_adapters(shapes, [2], dtype="float32")[0]
    cm.save_orbax(adapter, tmp_path / "one")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "COREMERGE_TEST_FOLDER": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--basetemp", str(tmp_path / "temp"), str(HERE / "eight_devices.py")]
    done = subprocess.run(
        command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    # What eight devices wrote, on one.
    assert_same(cm.open_orbax(tmp_path / "eight"), adapter, 1e-7)
    report = cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "out")
    assert set(report.modules) == set(adapter)
    assert all(np.isfinite(module.rounding_loss) for module in report.modules.values())
