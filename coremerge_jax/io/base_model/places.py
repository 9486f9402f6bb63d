"""Places of updates in a base model's tensors."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

from coremerge_jax.errors import MismatchError, UnsupportedError
from coremerge_jax.io.base_model.folder import BaseModel
from coremerge_jax.io.base_model.tensor_names import Site
from coremerge_jax.lora import Adapter, Kind, LoRA
from coremerge_jax.naming.pieces import part_sizes
from coremerge_jax.naming.respelled import Piece, respell

_PAIR = ("gate_up_proj", "down_proj")

# Names of tensors of one expert: its number, and what is before it.
_EXPERT = re.compile(r"(\bexperts\.(?:\w+_projs\.)?)\d+(?=\.)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Update:
    """Target of a module's update: a matrix in a flat tensor, whose rows are equally far apart.

    Attributes:
        path: path of the module.
        start: index of the first element.
        shape: rows and columns, as they are stored.
        stride: number of elements from one row to the next: more than the columns if these are
            some of those of a larger matrix.
        transposed: whether the stored matrix is the transpose of the update.
    """

    path: str
    start: int
    shape: tuple[int, int]
    stride: int
    transposed: bool


def split_modules(
    base: BaseModel, adapter: Adapter, sites: Mapping[str, tuple[Site, ...]]
) -> tuple[Adapter, dict[str, Site]]:
    """Returns an adapter with a module for each tensor, and the site of each module.

    A fused module whose parts are tensors of the base becomes modules named as these.

    Args:
        base: the base model.
        adapter: the adapter; one in a file stays there.
        sites: the sites of each module.

    Raises:
        MismatchError: the tensors do not have the rows of the module, or there are others of more
            experts.
    """
    _check_experts(base, adapter.outline, sites)
    if all(len(there) == 1 for there in sites.values()):
        return adapter, {path: there[0] for path, there in sites.items()}
    pieces: dict[str, Piece] = {}
    placed: dict[str, Site] = {}
    for path, there in sites.items():
        lora = adapter.outline[path]
        if len(there) == 1:
            pieces[path], placed[path] = Piece(path, lora.kind), there[0]
            continue
        start = 0
        for site, size in zip(there, _part_rows(base, path, lora, there), strict=True):
            if site.index is None:
                name, kind = site.tensor.removesuffix(".weight"), Kind()
            else:
                name, kind = f"{site.tensor}[{site.index}]", Kind("expert")
            if name in sites or name in pieces:
                raise _both(base, site.tensor, path, name)
            pieces[name], placed[name] = Piece(path, kind, (start, start + size)), site
            start += size
    return respell(adapter, pieces, adapter.extras), placed


def _check_experts(
    base: BaseModel, outline: Adapter, sites: Mapping[str, tuple[Site, ...]]
) -> None:
    """Checks that experts of a parameter are all those that the base has tensors for.

    peft adapts the parameter as a whole. Fewer are those of another model, or of one of several
    parameters whose experts the base numbers as one list.
    """
    ours: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for path, there in sites.items():
        if outline[path].kind.name == "expert":
            for site in there:
                kind = _EXPERT.sub(r"\1#", site.tensor)
                ours.setdefault(kind, set()).add(site.tensor)
                first.setdefault(kind, path)
    theirs = collections.Counter(_EXPERT.sub(r"\1#", name) for name in base.shard if ours)
    for kind, names in ours.items():
        if len(names) != theirs[kind]:
            raise MismatchError(
                f"{base.folder}: there are {theirs[kind]} tensors {kind!r}, but the adapter has "
                f"{len(names)} experts for them, as {first[kind]!r}: another model's, or part of a "
                "list that holds several modules' experts; is it the right base?"
            )


def _part_rows(base: BaseModel, path: str, lora: LoRA, sites: tuple[Site, ...]) -> list[int]:
    """Returns the number of a fused module's rows in each tensor."""
    m, n = lora.shape
    shapes = {site.tensor: base.floating(site.tensor).shape for site in sites}
    rows = [math.prod(shape[-2:]) // n for shape in shapes.values()]
    if sum(rows) != m:
        shown = ", ".join(f"{name!r} {shape}" for name, shape in shapes.items())
        raise MismatchError(
            f"{base.folder}: the update of module {path!r} has shape {(m, n)}, but its parts are "
            f"the tensors {shown}; is it the right base?"
        )
    return rows


def place_updates(
    base: BaseModel, outline: Adapter, sites: Mapping[str, Site]
) -> dict[str, list[Update]]:
    """Returns the updates of each tensor.

    Args:
        base: the base model.
        outline: the adapter.
        sites: the site of each module.

    Raises:
        MismatchError: an update does not have the shape of its tensor.
        UnsupportedError: a tensor takes no update, or in which way is not certain.
    """
    groups: dict[str, list[str]] = {}
    for path, site in sites.items():
        groups.setdefault(site.tensor, []).append(path)
    whole = {
        tensor
        for tensor, paths in groups.items()
        if all(_is_whole(outline[path], sites[path]) for path in paths)
    }
    fused = {
        tensor: _Fused(base, tensor, {path: (outline[path], sites[path]) for path in paths})
        for tensor, paths in groups.items()
        if tensor not in whole
    }
    return {
        tensor: [_place_layer(base, tensor, {path: outline[path] for path in paths})]
        if tensor in whole
        else fused[tensor].updates(fused)
        for tensor, paths in groups.items()
    }


def _is_whole(lora: LoRA, site: Site) -> bool:
    """Returns True if a module's update is that of a whole tensor."""
    return lora.kind.name != "expert" and site.index is None and site.part == (0, 1)


def _both(base: BaseModel, tensor: str, one: str, other: str) -> MismatchError:
    return MismatchError(
        f"{base.folder}: modules {one!r} and {other!r} are both tensor {tensor!r} there"
    )


def _place_layer(base: BaseModel, name: str, loras: Mapping[str, LoRA]) -> Update:
    (path, lora), *more = loras.items()
    if more:
        raise _both(base, name, path, more[0][0])
    shape, kind = base.floating(name).shape, lora.kind
    stored = (lora.shape[0], *kind.kernel) if kind.name == "conv2d" else lora.shape
    transposed = base.is_transposed(name, kind)
    expected = stored[::-1] if transposed else stored
    if shape != expected:
        told = str(not kind.transposed).lower()
        by_flag = kind.name == "linear" and transposed == kind.transposed
        flipped = by_flag and shape == expected[::-1]
        hint = f"; its transpose would fit, if fan_in_fan_out were {told}" if flipped else ""
        raise MismatchError(
            f"{base.folder}: tensor {name!r} has shape {shape}, but the update of module {path!r} "
            f"needs {expected}{hint}; is it the right base?"
        )
    columns = math.prod(shape[1:])
    return Update(path, 0, (shape[0], columns), columns, transposed)


class _Fused:
    """A tensor ``(experts, m, n)`` or ``(m, n)`` with several modules, or an expert, in it.

    Args:
        base: the base model.
        tensor: the tensor's name.
        modules: the modules that are there, and their sites.

    Attributes:
        shape: the tensor's shape.
        matrix: rows and columns of the update of an expert, or of the tensor, as a whole.

    Raises:
        MismatchError: the modules do not fit there.
    """

    def __init__(
        self, base: BaseModel, tensor: str, modules: Mapping[str, tuple[LoRA, Site]]
    ) -> None:
        self._base, self._tensor, self._modules = base, tensor, modules
        self.shape = base.floating(tensor).shape
        self._starts: dict[str, int] = {}
        beside: dict[int | None, dict[int, int]] = {}
        for lora, site in modules.values():
            beside.setdefault(site.index, {})[site.part[0]] = lora.shape[0]
        sizes = set()
        for path, (lora, site) in modules.items():
            self._starts[path], total = self._rows(lora, site, beside[site.index])
            sizes.add((total, lora.shape[1]))
        self.matrix = sizes.pop()
        if sizes or not self._ways() or not self._has_its_experts():
            raise self._misfit()

    def updates(self, siblings: Mapping[str, "_Fused"]) -> list[Update]:
        """Returns the updates of the modules.

        Args:
            siblings: all such tensors by name, as one may show how another is stored.
        """
        m, n = self.matrix
        transposed = self._is_transposed(siblings)
        taken: dict[int, str] = {}
        updates = []
        for path, (lora, site) in self._modules.items():
            first, stride = self._starts[path], m if transposed else n
            start = (site.index or 0) * m * n + first * (1 if transposed else stride)
            if taken.setdefault(start, path) != path:
                raise _both(self._base, self._tensor, taken[start], path)
            shape = lora.shape[::-1] if transposed else lora.shape
            updates.append(Update(path, start, shape, stride, transposed))
        return updates

    def _rows(self, lora: LoRA, site: Site, beside: Mapping[int, int]) -> tuple[int, int]:
        """Returns the first row of a module in the matrix that it is part of, and its rows.

        Args:
            lora: the module's update.
            site: its site.
            beside: by place, the rows of the modules in the same matrix.
        """
        (place, count), rows = site.part, lora.shape[0]
        if count == 1:
            return 0, rows
        total = 2 * rows if count == 2 else self.shape[0]
        sizes = part_sizes(total, [beside.get(i) for i in range(count)])
        if sizes is None:
            raise MismatchError(
                f"{self._base.folder}: tensor {self._tensor!r} has shape {self.shape}, and the "
                f"adapter has updates of {sorted(beside.values())} rows for parts of it, so where "
                "the parts begin is not certain; is it the right base?"
            )
        return sum(sizes[:place]), total

    def _ways(self) -> list[bool]:
        """Returns the ways in which the shape fits: as the update is, or transposed (True)."""
        ways = {False: self.matrix, True: self.matrix[::-1]}
        if len(self.shape) == 2:  # peft takes a matrix for a layer, which is never transposed
            del ways[True]
        return [
            way
            for way, matrix in ways.items()
            if len(self.shape) <= 3 and self.shape[-2:] == matrix
        ]

    def _has_its_experts(self) -> bool:
        """Returns True if the experts are those of the tensor: all, if peft adapts it as one."""
        there = {site.index or 0 for _, site in self._modules.values()}
        count = math.prod(self.shape[:-2])
        if any(lora.kind.name == "expert" for lora, _ in self._modules.values()):
            return there == set(range(count))
        return max(there) < count

    def _misfit(self) -> MismatchError:
        experts = len({site.index for _, site in self._modules.values()})
        shape = next(iter(self._modules.values()))[0].shape
        return MismatchError(
            f"{self._base.folder}: tensor {self._tensor!r} has shape {self.shape}, but the adapter "
            f"has {experts} experts for it whose updates have shape {shape}; is it the right base?"
        )

    def _is_transposed(self, siblings: Mapping[str, "_Fused"]) -> bool:
        """Returns True if experts are stored transposed.

        If they have as many inputs as outputs, their siblings show it: peft asks the model's class,
        of whose parameters all or none are.
        """
        if len(ways := self._ways()) == 1:
            return ways[0]
        owner, _, name = self._tensor.rpartition(".")
        for tensor, sibling in siblings.items():
            if tensor.rpartition(".")[0] == owner and len(sibling._ways()) == 1:
                return sibling._ways()[0]
        for other in _PAIR if name in _PAIR else ():
            if (tensor := f"{owner}.{other}") in self._base.shard and other != name:
                *_, rows, columns = self._base.shape(tensor)
                if rows != columns:  # gate_up_proj has twice the rows that down_proj has columns
                    return columns > rows
        raise UnsupportedError(
            f"{self._base.folder}: experts in {self._tensor!r} have as many inputs as outputs, so "
            "neither shape nor adapter shows whether they are stored transposed; merge the adapter "
            "with peft"
        )
