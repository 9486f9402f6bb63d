"""Updates added to a tree of parameters in an orbax checkpoint, on the host."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax.checkpoint.base_model.folding import Applied, Folding, Report
from coremerge_jax.checkpoint.orbax_tree import open_tree, write_tree
from coremerge_jax.errors import UnsupportedError
from coremerge_jax.folding import fold_on_host
from coremerge_jax.kernels import find_kernels
from coremerge_jax.layouts import LAYOUTS
from coremerge_jax.lora import Adapter
from coremerge_jax.names import find_names
from coremerge_jax.trees import flatten


class TreeFolding(Folding):
    """An adapter and an orbax checkpoint.

    Args:
        adapter: see `apply_adapter`.
        base: see `apply_adapter`.
        scale: see `apply_adapter`.
        names: see `apply_adapter`.
        head_dim: see `apply_adapter`.
        item: see `open_orbax`.
        step: see `open_orbax`.
        **options: ``scan_axis`` and ``axes`` of `fold_tree`.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: str | Path,
        *,
        scale: float = 1.0,
        names: str | None = None,
        head_dim: int | None = None,
        item: str | None = None,
        step: int | None = None,
        **options: Any,
    ) -> None:
        self._base = open_tree(base, item=item, step=step)
        leaves = flatten(self._base.tree)
        _check_base(str(self._base), leaves)
        inputs = [Path(base), *adapter.folders]
        if names is not None:
            adapter = find_names(names).from_hugging_face(adapter, head_dim=head_dim)
        scan_axes = self._base.scan_axes
        self._kernels = find_kernels(leaves, adapter, scan_axes=scan_axes, **options)
        modules = {
            path: Applied(key, kernel.layer_shape, leaves[key].dtype.name)
            for key, kernel in self._kernels.items()
            for path in kernel.modules
        }
        report = Report({path: modules[path] for path in adapter}, skipped=self._base.others())
        super().__init__(adapter, base, inputs, report, scale)

    def _fold(self, folder: Path, origin: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        tree = self._base.load()
        leaves = flatten(tree)
        for key, kernel in self._kernels.items():
            loras = self.adapter.read(kernel.modules)
            yield from fold_on_host(leaves[key], kernel, loras, self.scale)
        custom = {**self._base.custom, "coremerge": dict(origin)}
        write_tree(folder, tree, item=self._base.item, custom=custom)


def _check_base(where: str, leaves: Mapping[str, Any]) -> None:
    for key, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and _is_quantized(np.dtype(dtype)):
            raise UnsupportedError(
                f"{where}: {key!r} has dtype {dtype}: the base is quantized; apply the adapter to "
                "the model it was made from, then quantize the result"
            )
        layout = next((layout for layout in LAYOUTS.values() if layout.match(key)), None)
        if layout is not None:
            raise UnsupportedError(
                f"{where}: {key!r} is a LoRA factor (layout {layout.name!r}), which would go on to "
                "act beside the update; give a base model's parameters alone"
            )


def _is_quantized(dtype: np.dtype) -> bool:
    return dtype.itemsize == 1 and dtype != np.bool_
