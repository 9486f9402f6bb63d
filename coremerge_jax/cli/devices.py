"""Options for devices, and the processes of a distributed job."""

import os
import re
from functools import partial

import typer

from coremerge_jax.errors import RecipeError

devices_option = partial(typer.Option, show_default=False, rich_help_panel="Devices")

# JAX reads the address of the coordinator itself, and the others only on some clusters.
_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_ENVIRONMENT = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}


def join_job(patience: int) -> None:
    """Joins this process to a job. JAX finds the others on TPU, Slurm, Open MPI and Kubernetes.

    Args:
        patience: seconds without a sign of life after which a process counts as dead.

    Raises:
        RecipeError: the other processes are not found.
    """
    import jax

    given: dict[str, int] = {}
    for name, variable in _ENVIRONMENT.items():
        value = os.environ.get(variable, "")
        if value and not value.isdecimal():
            raise RecipeError(f"{variable} must be a whole number, got {value!r}")
        given |= {name: int(value)} if value else {}
    address = os.environ.get(_ADDRESS, "")
    if address and not re.fullmatch(r".+:\d+", address):
        raise RecipeError(f"{_ADDRESS} must be host:port of process 0, got {address!r}")
    # Otherwise JAX takes SIGTERM for a notice of preemption, and does not end the process.
    jax.config.update("jax_enable_preemption_service", False)
    # Devices of several processes never compute together here, and Gloo writes to stdout.
    jax.config.update("jax_cpu_collectives_implementation", None)
    try:
        jax.distributed.initialize(
            **given,  # type: ignore[arg-type]  # of other names than these
            initialization_timeout=patience,
            heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=patience,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise RecipeError(
            f"no distributed job ({' '.join(str(error).split())}); give {_ADDRESS} "
            "(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment, "
            "or start it on TPU or with Slurm, which provide them"
        ) from error
