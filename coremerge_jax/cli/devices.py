"""The devices of a command: those of this process, or of all processes of a job."""

import os
from functools import partial

import typer

from coremerge_jax.errors import RecipeError

devices_option = partial(typer.Option, show_default=False, rich_help_panel="Devices")

# Beside the coordinator's address, which JAX reads itself.
_ENVIRONMENT = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}


def join_job(patience: int) -> None:
    """Makes this process one of a job; JAX finds the others on TPU, Slurm, Open MPI, Kubernetes.

    Args:
        patience: seconds after which a process that gives no sign of life is taken for dead.

    Raises:
        RecipeError: the others are not found.
    """
    import jax

    given: dict[str, int] = {}
    for name, variable in _ENVIRONMENT.items():
        value = os.environ.get(variable, "")
        if value and not value.isdecimal():
            raise RecipeError(f"{variable} must be a whole number, got {value!r}")
        given |= {name: int(value)} if value else {}
    # Else JAX takes SIGTERM for a note that there is time to save something.
    jax.config.update("jax_enable_preemption_service", False)
    # Devices of several processes never compute together here, and Gloo would write to stdout.
    jax.config.update("jax_cpu_collectives_implementation", None)
    try:
        jax.distributed.initialize(
            **given,  # type: ignore[arg-type]
            initialization_timeout=patience,
            heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=patience,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise RecipeError(
            f"no distributed job ({' '.join(str(error).split())}); give JAX_COORDINATOR_ADDRESS "
            "(host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment, "
            "or start on TPU or by Slurm, which tell them"
        ) from error
