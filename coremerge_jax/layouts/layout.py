"""Definition of a layout: the way a library names, orients and scales LoRA factors."""

import dataclasses
import re
from collections.abc import Collection, Mapping

from coremerge_jax.errors import FormatError
from coremerge_jax.layouts.axes import Axes, Shape
from coremerge_jax.lora import LINEAR, Kind

# Parts of a path below which layers lie: numbered, or scanned if no number follows. Both may be
# there: MaxText scans over blocks of a few layers (decoder/layers/layers_0).
_CONTAINERS = "(?:[a-z]+_)*(?:layers|blocks)|layer|block|h"
_CONTAINER = re.compile(_CONTAINERS)
_NUMBERED = re.compile(rf"(^|/)({_CONTAINERS})[_/](\d+)(?=/|$)")


@dataclasses.dataclass(frozen=True)
class Factor:
    """Meaning of one key of a tree.

    Attributes:
        module: path of the module, parts joined by ``/``.
        param: name of the kernel that is adapted.
        factor: ``"a"`` or ``"b"``.
    """

    module: str
    param: str
    factor: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Convention of a library to store LoRA factors in a tree of parameters.

    The factor of the inputs is called a here, with the rank as its last axis, and that of the
    outputs b, with the rank as its first axis; a batch axis, if there is one, is axis 0 of both or
    axis 1 of both, and if there are two, these are both.

    Attributes:
        name: for messages and options.
        key: the key of a factor, with ``{module}``, ``{factor}`` and perhaps ``{param}``.
        patterns: regular expressions of keys, with groups of these names.
        param: the kernel's name where a key does not tell it.
        scaled: whether the library multiplies the update by alpha / rank; else it does not.
        kinds: what sort of module it is, by the kernel's name; linear by default.
    """

    name: str
    key: str
    patterns: tuple[str, ...]
    param: str = "kernel"
    scaled: bool = False
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    def match(self, key: str) -> Factor | None:
        """Returns the meaning of a key, parts joined by ``/``; None if it is not of this layout."""
        for pattern in self.patterns:
            found = re.fullmatch(pattern, key)
            if found:
                groups = found.groupdict()
                return Factor(groups["module"], groups.get("param") or self.param, groups["factor"])
        return None

    def kind(self, param: str) -> Kind:
        """Returns the kind of module that a kernel of this name makes."""
        return self.kinds.get(param, LINEAR)


def find_axes(
    module: str,
    a: Shape,
    b: Shape,
    batch_axis: int | str | None,
    told: Collection[int | None] = (),
) -> Axes:
    """Returns the axes of two factors, from their shapes and the path of their module.

    Args:
        module: path, parts joined by ``/``.
        a: shape of the factor of the inputs.
        b: shape of the factor of the outputs.
        batch_axis: 0 or 1, where layers (or experts) are stacked if both factors have more than
            two axes; None for no such axis; ``"auto"`` where the shapes show it.
        told: with ``"auto"``, what ``batch_axis`` may be where the shapes fit several ways.

    Raises:
        FormatError: the shapes are not those of two factors, or could be so in several ways.
    """
    if isinstance(batch_axis, int) and min(len(a), len(b)) < 3:
        batch_axis = None
    every = (_axes(a, b, at, batch) for at, batch in _BATCHES)
    fitting = [axes for axes in every if axes and _fit(axes, a, b)]
    if batch_axis != "auto":
        fitting = [axes for axes in fitting if _batch_axis(axes) == batch_axis]
    elif len(fitting) > 1:
        fitting = [axes for axes in fitting if _batch_axis(axes) in told] or fitting
        fitting = _likely(module, fitting)
    if len(fitting) == 1:
        return fitting[0]
    problem = f"{module}: factors of shapes a {a} and b {b}"
    if not fitting:
        where = "" if batch_axis == "auto" else f", stacked along axis {batch_axis}"
        raise FormatError(
            f"{problem}: expected (inputs, r) and (r, outputs) of one rank r{where}; "
            "say how they are stored with axes (coremerge convert --axes)"
        )
    ways = " or ".join(f"{axes.a},{axes.b}" for axes in fitting)
    raise FormatError(
        f"{problem} can be read in several ways ({ways}: i input, o output, r rank, l stacked "
        "layers, e experts); say which with scan_axis (coremerge convert --scan-axis) or axes "
        "(--axes)"
    )


# Where batch axes can be in both factors: at a place, letters. The last two are scanned layers of
# experts, which some libraries put behind each other in either order.
_BATCHES = ((0, ""), (0, "l"), (1, "l"), (0, "le"), (0, "el"))


def _axes(a: Shape, b: Shape, at: int, batch: str) -> Axes | None:
    """Axes with a batch at a place, None if there are too few."""
    inputs, outputs = (len(shape) - 1 - len(batch) for shape in (a, b))
    if min(inputs, outputs) < 1:
        return None
    first, second = "i" * inputs + "r", "r" + "o" * outputs
    return Axes(first[:at] + batch + first[at:], second[:at] + batch + second[at:])


def _batch_axis(axes: Axes) -> int | None:
    """Returns the axis along which layers are stacked; None if there is none."""
    return axes.a.index("l") if "l" in axes.a else None


def _fit(axes: Axes, a: Shape, b: Shape) -> bool:
    rank_a, rank_b = axes.rank(a, b)
    return rank_a == rank_b and all(
        a[axes.a.index(letter)] == b[axes.b.index(letter)] for letter in "le" if letter in axes.a
    )


def _likely(module: str, fitting: list[Axes]) -> list[Axes]:
    """Tells whether a module is stacked: it is below a container of layers without a number."""
    if container(module) is None:
        return [axes for axes in fitting if not axes.a.startswith("el")] or fitting
    return [axes for axes in fitting if "l" in axes.a] or fitting


def is_numbered(module: str) -> bool:
    """Returns True if a path names one layer, as ``layers/0`` or ``layers_0``."""
    return _NUMBERED.search(module) is not None


def separate_numbers(module: str) -> str:
    """Returns a path with ``layers/0`` in place of ``layers_0``."""
    return _NUMBERED.sub(r"\1\2/\3", module)


def container(module: str) -> int | None:
    """Returns the place of the last part below which layers lie that have no numbers in the path.

    It is the place in the path as `separate_numbers` gives it.
    """
    parts = separate_numbers(module).split("/")
    pairs = zip(parts, [*parts[1:], ""], strict=True)
    places = [
        i
        for i, (part, following) in enumerate(pairs)
        if _CONTAINER.fullmatch(part) and not following.isdigit()
    ]
    return places[-1] if places else None
