"""Two processes over the loopback interface: see `two_processes.py`."""

import pytest
from many_devices import pytest_command, start_job

# Before anything that asks JAX for its devices.
JOIN = "import jax; jax.distributed.initialize(num_processes=2, process_id={process})"


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chosen", ["not nightly", "nightly"])
def test_two_processes(tmp_path, chosen):
    command = [*pytest_command("two_processes.py", tmp_path / "temp{process}", JOIN), "-m", chosen]
    processes = start_job(command, 2, COREMERGE_TEST_FOLDER=str(tmp_path))
    told = ["".join(process.communicate()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)
