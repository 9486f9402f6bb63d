"""``coremerge sweep``."""

from pathlib import Path
from typing import Annotated

import typer

from coremerge_jax.cli.console import print_json, say, show
from coremerge_jax.cli.inputs import (
    AllowMissing,
    BatchSize,
    Device,
    Field,
    Inputs,
    Length,
    Reading,
    Tokens,
    inputs_option,
    load_agreement,
)
from coremerge_jax.cli.judge import describe_judge, load_judge
from coremerge_jax.cli.options import Given, Json, parse_values, search_option, takes_recipe
from coremerge_jax.errors import RecipeError
from coremerge_jax.io.outputs import refuse_inputs

EPILOG = """[bold]Examples[/]

coremerge sweep adapters/* -o sweep --values scale=0.5:2:0.5

coremerge sweep adapters/* -o tuned --values scale=0.1:3:0.1 --evaluate my_task.py:accuracy

coremerge sweep adapters/* -o tuned --rule ties --values ties.density=0.1,0.2,0.5 \
--evaluate my_task.py:accuracy --method line

coremerge sweep adapters/math adapters/code -o tuned --values scale=0.2:2:0.2 --base models/llama \
--inputs math.jsonl code.jsonl

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
            help="Folder for the results; an interrupted sweep continues there.",
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        search_option(
            "--values",
            metavar="NAME=VALUES",
            help="Values to try for scale, or for a parameter of a rule such as ties.density: "
            "numbers 0.1,0.2,0.5 or a range 0.1:2:0.1 (the last included). May be given again.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        search_option(
            metavar="FILE.py:FUNCTION",
            help="Function that judges a merged adapter: in a file, or module:function. The best "
            "adapter is written to OUT/best. Default: none; each candidate is written.",
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
        search_option(metavar="METRIC", help="Number that is compared. Default: the first."),
    ] = None,
    minimize: Annotated[
        bool, search_option("--minimize", help="Smaller numbers are better.")
    ] = False,
    inputs: Inputs = None,
    base: Annotated[
        str | None,
        inputs_option(
            "--base",
            metavar="MODEL",
            help="With --inputs, in place of --evaluate: the base model, a folder or Hugging Face "
            "id. Merges are judged by 'agreement', the share of tokens or labels that they predict "
            "as the task's own adapter does; and by 'kl', the divergence from it.",
        ),
    ] = None,
    field: Field = None,
    tokens: Tokens = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    allow_missing: AllowMissing = False,
    *,
    given: Given,
    as_json: Json = False,
) -> None:
    """Merge with many values of parameters, and find the best."""
    recipe = given.recipe()
    if output is None:
        raise RecipeError("no output: give -o OUT")
    if bool(inputs) != bool(base) or (inputs and evaluate):
        raise RecipeError("merges are judged by --evaluate, or by --inputs and --base together")
    tried = parse_values(values or ())
    resolved, judge = recipe.resolve(), None if evaluate is None else load_judge(evaluate)
    judged_by = None if evaluate is None else describe_judge(evaluate)
    if inputs and base:
        refuse_inputs(output, [base, *inputs])
        reading = Reading(base, inputs, field, tokens, length, batch_size, device, allow_missing)
        judge, judged_by = load_agreement(reading, recipe.adapters), reading.describe()

    from coremerge_jax.run import run_sweep

    result = run_sweep(
        resolved,
        output,
        tried,
        evaluate=judge,
        evaluated_by=judged_by,
        method=method,
        objective=objective,
        maximize=not minimize,
        progress=True,
    )
    if as_json:
        return print_json(result.to_dict())
    if result.best:
        show(result.sweep.table())
    where = result.best or f"{len(result.sweep)} candidates in {output}"
    return say(f"wrote {where}; all records are in {result.table}")
