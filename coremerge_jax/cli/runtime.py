"""Set-up of a command's process: compilation cache and memory limits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import platformdirs
import psutil

from coremerge_jax.errors import RecipeError

# What compiling takes: a first start against a second one in benchmarks/end_to_end.py, rounded up.
COMPILATION_BYTES = 256 * 2**20


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, if it keeps it nowhere else yet."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = platformdirs.user_cache_path("coremerge") / "jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextmanager
def compile_seconds() -> Iterator[Mapping[str, float]]:
    """Fills in, while it is open, ``"compile"``: seconds that JAX has spent in compiling."""
    import jax

    seconds = {"compile": 0.0}

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds["compile"] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def taken_by_program() -> int:
    """Returns the bytes that the process takes beside the data, now and for compiling."""
    return psutil.Process().memory_info().rss + COMPILATION_BYTES


def room_for_batches(limit: int, taken: int) -> int:
    """Returns the bytes of memory that are left for the data.

    Args:
        limit: for the whole process.
        taken: by the program itself and compilation.

    Raises:
        RecipeError: nothing is left.
    """
    if limit <= taken:
        raise RecipeError(
            f"max_memory {limit / 2**20:.0f} MiB: the program itself and compilation take "
            f"{taken / 2**20:.0f} MiB; give more"
        )
    return limit - taken
