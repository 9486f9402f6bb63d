"""Adapters that name the same modules in different ways, brought to one naming.

Modules are compared by their canonical paths. Names are learned as templates, with ``#`` for
numbers, and none is guessed: it is one that an adapter uses for this kind of module, or follows
from those that it uses for others. A fused module is split if another adapter has its parts.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence

from coremerge_jax.errors import CoreMergeWarning, MismatchError
from coremerge_jax.lora import AdapterSource, Kind
from coremerge_jax.merging.groups import label
from coremerge_jax.naming.pieces import mixed, part_sizes, parts
from coremerge_jax.naming.respelled import Piece, respell
from coremerge_jax.naming.spelling import (
    canonical,
    canonical_template,
    fill,
    is_expert_layer,
    is_listed_expert,
    template,
)
from coremerge_jax.naming.table import CONV1D_LAYERS, WEIGHT
from coremerge_jax.naming.vocabulary import Names, are_releases

_LAYERS = (
    "; the result has experts in layers, which peft loads into some models of the newest "
    "transformers only, and leaves out of others; `coremerge apply` folds them into any"
)
_ADVICE = "use adapters that were trained with one release of the model's code"


def align(adapters: Sequence[AdapterSource]) -> Sequence[AdapterSource]:
    """Returns adapters in which a module has one name: the same objects if it has already.

    Names are those of an adapter that shows a name for every module. Experts of a fused parameter
    become layers if another adapter has layers for them; updates and ranks stay.

    Args:
        adapters: the adapters; factors in files are not read.

    Raises:
        MismatchError: an adapter names the same weights twice; or it is not certain what another
            adapter calls a module, or where in a fused one its parts begin.

    Warns:
        CoreMergeWarning: an adapter is merged by other names than its own.
    """
    adapters = _with_layers(adapters)
    owns = {own for adapter in adapters for own in set(map(template, adapter))}
    if _is_one_naming({own: canonical_template(own) for own in owns}):
        return adapters
    modules = [found for adapter in adapters if (found := _modules(adapter)) is not None]
    return _Alignment(adapters, modules).aligned() if len(modules) == len(adapters) else adapters


def _with_layers(adapters: Sequence[AdapterSource]) -> Sequence[AdapterSource]:
    """Names the weight of a layer as the layer, if another adapter has that.

    Raises:
        MismatchError: an adapter has both; or the weight is that of a `Conv1D`, whose update is the
            transpose of the layer's.
    """
    weights = [
        {p: p.removesuffix(WEIGHT) for p in x if p.endswith(WEIGHT) and f"{p[:-2]}1]" not in x}
        for x in adapters
    ]
    if not any(weights):
        return adapters
    layers = {canonical(path) for x in adapters for path in x if not path.endswith("]")}
    found = []
    for adapter, names in zip(adapters, weights, strict=True):
        renamed = {path: name for path, name in names.items() if canonical(name) in layers}
        for path, name in renamed.items():
            if name in adapter or name.rpartition(".")[2] in CONV1D_LAYERS:
                raise MismatchError(
                    f"{label([adapter], 0)} has module {path!r}, the weight of the layer {name!r}, "
                    "which it has too or another adapter has; train all of them with "
                    "target_modules, and not with target_parameters"
                )
        kinds = {path: lora.kind for path, lora in adapter.outline.items()}
        pieces = {
            renamed.get(path, path): Piece(path, Kind() if path in renamed else kind)
            for path, kind in kinds.items()
        }
        found.append(respell(adapter, pieces, adapter.extras) if renamed else adapter)
    return found


def _is_one_naming(keys: Mapping[str, str]) -> bool:
    """Returns True if no two kinds of modules can be the same weights.

    Args:
        keys: canonical template of each kind, by the template of its own name.
    """
    there = set(keys.values())
    layered = {_owner(key) for own, key in keys.items() if is_expert_layer(own)}
    return len(there) == len(keys) and not any(
        there.intersection((*parts(key), *mixed(key)))
        or (own.endswith("[#]") and _owner(key) in layered)
        for own, key in keys.items()
    )


def _owner(key: str) -> str:
    return key.partition("[")[0].rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module of an adapter, or a part of one.

    Attributes:
        path: the module's path in the adapter.
        shape: ``(m, n)`` of the module's update.
        rows: first row of the part, and the one after its last; None for all.
    """

    path: str
    shape: tuple[int, int]
    rows: tuple[int, int] | None = None


# By canonical path.
_Modules = Mapping[str, _Module]


