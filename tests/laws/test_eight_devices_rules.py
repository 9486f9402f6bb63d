"""All rules on eight simulated devices: see `eight_devices_rules.py`."""

import pytest
from many_devices import run_on_eight


@pytest.mark.wide
@pytest.mark.timeout(600)
def test_rules(tmp_path):
    run_on_eight("eight_devices_rules.py", tmp_path)
