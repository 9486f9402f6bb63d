"""Timing of calls that run in turns, and the time that the cost model expects."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import coremerge_jax as cm
from coremerge_jax.merging.cost import Machine, expected_seconds

PATIENCE = 8.0  # seconds: a contender that has used as many in a row of the table is not repeated,
LEAST = 3  # unless nothing is scaled: then there are as many rounds, so that the median is one


@dataclasses.dataclass
class Runner:
    """One contender on one row of the table.

    Attributes:
        name: key of the contender, or ``"floor"`` or ``"read"``.
        call: the call to time.
        scale: modules of the shape per module that the call merges.
        merged: the result of the last call.
        seconds: of each call, scaled.
        first: seconds of the first call, scaled, if it compiles.
    """

    name: str
    call: Callable[[], Any]
    scale: float = 1.0
    merged: Any = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    first: float | None = None

    def warm_up(self) -> None:
        """Runs once, to compile."""
        self.first = self._run()

    def round(self) -> None:
        """Runs once more, unless it has taken long enough."""
        least = LEAST if self.scale == 1 else 1
        if len(self.seconds) < least or sum(self.seconds) / self.scale < PATIENCE:
            self.seconds.append(self._run())

    def _run(self) -> float:
        self.merged = None
        gc.collect()
        time.sleep(0.05)  # idle threads of the library that ran before spin for a while
        start = time.perf_counter()
        self.merged = self.call()
        return (time.perf_counter() - start) * self.scale

    def record(self) -> dict[str, Any]:
        """Returns the result, for JSON."""
        median = statistics.median(self.seconds)
        record: dict[str, Any] = {
            "seconds": median,
            "min": min(self.seconds),
            "runs": len(self.seconds),
        }
        if self.first is not None:
            record["compile"] = max(self.first - median, 0.0) / self.scale
        if self.scale != 1:
            record["scaled_by"] = self.scale
        return record


def model_seconds(stream: cm.MergeStream, rule: cm.rules.Chain, rates: Machine) -> float:
    """Returns the seconds that the cost model expects, without compiling and files."""
    seconds = expected_seconds(stream.costs(), rule, rates, stream.workers, programs=0)
    return sum(seconds[stage] for stage in ("products", "core", "copies"))
