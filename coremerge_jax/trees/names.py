"""The names of an implementation of a model family, against Hugging Face's."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from coremerge_jax.errors import MismatchError, UnsupportedError, hint
from coremerge_jax.lora import Adapter, Array, LoRA
from coremerge_jax.trees.arrays import numpy_or_jax

# From B, the size of a head, and the direction (True: back to Hugging Face's) to another B.
Change = Callable[[Array, int, bool], Array]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The names of one kernel.

    Attributes:
        ours: in the JAX implementation, with ``{i}`` for the layer.
        theirs: Hugging Face's; several if one kernel here has the outputs of several there.
        key: of its factors in a tree, with ``{factor}``, and with ``{i}`` unless layers are
            stacked.
        heads: ``"a"`` or ``"b"``, the factor in which attention heads have an axis of their own.
        change: a change of the outputs, where the implementation orders or scales them otherwise.
    """

    ours: str
    theirs: tuple[str, ...]
    key: str
    heads: str | None = None
    change: Change | None = None


@dataclasses.dataclass(frozen=True)
class NameMap:
    """The names of one implementation of a model family.

    Attributes:
        name: for options.
        layout: of its trees, a name of `layouts.LAYOUTS`.
        rules: one for each kernel of a layer, or of the model.
        scan_axis: where its trees stack layers, None if they do not.
        item: the item of its checkpoints that holds the tree.
    """

    name: str
    layout: str
    rules: tuple[Rule, ...]
    scan_axis: int | None = None
    item: str = "state"

    def to_hugging_face(self, adapter: Adapter, *, head_dim: int | None = None) -> Adapter:
        """Returns the adapter with Hugging Face's names, its fused kernels split.

        Args:
            adapter: with this implementation's names.
            head_dim: the size of an attention head, where outputs have to be reordered.

        Raises:
            MismatchError: a module has no name there.
            UnsupportedError: ``head_dim`` is needed, or does not fit.
        """
        modules: dict[str, LoRA] = {}
        for path, lora in adapter.read(adapter).items():
            rule, layer = self.rule(path, adapter)
            changed = _changed(path, lora, rule, head_dim, back=True)
            parts = len(rule.theirs)
            if len(changed.b) % parts:
                raise UnsupportedError(
                    f"module {path!r} has {len(changed.b)} outputs, not {parts} equal parts"
                )
            size = len(changed.b) // parts
            for i, name in enumerate(rule.theirs):
                b = changed.b[i * size : (i + 1) * size]
                modules[name.format(i=layer)] = dataclasses.replace(changed, b=b)
        return adapter.replace(modules=modules)

    def from_hugging_face(self, adapter: Adapter, *, head_dim: int | None = None) -> Adapter:
        """Inverts `to_hugging_face`; an adapter that already has these names is returned unchanged.

        Kernels that are one here get an A with the rows of all of them.

        Args:
            adapter: with Hugging Face's names.
            head_dim: the size of an attention head, where outputs have to be reordered.

        Raises:
            MismatchError: a module has no name here, or not all parts of a fused kernel are there.
            UnsupportedError: ``head_dim`` is needed, or does not fit.
        """
        if self.fits(adapter.outline):
            return adapter
        waiting = dict(adapter.read(adapter))
        modules: dict[str, LoRA] = {}
        for path in adapter:
            if path not in waiting:  # fused with an earlier one
                continue
            rule, layer = self.rule(path, adapter, theirs=True)
            names = [name.format(i=layer) for name in rule.theirs]
            missing = [name for name in names if name not in waiting]
            if missing:
                raise MismatchError(
                    f"{path!r} is fused with {missing[0]!r} in {self.name}, which the adapter does "
                    "not have; merge it with an adapter that has both"
                )
            lora = _fuse([waiting.pop(name) for name in names])
            modules[rule.ours.format(i=layer)] = _changed(path, lora, rule, head_dim, back=False)
        return adapter.replace(modules=modules)

    def fits(self, paths: Iterable[str]) -> bool:
        """Returns True if all of these are names of this implementation."""
        return all(
            any(_match(rule.ours, path) is not None for rule in self.rules) for path in paths
        )

    def rule(
        self, path: str, adapter: Mapping[str, LoRA], *, theirs: bool = False
    ) -> tuple[Rule, str]:
        """Returns the rule for a module, and its layer.

        Of several that fit, the one that fuses most modules which the adapter has, with as many
        outputs each: implementations that fuse query, key and value do so if there are as many
        heads of each (gemma/gm/nn/_modules.py, tunix/models/gemma3/model.py).

        Raises:
            MismatchError: there is none.
        """
        found = []
        known: list[str] = []
        for rule in self.rules:
            names = rule.theirs if theirs else (rule.ours,)
            known += names
            layer = next((x for x in (_match(name, path) for name in names) if x is not None), None)
            if layer is not None:
                parts = [adapter.get(name.format(i=layer)) for name in names]
                alike = None not in parts and len({x.shape for x in parts if x}) == 1
                found.append((len(names) if alike else -len(names), rule, layer))
        if not found:
            raise MismatchError(
                f"module {path!r} has no name in {self.name}{hint(path, known)}, with a number for "
                "{i}"
            )
        _, rule, layer = max(found, key=lambda entry: entry[0])
        return rule, layer


def _match(template: str, path: str) -> str | None:
    """Returns the layer that a template names, "" for none; None where it does not fit."""
    if "{i}" not in template:
        return "" if path == template else None
    before, after = map(re.escape, template.split("{i}"))
    found = re.fullmatch(rf"{before}(\d+){after}", path)
    return found[1] if found else None


def _changed(path: str, lora: LoRA, rule: Rule, head_dim: int | None, *, back: bool) -> LoRA:
    if rule.change is None:
        return lora
    if head_dim is None:
        raise UnsupportedError(
            f"module {path!r}: the outputs of each attention head are stored in another order; "
            "give head_dim (--head-dim)"
        )
    if lora.shape[0] % head_dim or head_dim % 2:
        raise UnsupportedError(
            f"module {path!r} has {lora.shape[0]} outputs; head_dim={head_dim} does not fit"
        )
    return dataclasses.replace(lora, b=rule.change(lora.b, head_dim, back))


def _fuse(loras: Sequence[LoRA]) -> LoRA:
    """Fuses updates into one with the outputs of all: A below each other, B in blocks."""
    if len(loras) == 1:
        return loras[0]
    on_host = numpy_or_jax(list(loras)) is np
    xp, linalg = (np, scipy.linalg) if on_host else (jnp, jax.scipy.linalg)
    a = xp.concatenate([lora.a for lora in loras])
    return dataclasses.replace(loras[0], a=a, b=linalg.block_diag(*(lora.b for lora in loras)))
