"""Tells griffe, which reads the code for the API pages, what the classes of rules are called."""

from typing import Any

import griffe

# What flax has for its dataclasses, and what Python has.
OF_PYTHON = {
    "flax.struct.dataclass": griffe.ExprName("dataclasses.dataclass"),
    "flax.struct.field": griffe.ExprName("dataclasses.field"),
}


class PublicNames(griffe.Extension):
    """``tsv = Tsv`` makes ``tsv`` a class, with parameters as a dataclass of Python has them."""

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Takes dataclasses of flax for those of Python."""
        for decorator in cls.decorators:
            if isinstance(decorator.value, griffe.ExprCall):
                _translate(decorator.value)
            else:
                decorator.value = OF_PYTHON.get(decorator.callable_path, decorator.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Takes fields of flax for those of Python."""
        if isinstance(attr.value, griffe.ExprCall):
            _translate(attr.value)

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        """Takes an assignment of a class for another name of it."""
        for name, member in mod.members.items():
            value = None if member.is_alias else getattr(member, "value", None)
            if isinstance(value, griffe.ExprName) and value.name[0].isupper():
                self._classes[name] = value.canonical_path
                mod.members[name] = griffe.Alias(name, value.canonical_path, parent=mod)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """A public name is that of the class, also where a module is called so too."""
        for name in self._classes.keys() & pkg.members.keys():
            pkg.set_member(name, griffe.Alias(name, self._classes[name], parent=pkg))


def _translate(call: griffe.ExprCall) -> None:
    call.function = OF_PYTHON.get(call.canonical_path, call.function)
