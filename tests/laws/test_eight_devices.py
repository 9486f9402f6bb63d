"""Eight simulated devices: see `eight_devices_sharded.py` and `eight_devices_models.py`."""

import numpy as np
from helpers import assert_same, random_adapters
from many_devices import run_on_eight

import coremerge_jax as cm


def test_sharded_arrays(tmp_path):
    run_on_eight("eight_devices_sharded.py", tmp_path)


def test_models_and_checkpoints(tmp_path):
    shapes = {f"layers.{i}.x": (32, 16) for i in range(4)}
    adapter = random_adapters(shapes, [2], dtype="float32")[0]
    cm.save_orbax(adapter, tmp_path / "one")
    run_on_eight("eight_devices_models.py", tmp_path, COREMERGE_TEST_FOLDER=str(tmp_path))

    # What eight devices wrote, on one.
    assert_same(cm.open_orbax(tmp_path / "eight"), adapter, 1e-7)
    report = cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "out")
    assert set(report.modules) == set(adapter)
    assert all(np.isfinite(module.rounding_loss) for module in report.modules.values())
