"""The command line ``coremerge``: one module per command, which parses, calls and shows.

Commands import JAX and all that needs it when they run, so that help, completion and usage errors
come at once.
"""

import errno
import io
import logging
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from coremerge_jax import __version__
from coremerge_jax.cli.apply_command import EPILOG as APPLY_EPILOG
from coremerge_jax.cli.apply_command import apply
from coremerge_jax.cli.collect_command import EPILOG as COLLECT_EPILOG
from coremerge_jax.cli.collect_command import collect
from coremerge_jax.cli.console import say
from coremerge_jax.cli.convert_command import EPILOG as CONVERT_EPILOG
from coremerge_jax.cli.convert_command import convert
from coremerge_jax.cli.demo_command import demo
from coremerge_jax.cli.inputs import TakesInputs
from coremerge_jax.cli.inspect_command import inspect
from coremerge_jax.cli.merge_command import EPILOG, merge
from coremerge_jax.cli.pack_command import app as pack
from coremerge_jax.cli.report_command import EPILOG as REPORT_EPILOG
from coremerge_jax.cli.report_command import report
from coremerge_jax.cli.rules_command import rules
from coremerge_jax.cli.signals import Ended, unwind_on_signals
from coremerge_jax.cli.sweep_command import EPILOG as SWEEP_EPILOG
from coremerge_jax.cli.sweep_command import sweep
from coremerge_jax.cli.verify_command import EPILOG as VERIFY_EPILOG
from coremerge_jax.cli.verify_command import verify
from coremerge_jax.errors import CoreMergeError, CoreMergeWarning, RecipeError

app = typer.Typer(
    name="coremerge",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=EPILOG)(merge)
app.command(epilog=SWEEP_EPILOG, cls=TakesInputs)(sweep)
app.add_typer(pack, name="pack")
app.command(epilog=COLLECT_EPILOG, cls=TakesInputs)(collect)
app.command(epilog=APPLY_EPILOG)(apply)
app.command(epilog=VERIFY_EPILOG)(verify)
app.command()(inspect)
app.command(epilog=REPORT_EPILOG)(report)
app.command(epilog=CONVERT_EPILOG)(convert)
app.command()(rules)
app.command()(demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"coremerge {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted. "
    "COREMERGE_DEBUG=1 shows the traceback of an error."
)
def _coremerge(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Merge many LoRA adapters into one, in core space."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits. An error is shown in one line, without a traceback."""
    debug = bool(os.environ.get("COREMERGE_DEBUG"))
    if not os.environ.get("COLUMNS", "80").strip("0"):
        del os.environ["COLUMNS"]  # rich would print nothing
    if not debug:
        _quiet_libraries()
    end = unwind_on_signals()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the program that started the command
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show Δ
    with warnings.catch_warnings():
        if not debug:
            _print_warnings()
        try:
            code = _run(args, debug=debug)
        except Ended as ended:
            code = int(ended.code or 0)
    end(code)
    sys.exit(code)


def _run(args: Sequence[str] | None, *, debug: bool) -> int:
    """Runs a command; returns its exit code."""
    try:
        code = app(args, standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug:
            raise
        code = _report(error)
    if code == 130:
        say("interrupted", err=True)
    return code or 0


def _quiet_libraries() -> None:
    """Hides what libraries print beside raising errors."""
    # XLA lists processor features that it would prefer with every program from its cache. JAX sets
    # the level to 1, also for the processes that a program with JAX starts.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # After a first failure, orbax reports further ones from its threads and event loops.
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None


def _print_warnings() -> None:
    """Prints warnings of coremerge as notes, and hides those of libraries.

    Warnings of a user's own code, such as the function of ``--evaluate``, are shown as usual.
    """
    shown = warnings.showwarning
    folders = sysconfig.get_paths()
    libraries = tuple(folders[x] for x in ("stdlib", "purelib", "platlib"))
    libraries += (str(Path(__file__).parents[1]),)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, CoreMergeWarning):
            say(f"note: {' '.join(str(message).split())}", err=True)
        elif not filename.startswith((*libraries, "<")):
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    warnings.simplefilter("always", CoreMergeWarning)


_ADVICE = {
    errno.ENOSPC: "make room, or choose another output",
    errno.EDQUOT: "make room, or choose another output",
    errno.EFBIG: "the disk or a limit allows no file of this size; choose another output",
    errno.EROFS: "choose another output",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def _report(error: Exception) -> int:
    """Prints an error in one line; returns the exit code."""
    code = 1
    if hasattr(error, "format_message"):  # typer's own usage errors
        text, code = _describe_usage_error(error), 2
    elif isinstance(error, CoreMergeError):
        text, code = str(error), 2 if isinstance(error, RecipeError) else 1
    elif isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        advice = _ADVICE.get(error.errno or 0)
        text = f"{where}{error.strerror or error}{f'; {advice}' if advice else ''}"
    elif isinstance(error, MemoryError):
        text = str(error) or "out of memory"
    elif reason := _why_jax_fails():
        text = reason
    else:
        text = (
            f"unexpected {type(error).__name__} ({error}); this is a bug in coremerge: please "
            "report it, with the traceback that COREMERGE_DEBUG=1 shows"
        )
    if text:
        say(f"error: {' '.join(text.split())}", err=True)
    return code


def _why_jax_fails() -> str:
    """Returns why JAX cannot start here; nothing if it can."""
    try:
        import jax

        jax.devices()
    except Exception as error:
        given = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("JAX_")]
        hint = f"; check {', '.join(given)}" if given else ""
        return f"JAX cannot start ({type(error).__name__}: {error or 'no reason given'}){hint}"
    return ""


def _describe_usage_error(error: Any) -> str:
    """Returns the message and the command for help; nothing if help has just been shown."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    return f"{message} (see '{context.command_path} --help')" if message and context else message
