"""The command line ``coremerge``: one small module a command.

Commands import the heavy parts of the library when they run, so that help, completion and usage
errors come at once.
"""

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from coremerge_jax import __version__
from coremerge_jax.cli.apply import EPILOG as APPLY_EPILOG
from coremerge_jax.cli.apply import apply
from coremerge_jax.cli.convert import EPILOG as CONVERT_EPILOG
from coremerge_jax.cli.convert import convert
from coremerge_jax.cli.demo import demo
from coremerge_jax.cli.inspect import inspect
from coremerge_jax.cli.merge import EPILOG, merge
from coremerge_jax.cli.report import EPILOG as REPORT_EPILOG
from coremerge_jax.cli.report import report
from coremerge_jax.cli.rules import rules
from coremerge_jax.cli.sweep import EPILOG as SWEEP_EPILOG
from coremerge_jax.cli.sweep import sweep
from coremerge_jax.cli.verify import EPILOG as VERIFY_EPILOG
from coremerge_jax.cli.verify import verify
from coremerge_jax.errors import CoreMergeError, RecipeError

app = typer.Typer(
    name="coremerge",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=EPILOG)(merge)
app.command(epilog=SWEEP_EPILOG)(sweep)
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
    """Runs the command line and exits: one line, not a traceback, for a user's mistake."""
    # Else XLA lists, with every program from its cache, processor features that it would prefer.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _quiet_orbax()
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: temporary files go
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show Δ
    try:
        code = app(args, standalone_mode=False)
    except Exception as error:
        if os.environ.get("COREMERGE_DEBUG"):
            raise
        code = _report(error)
    if code == 130:
        typer.echo("interrupted", err=True)
    sys.exit(code)


def _quiet_orbax() -> None:
    """Of what it says beside raising errors: log messages, and reads that fail after the first."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    shown = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = hook


def _report(error: Exception) -> int:
    """Prints an error that is the user's to mend, and gives the exit code; raises others."""
    if hasattr(error, "format_message"):  # typer's own usage errors
        text, code = _describe_usage_error(error), 2
    elif isinstance(error, CoreMergeError):
        text, code = str(error), 2 if isinstance(error, RecipeError) else 1
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text, code = f"{where}{error.strerror or error}", 1
    elif isinstance(error, MemoryError):
        text, code = str(error) or "out of memory", 1
    else:
        raise error
    if text:
        typer.echo(f"error: {' '.join(text.split())}", err=True)
    return code


def _describe_usage_error(error: Any) -> str:
    """The message, and where to read more; nothing where help has just been shown."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    return f"{message} (see '{context.command_path} --help')" if message and context else message
