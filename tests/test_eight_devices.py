"""Eight simulated devices: see `eight_devices_merge.py` and `eight_devices_models.py`."""

import subprocess

import numpy as np
import pytest
from helpers import assert_same, random_adapters
from many_devices import environment, pytest_command

import coremerge_jax as cm


def run(file, tmp_path, **more):
    done = subprocess.run(
        pytest_command(file, tmp_path / "temp"),
        env=environment(8, **more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_merging(tmp_path):
    run("eight_devices_merge.py", tmp_path)


def test_models_and_checkpoints(tmp_path):
    shapes = {f"layers.{i}.x": (32, 16) for i in range(4)}
    adapter = random_adapters(shapes, [2], dtype="float32")[0]
    cm.save_orbax(adapter, tmp_path / "one")
    run("eight_devices_models.py", tmp_path, COREMERGE_TEST_FOLDER=str(tmp_path))

    # What eight devices wrote, on one.
    assert_same(cm.open_orbax(tmp_path / "eight"), adapter, 1e-7)
    report = cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "out")
    assert set(report.modules) == set(adapter)
    assert all(np.isfinite(module.rounding_loss) for module in report.modules.values())
