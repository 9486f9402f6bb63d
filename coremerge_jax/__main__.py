"""The entry of the command line: it answers Ctrl-C before anything heavy is imported."""

import gc
import os
import signal
import sys
from typing import Any


def main() -> None:
    """Runs the command line and exits."""
    # Nothing is to be tidied up yet. A shell has a background job ignore the signal: that stays.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    # Imports and traces make many objects that stay. By default, Python would search them for
    # cycles all the time, and once more at its end: a sixth of the time of a short command.
    gc.set_threshold(50_000)
    from coremerge_jax.cli import main as run

    try:
        run()
    finally:
        gc.freeze()


def _leave(*_: Any) -> None:
    """Ends the process at once."""
    if sys.stderr is not None:
        os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
