"""Compiled merges: one small matrix for each module in place of the merged factors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from coremerge_jax.lora import Adapter, AdapterSource, Array, LoRA
from coremerge_jax.merging.job import overflow
from coremerge_jax.merging.merge import merge_stream
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.present import Present
from coremerge_jax.merging.program import lift_stack
from coremerge_jax.merging.stacks import stack_factors
from coremerge_jax.merging.stream import MergeStream
from coremerge_jax.rules import Rule


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge of some adapters: ``ΔW = B C A`` for each module.

    A and B are the factors of the adapters that have the module, stacked in their order, and C
    has a block for each pair of adapters. The scale of the merge is part of it. Any rule gives
    such matrices in core space.

    Attributes:
        cores: C by path of the module, ``(R, R)``.
        present: the adapters.
    """

    cores: Mapping[str, Array]
    present: Present

    def __repr__(self) -> str:
        names = ", ".join(str(adapter.metadata.name) for adapter in self.adapters)
        return f"Merge({names}; {len(self.cores)} modules, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """The number of bytes of all matrices."""
        return sum(core.nbytes for core in self.cores.values())

    @property
    def adapters(self) -> Sequence[AdapterSource]:
        """The adapters of which the matrices are: those of a weight other than 0."""
        return self.present.adapters

    def adapter(self) -> Adapter:
        """Returns the merged adapter.

        Raises:
            MismatchError: the merged update of a module overflows.
        """
        modules: dict[str, LoRA] = {}
        with computing(None) as dtype:
            for group in self.present.groups:
                a, b = stack_factors(group, self.present.adapters)
                cores = np.stack([np.asarray(self.cores[path], dtype) for path in group.paths])
                kept, lifted, good = lift_stack(a, b, cores, keep_a=True)
                if not jax.device_get(good).all():
                    kept, lifted, _ = lift_stack(a, b, cores, keep_a=False)
                found = a if kept is None else np.asarray(kept), np.asarray(lifted)
                for path, one in zip(group.paths, found[1], strict=True):
                    if not np.isfinite(one).all():
                        raise overflow(path, one.dtype)
                modules |= self.present.modules(group, *found)
        return self.present.adapter(modules)


def compile_merge(
    adapters: Sequence[Adapter],
    rule: Rule | Callable[[jax.Array], jax.Array],
    *,
    dtype: str = "float32",
    **options: Any,
) -> Merge:
    """Merges adapters to one small matrix for each module.

    Of adapters of a `Pack`, only these matrices are computed with, at a cost that does not depend
    on the size of the modules. Then many merges fit where one adapter does.

    Args:
        adapters: at least one, such as a pack.
        rule: how to merge, as in `merge`.
        dtype: of the matrices.
        **options: those of `merge`, without ``mesh``.

    Raises:
        CoreMergeError: as `merge`.
        UnsupportedError: merges in this space are no such matrices.
    """
    return compile_stream(merge_stream(adapters, rule, **options), dtype)


def compile_stream(stream: MergeStream, dtype: str) -> Merge:
    """Merges to matrices what a stream would merge to factors; see `compile_merge`."""
    cores = {}
    for path, core in stream.compile().items():
        cores[path] = core.astype(dtype)
        if not np.isfinite(cores[path]).all():
            raise overflow(path, cores[path].dtype)
    return Merge(cores, stream.present)
