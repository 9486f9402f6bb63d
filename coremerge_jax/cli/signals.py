"""Signals that end a command."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

_PATIENCE = 10.0  # seconds that the tidying up after a signal may take


class Ended(SystemExit):
    """The end of a command by a signal."""


def unwind_on_signals() -> Callable[[int], None]:
    """Has the first signal to end unwind the command, so that temporary files go.

    Those that come meanwhile are ignored; after a few seconds, one ends the process at once. What
    the shell has had the process ignore, it goes on to ignore.

    Returns:
        What has any further signal end the process at once, with an exit code: for the end of the
        command, when the interpreter shuts down.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    caught = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    since: list[float] = []

    def stop(number: int, _: Any) -> None:
        if since and time.monotonic() - since[0] < _PATIENCE:
            return
        if since:
            os._exit(128 + number)
        since.append(time.monotonic())
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Ended(128 + number)

    def end(code: int) -> None:
        for number in caught:
            signal.signal(number, lambda *_: os._exit(code))

    for number in caught:
        signal.signal(number, stop)
    return end
