"""Signals that end a command, after it has removed its temporary files."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_PATIENCE = 10.0  # seconds that cleaning up after a signal may take

_IMPORTS = 5.0  # seconds that a signal waits for an import to end


class Ended(SystemExit):
    """End of a command by a signal.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def unwind_on_signals() -> Callable[[int], None]:
    """Makes the first signal raise an exception, so that the command removes temporary files.

    Further signals are ignored for a few seconds; after that, one ends the process at once. Signals
    that the process ignores already stay ignored. During an import, the signal waits: extension
    modules crash, or swallow it, if an exception is raised while they are initialized. Where Python
    cannot raise, as in a finalizer, it comes again.

    Returns:
        A function for the end of the command: after it is called with an exit code, any signal
        ends the process at once with that code, also while the interpreter shuts down.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    caught = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    came: list[float] = []  # times of the signals
    since: list[float] = []  # time at which the command began to unwind

    def stop(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if since and now - since[0] < _PATIENCE:
            return None
        if since:
            os._exit(128 + number)
        came.append(now)
        if now - came[0] < _IMPORTS and _is_importing(frame):
            return _send_again(number)
        since.append(now)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Ended(number)

    shown = sys.unraisablehook

    def repeat(unraisable: Any) -> None:
        if not isinstance(error := unraisable.exc_value, KeyboardInterrupt | Ended):
            return shown(unraisable)
        since.clear()
        return _send_again(signal.SIGINT if isinstance(error, KeyboardInterrupt) else error.number)

    def end(code: int) -> None:
        for number in caught:
            signal.signal(number, lambda *_: os._exit(code))
        others = [x for x in threading.enumerate() if x is not threading.main_thread()]
        if since and not all(x.daemon for x in others):
            # Python would wait for these threads, and some wait for work that the signal cut off.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    for number in caught:
        signal.signal(number, stop)
    sys.unraisablehook = repeat
    return end


def _send_again(number: int) -> None:
    again = threading.Timer(0.05, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _is_importing(frame: FrameType | None) -> bool:
    """Returns True if a frame, or one that called it, belongs to Python's import system."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
