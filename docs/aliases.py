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
                mod.members[name] = griffe.Alias(name, value.canonical_path, parent=mod)


def _translate(call: griffe.ExprCall) -> None:
    call.function = OF_PYTHON.get(call.canonical_path, call.function)
