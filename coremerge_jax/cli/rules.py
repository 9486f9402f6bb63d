"""``coremerge rules``."""

import inspect
from typing import Annotated, Any

import typer

from coremerge_jax.cli.console import print_json, print_table


def rules(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the merge rules, their parameters and defaults."""
    from coremerge_jax.rules import RULES

    found = {name: _describe(make) for name, make in RULES.items()}
    if as_json:
        return print_json(found)
    rows = [
        (
            name,
            ", ".join(f"{k}={_show(v)}" for k, v in rule["parameters"].items()),
            rule["description"],
        )
        for name, rule in found.items()
    ]
    return print_table(("rule", "parameters and defaults", "what it does"), rows)


def _describe(make: Any) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters.values()
    return {
        "description": (inspect.getdoc(make) or "").split("\n", 1)[0],
        "parameters": {parameter.name: parameter.default for parameter in parameters},
    }


def _show(default: Any) -> str:
    return "none" if default is None else str(default)
