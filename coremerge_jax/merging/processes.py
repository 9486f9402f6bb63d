"""Processes of one job (`jax.distributed`): shares of the work, and messages between them.

Messages go through the job's coordinator, in the same order in all processes. A process that fails
sends its error in place of a value, so that all fail. If a process dies, JAX ends the others after
the heartbeat timeout of `jax.distributed.initialize`.
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

_POLL = 1000  # milliseconds: Python handles an interrupt only between two calls of JAX

_messages = itertools.count()


def exchange(value: Any = None) -> list[Any]:
    """Gathers a value from each process, in their order. Values are plain data, as in JSON.

    Raises:
        ProcessError: a process has failed.
    """
    if not jax.distributed.is_initialized():
        return [value]
    name = _send({"value": value})
    messages = [json.loads(_wait_for(f"{name}/{i}")) for i in range(jax.process_count())]
    for i, message in enumerate(messages):
        if "error" in message:
            raise ProcessError(f"process {i} of {len(messages)} failed: {message['error']}")
    return [message["value"] for message in messages]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Guards a block before an `exchange`, which fails in all processes if the block does."""
    try:
        yield
    except ProcessError:  # the others have it already
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        _send({"error": "interrupted" if interrupted else str(error) or type(error).__name__})
        raise


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Guards a block: it ends without an exception only if it did so in all processes."""
    with failing_together():
        yield
    exchange()


def _send(message: Mapping[str, Any]) -> str:
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
    from jax._src import distributed  # there is no public access; orbax uses the same

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
    """Returns sums over all processes of arrays that are small or mostly zeros."""
    packed = [base64.b85encode(zlib.compress(x.tobytes(), 1)).decode() for x in arrays]
    received = exchange(packed)

    def unpack(text: str, like: np.ndarray) -> np.ndarray:
        return np.frombuffer(zlib.decompress(base64.b85decode(text)), like.dtype)

    return [
        np.sum([unpack(texts[i], x) for texts in received], axis=0, dtype=x.dtype).reshape(x.shape)
        for i, x in enumerate(arrays)
    ]


def gather(
    own: Mapping[str, LoRA], outline: Mapping[str, LoRA], owner: Mapping[str, int]
) -> dict[str, LoRA]:
    """Gathers the modules of all processes in memory.

    Args:
        own: the modules of this process.
        outline: shapes and dtypes of all modules.
        owner: the process of each module, by path.
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
    exchange()  # collectives time out if processes arrive far apart
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
