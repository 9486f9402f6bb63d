"""The kernels of a tree of parameters that an adapter changes."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping

from coremerge_jax.errors import FormatError, MismatchError, UnsupportedError, hint
from coremerge_jax.lora import FLOATS, Adapter
from coremerge_jax.trees.arguments import check_patterns, refuse_extras
from coremerge_jax.trees.axes import Shape, find_kernel_axes, lengths, misfit
from coremerge_jax.trees.paths import Leaf, first_match, module_paths

# The number of a layer or an expert in a module's path.
_NUMBER = re.compile(r"\.\d+(?=\.|$)|\[\d+\]")

_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Target of the updates of one or more modules.

    Attributes:
        key: of the kernel in its tree.
        shape: of it.
        axes: a letter each: i input, o output, l layer or expert.
        modules: the adapter's modules of this kernel; each one's place among the layers.
    """

    key: str
    shape: Shape
    axes: str
    modules: Mapping[str, int]

    def find(self, letter: str) -> list[int]:
        """Returns the axes with a letter."""
        return [axis for axis, found in enumerate(self.axes) if found == letter]

    def sizes(self, letter: str) -> Shape:
        """Returns the lengths of the axes with a letter."""
        return lengths(self.axes, self.shape, letter)

    @property
    def layer_shape(self) -> Shape:
        """The shape of one layer."""
        return lengths(self.axes, self.shape, "io")


def find_kernels(
    leaves: Mapping[str, Leaf],
    adapter: Adapter,
    *,
    scan_axis: int | str | None = "auto",
    axes: Mapping[str, str] | None = None,
    scan_axes: Collection[int | None] = (),
) -> dict[str, Kernel]:
    """Finds the kernels of an adapter's modules, by key; arguments and errors are `fold_tree`'s.

    Args:
        leaves: of a tree, by key; anything with a shape and a dtype.
        adapter: what will be folded into them.
        scan_axis: of `fold_tree`.
        axes: of `fold_tree`.
        scan_axes: the values of ``scan_axis`` to prefer where several fit.
    """
    refuse_extras(adapter, "trees of parameters")
    outline = adapter.outline
    for path, lora in outline.items():
        if lora.kind.name == "conv2d":
            raise UnsupportedError(
                f"module {path!r} is a convolution of PEFT, whose axes JAX kernels have in another "
                "order; apply the adapter to the Hugging Face model"
            )
    if scan_axis not in ("auto", None, 0, 1):
        raise FormatError(f"scan_axis is {scan_axis!r}; expected 0, 1, None or 'auto'")
    check_patterns(axes or {}, {key.rpartition("/")[0] for key in leaves}, "axes")
    search = _Search(adapter, scan_axis, axes or {}, scan_axes)
    kernels: dict[str, Kernel] = {}
    owners: dict[str, str] = {}
    for key, leaf in leaves.items():
        kernel = search.find(key, tuple(getattr(leaf, "shape", ())))
        if kernel is None:
            continue
        if leaf.dtype.name not in FLOATS:
            raise UnsupportedError(
                f"{key}: dtype {leaf.dtype}, so it is quantized, or no kernel; apply the adapter "
                "to the model in a floating-point dtype, then quantize the result"
            )
        for path in kernel.modules:
            if path in owners:
                raise FormatError(f"{owners[path]!r} and {key!r} are both of module {path!r}")
            owners[path] = key
        kernels[key] = kernel
    missing = [path for path in outline if path not in owners]
    if missing:
        shapes = {key: getattr(leaf, "shape", ()) for key, leaf in leaves.items()}
        there = [f"{key} {shape}" for key, shape in shapes.items() if len(shape) > 1]
        shown = ", ".join(
            f"{path!r} {outline[path].shape}{hint(path, there)}" for path in missing[:_SHOWN]
        )
        raise MismatchError(
            f"no kernel for {len(missing)} of {len(outline)} modules: {shown}; is it the right "
            "base, are names (--names) and scan_axis (--scan-axis) right?"
        )
    return kernels


class _Search:
    """Search for the kernels of an adapter's modules."""

    def __init__(
        self,
        adapter: Adapter,
        scan_axis: int | str | None,
        axes: Mapping[str, str],
        recorded: Collection[int | None],
    ) -> None:
        self.outline, self.axes, self.recorded = adapter.outline, axes, recorded
        self.scan_axes = [axis for axis in (0, 1) if scan_axis in ("auto", axis)]
        self.lengths = {path: known for path, *known in adapter.metadata.lengths}
        # Modules that differ only in the numbers of layers and experts can be of one stack, and
        # any of them shows the shape of all.
        self.families = {_NUMBER.sub("", path): path for path in self.outline}

    def find(self, key: str, shape: Shape) -> Kernel | None:
        """Returns the kernel at a key; None if the adapter does not change it."""
        module, _, param = key.rpartition("/")
        (path,) = module_paths(module, param, ())
        example = path if path in self.outline else self.families.get(_NUMBER.sub("", path))
        if example is None:
            return None
        letters = first_match(module, self.axes)
        if letters is None:
            ways = find_kernel_axes(
                key,
                shape,
                self.outline[example].shape,
                self.lengths.get(example, ()),
                [None] if example == path else self.scan_axes,
                self.recorded,
            )
        elif len(letters) != len(shape) or set(letters) - set("ilo"):
            raise FormatError(
                f"{key}: axes {letters!r} for kernel {shape}; expected a letter an axis: "
                "i input, o output, l stacked layers"
            )
        else:
            ways = [letters]
        if not ways:
            return None
        paths = module_paths(module, param, lengths(ways[0], shape, "l"))  # the same in both ways
        modules = {path: i for i, path in enumerate(paths) if path in self.outline}
        if not modules:
            return None
        if len(ways) > 1:
            raise FormatError(
                f"{key}: layers of kernel {shape} can be stacked along axis 0 or 1; say which with "
                "scan_axis (--scan-axis)"
            )
        kernel = Kernel(key, shape, ways[0], modules)
        size = math.prod(kernel.sizes("o")), math.prod(kernel.sizes("i"))
        for path in modules:
            if self.outline[path].shape != size:
                raise misfit(key, shape, self.outline[path].shape)
        return kernel
