"""``coremerge rules``."""

import inspect
from typing import Annotated, Any

import typer

from coremerge_jax.cli.console import print_json, print_table


def rules(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List the merge rules and spaces, their parameters and defaults."""
    from coremerge_jax.rules import RULES
    from coremerge_jax.spaces import SPACES

    tables = {
        what: {name: _describe(make) for name, make in table.items()}
        for what, table in (("rule", RULES), ("space", SPACES))
    }
    if as_json:
        return print_json({f"{what}s": table for what, table in tables.items()})
    for what, table in tables.items():
        rows = []
        for name, found in table.items():
            shown = ", ".join(f"{k}={_show(v)}" for k, v in found["parameters"].items())
            rows.append((name, shown, found["description"]))
        print_table((what, "parameters and defaults", "what it does"), rows)
    return None


def _describe(make: Any) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters.values()
    return {
        "description": (inspect.getdoc(make) or "").split("\n", 1)[0],
        "parameters": {parameter.name: parameter.default for parameter in parameters},
    }


def _show(default: Any) -> str:
    return "none" if default is None else str(default)
