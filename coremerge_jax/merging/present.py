"""Adapters that take part in a merge, and what is the same for all of their modules.

JAX is not imported here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from coremerge_jax.errors import MismatchError
from coremerge_jax.lora import Adapter, AdapterSource, Array, LoRA, Metadata
from coremerge_jax.merging.belonging import common_metadata, present_adapters
from coremerge_jax.merging.extras import merge_extras
from coremerge_jax.merging.groups import GramKind, Group, group_modules
from coremerge_jax.naming.table import TOKENS


@dataclasses.dataclass(frozen=True)
class Present:
    """The adapters that take part in a merge: those of a weight other than 0.

    Attributes:
        adapters: T of them.
        places: int32 ``(T,)``, where they are in the list that the user gave.
        groups: their modules by signature.
        extras: tensors that are not low-rank updates, already merged.
        metadata: that on which all agree.
    """

    adapters: Sequence[AdapterSource]
    places: np.ndarray
    groups: Sequence[Group]
    extras: Mapping[str, Array]
    metadata: Metadata

    @functools.cached_property
    def outlines(self) -> list[Adapter]:
        """The adapters without their factors."""
        return [adapter.outline for adapter in self.adapters]

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The paths of all modules, in the order of the adapters."""
        return tuple(dict.fromkeys(path for adapter in self.outlines for path in adapter))

    def modules(self, group: Group, a: Iterable, b: Iterable) -> dict[str, LoRA]:
        """Returns the merged modules of a group by path, of kinds as in the adapters."""
        kinds = group.kinds(self.outlines)
        rows = zip(group.paths, kinds, a, b, strict=False)  # the last may only fill up
        return {path: LoRA(a=x, b=y, kind=kind) for path, kind, x, y in rows}

    def only(self, wanted: Callable[[str], bool]) -> "Present":
        """Returns the same with the modules whose path is wanted."""
        groups = [group.only(wanted) for group in self.groups]
        return dataclasses.replace(self, groups=[group for group in groups if group.paths])

    def with_inputs(self, kind: Callable[[str, np.ndarray], GramKind | None]) -> "Present":
        """Returns the same with groups of modules that have Gram matrices of one kind.

        Args:
            kind: as in `Group.by_inputs`.
        """
        groups = [part for group in self.groups for part in group.by_inputs(kind)]
        return dataclasses.replace(self, groups=groups)

    def adapter(self, modules: Mapping[str, LoRA]) -> Adapter:
        """Returns the merged adapter, its modules in the order of the adapters."""
        ordered = {path: modules[path] for path in self.paths if path in modules}
        return Adapter(ordered, metadata=self.metadata, extras=self.extras)


def find_present(
    adapters: Sequence[AdapterSource],
    weights: Any,
    extras: str,
    allow_other_base: bool,
    allow_disjoint: bool,
) -> Present:
    """Finds the adapters that take part, checks that they belong together and groups modules.

    Raises:
        MismatchError: there is none, or they do not belong together.
        UnsupportedError: they have extras and no policy for them was given.
    """
    found = present_adapters(adapters, weights, allow_other_base, allow_disjoint)
    tasks, present = list(found), list(found.values())
    merged = merge_extras(present, extras, [t + 1 for t in tasks])
    _refuse_tokens_of_adapted(merged.tensors, present)
    return Present(
        adapters=present,
        places=np.asarray(tasks, np.int32),
        groups=group_modules(present),
        extras=merged.tensors,
        metadata=common_metadata(present, merged.config, merged.beside),
    )


def _refuse_tokens_of_adapted(extras: Iterable[str], adapters: Sequence[AdapterSource]) -> None:
    """Refuses trained token rows of an embedding that another adapter adapts as a whole.

    Raises:
        MismatchError: naming the embedding. peft cannot have both in one adapter.
    """
    for name in extras:
        owner = name.removesuffix(TOKENS)
        having = [adapter for adapter in adapters if owner != name and owner in adapter.outline]
        if having:
            raise MismatchError(
                f"embedding {owner!r}: adapter {having[0].metadata.name!r} adapts it as a whole, "
                "and another one has trained rows of it (trainable_token_indices); one adapter "
                "cannot have both: leave the rows out with extras='drop' (--extras drop), or one "
                "of the adapters"
            )
