"""What tests on several devices or processes have in common."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from cases import WITHOUT_INPUTS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import coremerge_jax as cm
from coremerge_jax.rules import chain

# Neither the number of modules nor m or n can be divided by that of devices.
SHAPES = {f"layers.{i}.q": (21, 75) for i in range(5)}
RANKS = (2, 3, 4)
PARAMETERS = {"cart": {"rank": 2}, "iso_cts": {"common": 3, "specific": 1}}
CASES = {name: rule(**PARAMETERS.get(name, {})) for name, rule in WITHOUT_INPUTS.items()} | {
    "dare|ties|isotropize": chain(cm.dare(drop=0.3), cm.ties(), cm.isotropize()),
    "ties of the model": cm.ties(scope="model"),
}


def mesh(*shape, mode=AxisType.Auto):
    names = ("modules", "features")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(mode,) * len(shape))


def put(adapters: Sequence[cm.Adapter], there: jax.sharding.Mesh) -> list[cm.Adapter]:
    """On all devices, with n and m spread over the last axis where these can be divided."""
    axis = there.axis_names[-1]

    def place(x, *spec):
        fits = max(x.shape) % there.shape[axis] == 0
        sharding = NamedSharding(there, P(*spec) if fits else P())
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return [
        adapter.replace(
            modules={
                path: cm.LoRA(a=place(lora.a, None, axis), b=place(lora.b, axis, None))
                for path, lora in adapter.items()
            }
        )
        for adapter in adapters
    ]


def environment(devices: int, **more: str) -> Mapping[str, str]:
    """That of a process with some simulated devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags} | more


def pytest_command(file: str, folder: Path, first: str = "pass") -> list[str]:
    """Runs a file of tests, which pytest does not collect by itself, after a first statement."""
    tests = Path(__file__).parent
    code = f"import sys, pytest; {first}; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(tests.parent)]
    options += ["--basetemp", str(folder), str(tests / "laws" / file)]
    return [sys.executable, "-c", code, *options]


def start_job(command: Sequence[str], count: int, **more: str) -> list[subprocess.Popen]:
    """Starts processes that find each other over the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [part.replace("{process}", str(i)) for part in command],
            env=environment(2, **job, JAX_PROCESS_ID=str(i), **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
