"""Several processes of one job (`jax.distributed`): their shares, and how they agree.

What one of them tells goes through the job's coordinator, in an order that all of them keep. If one
fails, it tells that instead, and all fail. If one dies, JAX ends the others, within the time that
`jax.distributed.initialize` is told to wait for a sign of life.
"""

import base64
import contextlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from coremerge_jax.errors import ProcessError
from coremerge_jax.lora import LoRA

_POLL = 1000  # milliseconds, after which an interrupt is heard

_messages = itertools.count()


def exchange(value: Any = None) -> list[Any]:
    """Gathers a value from each process, in their order: plain data, as in JSON.

    Raises:
        ProcessError: a process failed instead.
    """
    if not jax.distributed.is_initialized():
        return [value]
    name = _tell({"value": value})
    told = [json.loads(_wait_for(f"{name}/{i}")) for i in range(jax.process_count())]
    for i, message in enumerate(told):
        if "error" in message:
            raise ProcessError(f"process {i} of {len(told)} failed: {message['error']}")
    return [message["value"] for message in told]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Guards a block that `exchange` follows: if it fails, the other processes fail there."""
    try:
        yield
    except ProcessError:  # which they know
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        _tell({"error": "interrupted" if interrupted else str(error) or type(error).__name__})
        raise


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Guards a block: if it ends without an exception, it has worked in all processes."""
    with failing_together():
        yield
    exchange()


def _tell(message: Mapping[str, Any]) -> str:
    name = f"coremerge/{next(_messages)}"
    _client().key_value_set(f"{name}/{jax.process_index()}", json.dumps(message))
    return name


def _wait_for(key: str) -> str:
    """Blocks until a message arrives. If the sender has died, JAX's heartbeat ends this process."""
    while True:
        try:
            return _client().blocking_key_value_get(key, _POLL)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise ProcessError(f"the other processes cannot be reached ({error})") from error


def _client() -> Any:
    from jax._src import distributed  # as orbax does: there is no public way

    return distributed.global_state.client


def owners(costs: Sequence[float], rows: Sequence[int]) -> list[int]:
    """Assigns each process a contiguous share whose cost is proportional to its device rows.

    Args:
        costs: of each piece of work.
        rows: of each process.

    Returns:
        For each piece the process that has its middle.
    """
    ends = np.cumsum(costs)
    middles = (ends - np.asarray(costs) / 2) / ends[-1]
    bounds = np.cumsum(rows) / np.sum(rows)
    return np.searchsorted(bounds[:-1], middles, side="right").tolist()


def total(*arrays: np.ndarray) -> list[np.ndarray]:
    """Returns the sums over all processes, of arrays that are small or mostly zeros."""
    packed = [base64.b85encode(zlib.compress(x.tobytes(), 1)).decode() for x in arrays]
    told = exchange(packed)

    def unpack(text: str, like: np.ndarray) -> np.ndarray:
        return np.frombuffer(zlib.decompress(base64.b85decode(text)), like.dtype)

    return [
        np.sum([unpack(texts[i], x) for texts in told], axis=0, dtype=x.dtype).reshape(x.shape)
        for i, x in enumerate(arrays)
    ]


def gather(
    own: Mapping[str, LoRA], outline: Mapping[str, LoRA], owner: Mapping[str, int]
) -> dict[str, LoRA]:
    """Returns the modules that all processes have, in memory.

    Args:
        own: those of this process.
        outline: shapes and dtypes of all.
        owner: by path, the process that has it.
    """
    sizes = np.zeros(jax.process_count(), np.int64)
    for path, process in owner.items():
        sizes[process] += sum(_bytes(x) for x in jax.tree.leaves(outline[path]))
    mine = np.zeros(sizes.max(), np.uint8)
    parts = [
        np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        for path, process in owner.items()
        if process == jax.process_index()
        for x in jax.tree.leaves(own[path])
    ]
    if parts:
        np.concatenate(parts, out=mine[: sizes[jax.process_index()]])
    exchange()  # as communication between devices gives up on those that come late
    every = np.asarray(multihost_utils.process_allgather(mine))
    start = np.zeros(len(sizes), np.int64)

    def take(process: int, like: Any) -> np.ndarray:
        begin = start[process]
        start[process] += _bytes(like)
        return every[process, begin : start[process]].view(like.dtype).reshape(like.shape)

    return {
        path: jax.tree.map(lambda like, p=process: take(p, like), outline[path])
        for path, process in owner.items()
    }


def _bytes(x: Any) -> int:
    return int(np.prod(x.shape)) * x.dtype.itemsize
