"""The command line in the process of the tests."""

import contextlib
import signal
import sys
import threading

import pytest

from coremerge_jax.cli import main

SIGNALS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]


@contextlib.contextmanager
def restored_process():
    """A block after which the process answers signals and stray exceptions as before."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    hooks = sys.unraisablehook, threading.excepthook
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = hooks
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(*args):
    """Runs `coremerge ARGS`; returns its exit code."""
    with restored_process(), pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    return exit_.value.code or 0
