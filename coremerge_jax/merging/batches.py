"""Batches: parts of groups, read, merged and given out a few at a time."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax

from coremerge_jax.linalg.threads import processors
from coremerge_jax.merging.cost import batch_size, fitting_workers
from coremerge_jax.merging.groups import Group
from coremerge_jax.merging.mesh import Devices
from coremerge_jax.rules import Chain
from coremerge_jax.spaces import Space

T = TypeVar("T")


def split_groups(
    groups: Sequence[Group],
    rule: Chain,
    space: Space,
    devices: Devices | None,
    max_memory: int | None,
) -> tuple[int, list[Group]]:
    """Returns the number of batches to work on at once, and the batches.

    Raises:
        MemoryError: a single module needs more than ``max_memory`` bytes.
    """
    workers, rows = count_workers(devices), devices.rows if devices else 1
    if max_memory is not None and groups:
        workers = fitting_workers(groups, rule, space, workers, max_memory, rows)
    batches = []
    for group in groups:
        size = batch_size(group, rule, space, workers, max_memory, rows)
        batches += group.split(size, rows)
    return workers, batches


def count_workers(devices: Devices | None) -> int:
    """Returns the number of batches to work on at once."""
    if devices and (devices.axis or len(devices.processes) > 1):
        return 1  # devices that wait for each other have to do all work in one order
    if devices or jax.default_backend() != "cpu":
        return 2  # one is read while the other is computed
    return processors()


def map_batches(
    fn: Callable[[Group], T], batches: Sequence[Group], workers: int
) -> Iterator[tuple[Group, T]]:
    """Yields each batch with ``fn`` of it, in order, computed a few batches ahead by threads."""
    if workers == 1 or len(batches) == 1:
        yield from ((batch, fn(batch)) for batch in batches)
        return
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # per thread; not in the stubs

    def run(batch: Group) -> T:
        with jax.default_device(device):
            return fn(batch)

    ahead: deque[tuple[Group, Future]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="coremerge") as pool:
        try:
            for batch in batches:
                ahead.append((batch, pool.submit(run, batch)))
                if len(ahead) > workers:
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class _FirstCalls:
    """Serializes the first call of each kind, whose compiled program the others then use."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, threading.Lock] = {}
        self._done: set[Hashable] = set()

    @contextlib.contextmanager
    def __call__(self, *kind: Hashable) -> Iterator[None]:
        if kind in self._done:
            yield
            return
        with self._locks.setdefault(kind, threading.Lock()):
            yield
            self._done.add(kind)


first_calls = _FirstCalls()
