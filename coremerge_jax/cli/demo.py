"""``coremerge demo``."""

from typing import Annotated

import typer


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge the example that comes with the package, and show how well each method does."""
    raise NotImplementedError(as_json)
