"""The kernels of a tree of parameters that an adapter changes, and which axes of them are which."""

import dataclasses
import fnmatch
import functools
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from coremerge_jax.errors import FormatError, MismatchError, UnsupportedError, hint
from coremerge_jax.lora import FLOATS, Adapter
from coremerge_jax.trees.adapters import check_pattern, module_paths
from coremerge_jax.trees.axes import Shape

# Of a layer or an expert, in a module's path.
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
        return tuple(self.shape[axis] for axis in self.find(letter))

    @property
    def layer_shape(self) -> Shape:
        """The shape of one layer."""
        return tuple(n for n, x in zip(self.shape, self.axes, strict=True) if x != "l")


def find_kernels(
    leaves: Mapping[str, Any],
    adapter: Adapter,
    *,
    scan_axis: int | str | None = "auto",
    axes: Mapping[str, str] | None = None,
    scan_axes: Collection[int | None] = (),
) -> dict[str, Kernel]:
    """Finds the kernels of an adapter's modules, by key; see `fold_tree`, also for errors.

    Args:
        leaves: of a tree, by key; anything with a shape and a dtype.
        adapter: see `fold_tree`.
        scan_axis: see `fold_tree`.
        axes: see `fold_tree`.
        scan_axes: what ``scan_axis`` may be where shapes fit several; as a checkpoint tells.
    """
    if adapter.extras:
        raise UnsupportedError(
            f"the adapter has {len(adapter.extras)} tensors that are not low-rank updates (first: "
            f"{next(iter(adapter.extras))!r}), and where these belong in a tree of parameters is "
            "not known; merge the adapter without them"
        )
    outline = adapter.outline
    for path, lora in outline.items():
        if lora.kind.name == "conv2d":
            raise UnsupportedError(
                f"module {path!r} is a convolution of PEFT, whose axes JAX kernels have in another "
                "order; apply the adapter to the Hugging Face model"
            )
    if scan_axis not in ("auto", None, 0, 1):
        raise FormatError(f"scan_axis is {scan_axis!r}; expected 0, 1, None or 'auto'")
    for pattern in axes or {}:
        check_pattern(pattern, {key.rpartition("/")[0] for key in leaves}, "axes")
    lengths = {path: pair for path, *pair in adapter.metadata.lengths}
    search = _Search(outline, scan_axis, axes or {}, lengths, scan_axes)
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


@dataclasses.dataclass(frozen=True)
class _Search:
    """For the kernels of an adapter's modules."""

    outline: Adapter
    scan_axis: int | str | None
    axes: Mapping[str, str]
    lengths: Mapping[str, Sequence[Shape]]
    scan_axes: Collection[int | None]

    @functools.cached_property
    def families(self) -> dict[str, str]:
        """By path without numbers of layers and experts, a module that has it."""
        return {_NUMBER.sub("", path): path for path in self.outline}

    def find(self, key: str, shape: Shape) -> Kernel | None:
        """Returns the kernel that a leaf is; None if it is none that the adapter changes."""
        module, _, param = key.rpartition("/")
        (path,) = module_paths(module, param, ())
        example = path if path in self.outline else self.families.get(_NUMBER.sub("", path))
        if example is None:
            return None
        kernels = []
        for axes in self._axes(key, shape, example, stacked=example != path):
            kernel = Kernel(key, shape, axes, {})
            paths = module_paths(module, param, kernel.sizes("l"))
            modules = {path: i for i, path in enumerate(paths) if path in self.outline}
            if modules:
                kernels.append(dataclasses.replace(kernel, modules=modules))
        told = [kernel for kernel in kernels if kernel.axes.find("l") in self.scan_axes]
        kernels = told or kernels
        if len(kernels) > 1:
            raise FormatError(
                f"{key}: layers of kernel {shape} can be stacked along axis 0 or 1; say which with "
                "scan_axis (--scan-axis)"
            )
        for kernel in kernels:
            self._check(kernel)
        return kernels[0] if kernels else None

    def _axes(self, key: str, shape: Shape, example: str, *, stacked: bool) -> list[str]:
        """Returns what the axes of a kernel can be, given one of its modules."""
        module, (m, n) = key.rpartition("/")[0], self.outline[example].shape
        told = self.lengths.get(example, ())
        for pattern, letters in self.axes.items():
            if fnmatch.fnmatchcase(module, pattern):
                if len(letters) != len(shape) or set(letters) - set("ilo"):
                    raise FormatError(
                        f"{key}: axes {letters!r} for kernel {shape}; expected a letter an axis: "
                        "i input, o output, l stacked layers"
                    )
                return [letters]
        if not stacked:
            return [_find_axes(key, shape, m, n, told)]
        found = []
        for axis in (0, 1) if self.scan_axis == "auto" else (self.scan_axis,):
            if not isinstance(axis, int) or axis >= len(shape):
                continue
            if shape[axis] * m * n == math.prod(shape):
                layer = _find_axes(key, shape[:axis] + shape[axis + 1 :], m, n, told)
                found.append(layer[:axis] + "l" + layer[axis:])
        return found

    def _check(self, kernel: Kernel) -> None:
        shape = math.prod(kernel.sizes("o")), math.prod(kernel.sizes("i"))
        for path in kernel.modules:
            if self.outline[path].shape != shape:
                raise _misfit(kernel.key, kernel.shape, *self.outline[path].shape)


def _find_axes(key: str, shape: Shape, m: int, n: int, told: Sequence[Shape]) -> str:
    """Returns the axes of a kernel without layers.

    Args:
        key: of the kernel.
        shape: of it.
        m: outputs of the update.
        n: inputs of it.
        told: the lengths of the axes of inputs, and of outputs, if they are known.
    """
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    fitting = [
        inputs
        for count in range(len(wide) + 1)
        for inputs in itertools.combinations(wide, count)
        if math.prod(shape[axis] for axis in inputs) == n
    ]
    if not fitting or math.prod(shape) != m * n:
        raise _misfit(key, shape, m, n)
    known = [inputs for inputs in fitting if _lengths(shape, wide, inputs) == _wide(told)]
    first = [inputs for inputs in fitting if inputs == tuple(wide[: len(inputs)])]
    if len(fitting) > 1 and len(known) != 1 and (known or not first):
        raise FormatError(
            f"{key}: which axes of kernel {shape} are the {n} inputs is not clear; say which with "
            "axes (--axes), such as 'oio' for heads, inputs, head size"
        )
    inputs = (known or first or fitting)[0]
    return "".join("i" if axis in inputs else "o" for axis in range(len(shape)))


def _lengths(shape: Shape, wide: Sequence[int], inputs: Sequence[int]) -> list[Shape]:
    """Returns the lengths of the axes of inputs, and of outputs."""
    outputs = [axis for axis in wide if axis not in inputs]
    return [tuple(shape[axis] for axis in axes) for axes in (inputs, outputs)]


def _wide(told: Sequence[Shape]) -> list[Shape]:
    """Lengths without those that are 1."""
    return [tuple(n for n in lengths if n != 1) for lengths in told]


def _misfit(key: str, shape: Shape, m: int, n: int) -> MismatchError:
    return MismatchError(
        f"{key}: kernel {shape} does not fit an update of {m} outputs, {n} inputs; is it the right "
        "base? If so, say what its axes are with axes (--axes)"
    )
