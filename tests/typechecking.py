"""The type checker of tests, beside jaxtyping: see `addopts` in pyproject.toml."""

from typing import Any

from beartype import beartype


def check(what: Any) -> Any:
    """Checks the types of a function or class, but not of a function inside another one.

    Of these, each call makes a new function, for which beartype compiles a new wrapper: a tenth of
    the time of all tests.
    """
    return what if "<locals>" in what.__qualname__ else beartype(what)
