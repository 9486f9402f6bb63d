"""``coremerge sweep``."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coremerge_jax.cli.console import print_json, say, show
from coremerge_jax.cli.options import run_option, search_option, takes_recipe
from coremerge_jax.cli.runtime import keep_compiled_programs
from coremerge_jax.cli.signals import Ended
from coremerge_jax.errors import CoreMergeError, FormatError, RecipeError, unknown
from coremerge_jax.recipe import Recipe, format_rule, parse_space, parse_values
from coremerge_jax.record import describe_sources, provenance
from coremerge_jax.search.methods import parse_method

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter
    from coremerge_jax.merging.stream import MergeStream
    from coremerge_jax.search import Record, Sweep
    from coremerge_jax.search.sweep import Search

LOG, CSV, PLOT, BEST = "sweep.jsonl", "sweep.csv", "sweep.svg", "best"

EPILOG = """[bold]Examples[/]

coremerge sweep adapters/* -o sweep --values scale=0.5:2:0.5

coremerge sweep adapters/* -o tuned --values scale=0.1:3:0.1 --evaluate my_task.py:accuracy

coremerge sweep adapters/* -o tuned --rule ties --values ties.density=0.1,0.2,0.5 \
--evaluate my_task.py:accuracy --method line

The function of --evaluate gets the merged adapter (a mapping from module path to factors a and \
b) and returns a number, or numbers by name."""


@takes_recipe
def sweep(
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Folder for the results; a sweep that was interrupted goes on where it was.",
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        search_option(
            "--values",
            metavar="NAME=VALUES",
            help="What to try for scale, or for a parameter of a rule such as ties.density: "
            "numbers 0.1,0.2,0.5 or a range 0.1:2:0.1 (the last included). May be given again.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        search_option(
            metavar="FILE.py:FUNCTION",
            help="What to judge by: a function in a file, or module:function. The best adapter is "
            "written to OUT/best. Default: nothing is judged, each candidate is written.",
        ),
    ] = None,
    method: Annotated[
        str,
        search_option(
            metavar="grid|line[:patience=2]|random[:trials=20,seed=0]",
            help="All combinations; one parameter after another, each until it gets no better; or "
            "random combinations. Default: grid.",
        ),
    ] = "grid",
    objective: Annotated[
        str | None,
        search_option(metavar="METRIC", help="The number that decides. Default: the first."),
    ] = None,
    minimize: Annotated[bool, search_option("--minimize", help="Less of it is better.")] = False,
    *,
    recipe: Recipe,
    as_json: Annotated[bool, run_option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge with many values of parameters, and find the best."""
    recipe.check()
    if output is None:
        raise RecipeError("no output: give -o OUT")
    tried = parse_values(values or ())
    if not tried:
        raise RecipeError("nothing to try: give --values, such as --values scale=0.5:2:0.5")
    if evaluate is None and (method.partition(":")[0] == "line" or objective or minimize):
        raise RecipeError("line, --objective and --minimize compare candidates: give --evaluate")
    judge = _blaming(evaluate, load_function(evaluate)) if evaluate else None
    _check_output(output, recipe.adapters)
    run = _Run(recipe, output)
    search = run.search(tried, method, objective, minimize)
    output.mkdir(parents=True, exist_ok=True)
    result = run.find_best(search, judge) if judge else run.write_all(search, list(tried))
    result.to_csv(output / CSV)
    if judge and find_spec("matplotlib"):
        result.plot(output / PLOT)
    if as_json:
        return print_json({"output": str(output), "candidates": result.rows()})
    if judge:
        show(result.table())
    where = output / BEST if judge else f"{len(result)} candidates in {output}"
    return say(f"wrote {where}; all records are in {output / CSV}")


class _Run:
    """A sweep of the command line."""

    def __init__(self, recipe: Recipe, output: Path) -> None:
        from coremerge_jax.io.formats import open_adapter

        keep_compiled_programs()
        self.recipe, self.output = recipe, output
        self.adapters = [open_adapter(source) for source in recipe.adapters]
        self.sources = describe_sources(recipe, self.adapters)

    def search(
        self, values: Mapping[str, Any], method: str, objective: str | None, minimize: bool
    ) -> "Search":
        import jax

        from coremerge_jax.merging.projected import project
        from coremerge_jax.search.sweep import Search

        recipe = self.recipe
        projected = project(
            self.adapters,
            space=parse_space(recipe.space),
            weights=recipe.weights,
            precision=recipe.precision,
            extras=recipe.extras,
            allow_mismatch=recipe.allow_mismatch,
        )
        return Search(
            projected,
            recipe.build_rule(),
            {"scale": [recipe.scale], **values},
            parse_method(method),
            objective,
            not minimize,
            jax.random.key(recipe.seed),
        )

    def write_all(self, search: "Search", varied: list[str]) -> "Sweep":
        """Writes each candidate to a folder that is named by what varies."""

        def write(record: "Record", merged: "Adapter") -> Mapping[str, float]:
            shown = [f"{name}={record.parameters[name]}" for name in varied]
            self._write(record, merged, ",".join(shown))
            return {}

        return search.collect(search.run(write, self.output / LOG), progress=True)

    def find_best(self, search: "Search", judge: Callable[["Adapter"], Any]) -> "Sweep":
        """Judges the candidates, and writes the best."""
        from coremerge_jax.search.sweep import measured

        records = search.run(measured(judge), self.output / LOG)
        result = search.collect(records, progress=True)
        self._write(result.best, self._recipe(result.best).stream(self.adapters), BEST)
        return result

    def _write(self, record: "Record", merged: "Adapter | MergeStream", name: str) -> None:
        from coremerge_jax.io.peft.writer import save_peft

        recipe = self._recipe(record)
        save_peft(
            merged,
            self.output / name,
            dtype=recipe.dtype,
            rank=recipe.rank,
            energy=recipe.energy,
            force=True,  # of this sweep, before it was interrupted
            card=provenance(recipe, self.sources),
        )

    def _recipe(self, record: "Record") -> Recipe:
        """Returns the recipe that makes a candidate by `coremerge merge`."""
        rules = tuple(map(format_rule, record.rule.rules))
        return dataclasses.replace(self.recipe, rules=rules, scale=record.scale)


def _check_output(output: Path, inputs: Sequence[str]) -> None:
    """Refuses to mix the results with what is not of a sweep, or to touch an input."""
    from coremerge_jax.io.outputs import ADAPTER, check_output, refuse_inputs
    from coremerge_jax.io.untrusted import refuse_url

    refuse_url(output)
    refuse_inputs(output, inputs)
    if not output.is_dir():
        check_output(output, kind=ADAPTER)
        return
    for name in (LOG, CSV, PLOT, BEST):
        if (output / name).is_symlink():
            raise FormatError(f"{output / name}: is a symbolic link; choose another output")
    if not (output / LOG).is_file() and any(output.iterdir()):
        raise FormatError(f"{output}: has files but no {LOG}; choose another output")
    if (output / BEST).exists():
        check_output(output / BEST, kind=ADAPTER, inputs=inputs, force=True)


def _blaming(text: str, judge: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the user's function: its errors become one line with their place in the file."""

    @wraps(judge)
    def run(merged: "Adapter") -> Any:
        with _errors_of_the_user(text):
            return judge(merged)

    return run


@contextmanager
def _errors_of_the_user(text: str) -> Iterator[None]:
    """Turns an error in the user's code into one line with its place and message."""
    try:
        yield
    except (CoreMergeError, Ended):
        raise
    except (Exception, SystemExit) as error:
        if os.environ.get("COREMERGE_DEBUG"):
            raise
        place = _place(error, text.rpartition(":")[0])
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise CoreMergeError(
            f"evaluate {text!r}{place} failed: {what}; mend it (COREMERGE_DEBUG=1 shows the "
            "traceback)"
        ) from error


def _place(error: BaseException, source: str) -> str:
    """Returns `` (line 3, in accuracy)`` for the last line of the user's file that ran, if any."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    stem = source.removesuffix(".py").replace(".", os.sep).rpartition(os.sep)[2]
    frames = [x for x in extract_tb(error.__traceback__) if Path(x.filename).stem == stem]
    return f" (line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""


def load_function(text: str) -> Callable[..., Any]:
    """Returns the function that ``FILE.py:FUNCTION`` or ``module:function`` names.

    Raises:
        RecipeError: there is no such file, module or function.
    """
    source, _, name = text.rpartition(":")
    if not source:
        raise RecipeError(f"evaluate {text!r}: expected FILE.py:FUNCTION or module:function")
    with _errors_of_the_user(text):
        found = _load_module(text, source)
    if not callable(getattr(found, name, None)):
        names = [x for x, value in vars(found).items() if callable(value) and x[0] != "_"]
        raise unknown(f"function in {source}:", name, names)
    return getattr(found, name)


def _load_module(text: str, source: str) -> ModuleType:
    if not source.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        if find_spec(source.partition(".")[0]) is None:
            raise RecipeError(f"evaluate {text!r}: no module {source!r} here or installed")
        return importlib.import_module(source)
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"evaluate {text!r}: there is no file {source}")
    sys.path.insert(0, str(path.resolve().parent))  # as Python does for scripts
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
