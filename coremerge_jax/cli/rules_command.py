"""``coremerge rules``."""

from typing import Annotated, Any

import typer

from coremerge_jax import declared
from coremerge_jax.cli.console import print_json, print_table


def rules(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List the merge rules and spaces, their parameters and defaults."""
    tables = {"rule": declared.rules(), "space": declared.spaces()}
    if as_json:
        return print_json(
            {
                f"{what}s": {
                    name: {"description": found.description, "parameters": found.defaults}
                    for name, found in table.items()
                }
                for what, table in tables.items()
            }
        )
    for what, table in tables.items():
        rows = []
        for name, found in table.items():
            shown = ", ".join(f"{k}={_show(v)}" for k, v in found.defaults.items())
            rows.append((name, shown, found.description))
        print_table((what, "parameters and defaults", "what it does"), rows)
    return None


def _show(default: Any) -> str:
    return "none" if default is None else str(default)
