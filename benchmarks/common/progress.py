"""Progress of long steps, as lines with the time that is left."""

import time
from collections.abc import Callable
from typing import Any


class Progress:
    """A report on the steps of one piece of work.

    Args:
        name: of the work.
        say: takes a line.
        every: seconds between lines, at least.
    """

    def __init__(self, name: str, say: Callable[[str], Any], every: float = 20.0) -> None:
        self._name, self._say, self._every = name, say, every
        self._start = self._last = time.monotonic()
        self._first = 0

    def __call__(self, done: int, total: int, more: str = "") -> None:
        """Reports that so many steps of all are done."""
        now = time.monotonic()
        if not self._first:  # the first step compiles
            self._first, self._start = done, now
        elif now - self._last >= self._every or done == total:
            left = (now - self._start) / (done - self._first) * (total - done)
            self._say(f"{self._name}: {done} of {total}{more}, {_duration(left)} left")
            self._last = now


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
