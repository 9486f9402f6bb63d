"""Rules and spaces as their classes declare them, read from the source.

Importing the classes imports JAX, for which a list of names, a completion or a usage error should
not wait. Here their names, parameters, defaults and first lines come from the syntax alone, unless
the classes have been imported anyway: then what a program has added to the tables is there too.
"""

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A rule or a space, as it is declared.

    Attributes:
        description: the first line of its docstring.
        defaults: the default of each parameter.
    """

    description: str
    defaults: Mapping[str, Any]


def rules() -> Mapping[str, Declaration]:
    """Returns the declarations of `rules.RULES`, in its order."""
    return _find("rules", "RULES")


def spaces() -> Mapping[str, Declaration]:
    """Returns the declarations of `spaces.SPACES`, in its order."""
    return _find("spaces", "SPACES")


def _find(folder: str, table: str) -> Mapping[str, Declaration]:
    known = getattr(sys.modules.get(f"{__package__}.{folder}"), table, None)
    if known is None:
        return _read_once(folder, table)
    return {name: describe(make) for name, make in known.items()}


def describe(make: Callable[..., Any]) -> Declaration:
    """Returns the declaration of a function or class that is imported."""
    parameters = inspect.signature(make).parameters.items()
    description = (inspect.getdoc(make) or "").split("\n", 1)[0]
    return Declaration(description, {name: x.default for name, x in parameters})


@functools.cache
def _read_once(folder: str, table: str) -> Mapping[str, Declaration]:
    return dict(_read(folder, table))


def _read(folder: str, table: str) -> Iterator[tuple[str, Declaration]]:
    """Yields names and declarations of the classes that the table of a folder goes through."""
    root = Path(__file__).parent
    body = _parse(root / folder / "__init__.py")
    modules = {
        alias.name: str(node.module)
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (found,) = (
        node.value
        for node in body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table
    )
    assert isinstance(found, ast.DictComp)
    listed = found.generators[0].iter
    assert isinstance(listed, ast.Tuple)
    for name in map(ast.unparse, listed.elts):
        file = root.parent.joinpath(*modules[name].split(".")).with_suffix(".py")
        yield name, _declaration(name, _parse(file))


@functools.cache
def _parse(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body


def _declaration(name: str, body: list[ast.stmt]) -> Declaration:
    """Returns the declaration of a dataclass. Its fields are its own and have literal defaults."""
    (found,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {
        ast.unparse(node.target): ast.literal_eval(_default(node.value))
        for node in found.body
        if isinstance(node, ast.AnnAssign) and node.value is not None
        if not ast.unparse(node.annotation).startswith("ClassVar")
    }
    return Declaration((ast.get_docstring(found) or "").split("\n", 1)[0], fields)


def _default(value: ast.expr) -> ast.expr:
    """Returns the default of a field, which ``dataclasses.field(default=...)`` may hold."""
    if not isinstance(value, ast.Call):
        return value
    return next(keyword.value for keyword in value.keywords if keyword.arg == "default")