def _modules(adapter: AdapterSource) -> _Modules | None:
    """Returns the modules of an adapter; None if two of them have one canonical path.

    In a model with two such parts, names around modules are all that tells them apart.

    Raises:
        MismatchError: two of its names are those of the same weights in two releases.
    """
    found: dict[str, _Module] = {}
    for path, lora in adapter.outline.items():
        module = found.setdefault(canonical(path), _Module(path, lora.shape))
        if module.path != path:
            if not are_releases(template(module.path), template(path)):
                return None
            raise _twice(adapter, module.path, path)
    for key, module in found.items():
        for other in (*parts(key), *mixed(key)):
            if other in found:
                raise _twice(adapter, module.path, found[other].path)
    return found


def _twice(adapter: AdapterSource, one: str, other: str) -> MismatchError:
    return MismatchError(
        f"{label([adapter], 0)} has modules {one!r} and {other!r}, which are the same weights, as "
        "after a merge of adapters with different names; merge the originals again"
    )


class _Alignment:
    """Adapters, their modules by canonical path, and the names to give them."""

    def __init__(self, adapters: Sequence[AdapterSource], modules: Sequence[_Modules]) -> None:
        self._adapters = adapters
        names = [
            (key, own)
            for found in modules
            for key, owns in _own_names(found).items()
            for own in owns
        ]
        self._layered = {_owner(key) for key, own in names if is_expert_layer(own)}
        self._parameters = {key for key, own in names if own.endswith("[#]")}
        sizes = self._part_sizes(modules)
        self._modules = [self._split(t, found, sizes) for t, found in enumerate(modules)]

    def aligned(self) -> list[AdapterSource]:
        """Returns the adapters by their common names; warns if one has changed."""
        kinds = dict.fromkeys(template(key) for found in self._modules for key in found)
        self._names = [self._usable_names(found) for found in self._modules]
        first = [{key: own[0] for key, own in known.items()} for known in self._names]
        names = Names(first, list(kinds))
        if names.missing:
            raise self._uncertain(names.missing, names.target)
        done = [self._renamed(t, names) for t in range(len(self._adapters))]
        changed = [t for t, x in enumerate(done) if x is not self._adapters[t]]
        if changed:
            self._warn(changed[0], done[changed[0]])
        return done

    # --- Parts of fused modules ------------------------------------------------------------------

    def _part_sizes(self, modules: Sequence[_Modules]) -> dict[str, list[int]]:
        """Returns rows of the parts of fused modules to split, by canonical path and template."""
        there = {key: module for found in modules for key, module in found.items()}
        sizes: dict[str, list[int]] = {}
        for t, found in enumerate(modules):
            for key, module in found.items():
                self._refuse_mixed(t, key, module, there)
                if self._is_split_elsewhere(key, module, there):
                    shapes = [there[part].shape if part in there else None for part in parts(key)]
                    split = part_sizes(module.shape[0], [shape and shape[0] for shape in shapes])
                    # Experts that are stored as (inputs, outputs) have parts in their columns.
                    columns = {shape[1] for shape in shapes if shape} - {module.shape[1]}
                    if split is None or columns:
                        raise self._inseparable(t, module)
                    sizes[key] = sizes[template(key)] = split
        return sizes

    def _is_split_elsewhere(self, key: str, module: _Module, there: _Modules) -> bool:
        """Returns True if a module is fused, and other adapters have parts of it."""
        layered = module.path.endswith("]") and _owner(template(key)) in self._layered
        return any(layered or part in there for part in parts(key))

    def _split(self, t: int, modules: _Modules, sizes: Mapping[str, list[int]]) -> _Modules:
        """Returns modules with parts in place of the fused ones that are split."""
        found: dict[str, _Module] = {}
        for key, module in modules.items():
            split = sizes.get(key) or sizes.get(template(key))
            if split and sum(split) != module.shape[0]:
                raise self._inseparable(t, module)
            start = 0
            for part, size in zip(parts(key), split or (), strict=bool(split)):
                found[part] = dataclasses.replace(module, rows=(start, start + size))
                start += size
            if not split:
                found[key] = module
        return found

    def _inseparable(self, t: int, module: _Module) -> MismatchError:
        return MismatchError(
            f"{label(self._adapters, t)} has the fused module {module.path!r}, and others have "
            f"parts of it, but where in its {module.shape[0]} rows the parts begin does not follow "
            f"from their shapes; {_ADVICE}"
        )

    def _refuse_mixed(self, t: int, key: str, module: _Module, there: _Modules) -> None:
        for whole in mixed(key):
            if whole in there:
                raise MismatchError(
                    f"{label(self._adapters, t)} has module {module.path!r}, and another adapter "
                    f"{there[whole].path!r}, which holds the same weights and others in an order "
                    f"that depends on the model; {_ADVICE}"
                )

    # --- Names -----------------------------------------------------------------------------------

    def _usable_names(self, modules: _Modules) -> dict[str, list[str]]:
        """Returns the names that can be given to others.

        Layers of experts come before parameters, and these before lists, which few models have.
        """
        usable = {
            key: [own for own in owns if self._is_usable(key, own)]
            for key, owns in _own_names(modules).items()
        }
        return {key: owns for key, owns in usable.items() if owns}

    def _is_usable(self, key: str, own: str) -> bool:
        if own.endswith("[#]") and _owner(key) in self._layered:
            return False
        return not (is_listed_expert(own) and key in self._parameters)

    def _uncertain(self, key: str, target: int) -> MismatchError:
        """Returns the error for a kind of module that the target does not show a name for."""
        t, module = next(
            (t, module)
            for t, found in enumerate(self._modules)
            for other, module in found.items()
            if template(other) == key
        )
        return MismatchError(
            f"{label(self._adapters, t)} has module {module.path!r}; modules that it shares with "
            f"{label(self._adapters, target)} have other names there (the first is "
            f"{next(iter(self._adapters[target]))!r}), and it is not certain what this one is "
            f"called; {_ADVICE}, or rename the modules of one"
        )

    def _renamed(self, t: int, names: Names) -> AdapterSource:
        """Returns an adapter by the common names; itself if it has them."""
        adapter = self._adapters[t]
        pieces: dict[str, Piece] = {}
        for key, module in self._modules[t].items():
            path = self._name(t, key, names)
            kind = adapter.outline[module.path].kind
            if path.endswith("]") != (kind.name == "expert"):
                kind = Kind("expert" if path.endswith("]") else "linear")
            pieces[path] = Piece(module.path, kind, module.rows)
        extras = self._extra_names(t, pieces, names)
        if [*pieces, *extras.values()] == [*adapter, *extras]:
            return adapter
        return respell(adapter, pieces, {extras[name]: x for name, x in adapter.extras.items()})

    def _name(self, t: int, key: str, names: Names) -> str:
        """Returns the common name of a module: that which the target has for it, or its kind.

        Layers of one model may differ in it (MiniMax: ``o_proj`` and ``out_proj``). Then a module
        that the target lacks keeps its own name if it is of the same release.
        """
        kind, module = template(key), self._modules[t][key]
        target, known = self._modules[names.target].get(key), self._names[names.target]
        shown = known.get(kind, [])
        if target is not None and target.rows is None and template(target.path) in shown:
            return target.path
        own = self._names[t].get(kind, [])
        if max(len(own), len(shown)) > 1:
            if module.rows is not None or not set(own) & set(shown):
                raise self._uncertain(kind, names.target)
            return module.path
        return fill(names.chosen[kind], key)

    def _extra_names(self, t: int, pieces: Mapping[str, Piece], names: Names) -> dict[str, str]:
        """Returns new names of extras: beside their modules, or moved as modules are."""
        paths = {piece.path: path for path, piece in pieces.items()}
        split = {piece.path for piece in pieces.values() if piece.rows}
        found = {}
        for name in self._adapters[t].extras:
            owner = next((start for start in _owners(name) if start in paths), None)
            if owner in split:
                raise MismatchError(
                    f"{label(self._adapters, t)}: {name!r} is of a fused module that others have "
                    f"in parts; {_ADVICE}"
                )
            if owner is None:
                found[name] = fill(names.moved(template(name)) or template(name), name)
            else:
                found[name] = paths[owner] + name.removeprefix(owner)
        return found

    def _warn(self, t: int, aligned: AdapterSource) -> None:
        old, new = ([*x, *x.extras] for x in (self._adapters[t], aligned))
        before, after = next((x, y) for x, y in zip(old, new, strict=False) if x != y)
        in_layers = self._layered & {_owner(key) for key in self._parameters}
        warnings.warn(
            f"{label(self._adapters, t)} names the same modules in another way and is merged by "
            f"common names: {before!r} as {after!r}{_LAYERS if in_layers else ''}",
            CoreMergeWarning,
            stacklevel=2,
        )


def _own_names(modules: _Modules) -> dict[str, list[str]]:
    """Returns the templates of the names that each kind of module has in an adapter."""
    found: dict[str, dict[str, None]] = {}
    for key, module in modules.items():
        if module.rows is None:
            found.setdefault(template(key), {})[template(module.path)] = None
    return {key: [*names] for key, names in found.items()}


def _owners(name: str) -> Iterable[str]:
    """Yields the modules that a tensor can belong to, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name
