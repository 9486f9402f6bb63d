"""Places of updates in a base model's tensors."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping

from coremerge_jax.errors import MismatchError, UnsupportedError, nearest
from coremerge_jax.io.base_model.folder import BaseModel
from coremerge_jax.io.module_paths import split_expert, unwrapped
from coremerge_jax.lora import Adapter, Kind, LoRA


@dataclasses.dataclass(frozen=True)
class Update:
    """Target of a module's update: a matrix of consecutive elements of a flat tensor.

    Attributes:
        path: path of the module.
        start: index of the first element.
        shape: rows and columns, as they are stored.
        transposed: whether the stored matrix is the transpose of the update.
    """

    path: str
    start: int
    shape: tuple[int, int]
    transposed: bool


def place_updates(
    base: BaseModel, outline: Adapter, tensors: Mapping[str, str]
) -> dict[str, list[Update]]:
    """Returns the updates of each tensor.

    Args:
        base: the base model.
        outline: the adapter.
        tensors: the tensor of each module.

    Raises:
        MismatchError: an update does not have the shape of its tensor.
        UnsupportedError: a tensor takes no update, or in which way is not certain.
    """
    groups: dict[str, dict[str, LoRA]] = {}
    for path, tensor in tensors.items():
        groups.setdefault(tensor, {})[path] = outline[path]
    return {
        tensor: _place_experts(base, tensor, groups)
        if any(lora.kind.name == "expert" for lora in loras.values())
        else [_place_layer(base, tensor, loras)]
        for tensor, loras in groups.items()
    }


def _place_layer(base: BaseModel, name: str, loras: Mapping[str, LoRA]) -> Update:
    (path, lora), *more = loras.items()
    if more:
        raise MismatchError(
            f"{base.folder}: modules {path!r} and {more[0][0]!r} are both tensor {name!r} there"
        )
    shape, kind = base.floating(name).shape, lora.kind
    stored = (lora.shape[0], *kind.kernel) if kind.name == "conv2d" else lora.shape
    expected = stored[::-1] if kind.transposed else stored
    if shape != expected:
        flipped = kind.name == "linear" and shape == expected[::-1]
        told = str(not kind.transposed).lower()
        hint = f"; its transpose would fit, if fan_in_fan_out were {told}" if flipped else ""
        raise MismatchError(
            f"{base.folder}: tensor {name!r} has shape {shape}, but the update of module {path!r} "
            f"needs {expected}{hint}; is it the right base?"
        )
    return Update(path, 0, (shape[0], math.prod(shape[1:])), kind.transposed)


def _place_experts(
    base: BaseModel, name: str, groups: Mapping[str, Mapping[str, LoRA]]
) -> list[Update]:
    """Places the updates of all experts of a parameter ``(experts, m, n)``, or of one."""
    shape, loras = base.floating(name).shape, groups[name]
    index = {path: split_expert(path)[1] for path in loras}
    (m, n), *others = {lora.shape for lora in loras.values()}
    ways = [way for way in (False, True) if shape[-2:] == ((n, m) if way else (m, n))]
    if len(shape) == 2:  # peft takes a matrix for a layer, which is never transposed
        ways = [way for way in ways if not way]
    whole = sorted(index.values()) == list(range(math.prod(shape[:-2])))
    if len(shape) not in (2, 3) or not ways or not whole or others:
        raise MismatchError(
            f"{base.folder}: tensor {name!r} has shape {shape}, but the adapter has "
            f"{len(loras)} experts for it whose updates have shape {(m, n)}; is it the right base?"
        )
    transposed = ways[0] if len(ways) == 1 else _siblings_transposed(base, name, groups)
    stored = (n, m) if transposed else (m, n)
    return [Update(path, index[path] * m * n, stored, transposed) for path in loras]


def _siblings_transposed(
    base: BaseModel, name: str, groups: Mapping[str, Mapping[str, LoRA]]
) -> bool:
    """Returns True if experts with as many inputs as outputs are stored transposed.

    peft asks the model's class, of whose parameters all or none are.
    """
    for sibling, loras in groups.items():
        lora = next(iter(loras.values()))
        m, n = lora.shape
        same_owner = sibling.rpartition(".")[0] == name.rpartition(".")[0]
        if same_owner and lora.kind.name == "expert" and m != n:
            return base.floating(sibling).shape[-2:] == (n, m)
    raise UnsupportedError(
        f"{base.folder}: experts in {name!r} have as many inputs as outputs, so neither shape nor "
        "adapter shows whether they are stored transposed; merge the adapter with peft"
    )


_SHOWN = 3

_TRIED = 100  # prefixes; of real models, a few


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The prefix by which a checkpoint's names differ: the name of the inner model.

    Attributes:
        lacking: prefix that the checkpoint's names lack, with its dot.
        added: prefix that they have in addition.
    """

    lacking: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        """Returns the name in the checkpoint."""
        return self.added + name.removeprefix(self.lacking)

    def __str__(self) -> str:
        if self.added or self.lacking:
            return f"with {self.added!r}" if self.added else f"without {self.lacking!r}"
        return "as they are"


def find_tensors(
    modules: Mapping[str, Kind], tensors: Collection[str], where: str
) -> tuple[Prefix, dict[str, str]]:
    """Returns the tensor that each module adapts.

    A checkpoint may lack the name of the inner model (``transformer.``), or have it where the
    adapted model does not, in the same way for all modules. transformers reads both.

    Args:
        modules: kind of each module, by path.
        tensors: names of the base model's tensors.
        where: the base model, for messages.

    Returns:
        The difference of the names, and the tensor of each module.

    Raises:
        MismatchError: some modules have no tensor, or there are several ways to find them.
    """
    found = {prefix: _find(modules, tensors, prefix) for prefix in _prefixes(modules, tensors)}
    whole = [prefix for prefix, names in found.items() if len(names) == len(modules)]
    if Prefix() in whole or len(whole) == 1:
        prefix = whole[0]
        return prefix, found[prefix]
    if whole:
        ways = ", or ".join(map(str, whole))
        raise MismatchError(
            f"{where}: the adapter's modules fit there in {len(whole)} ways ({ways}); "
            "train the adapter on the whole model, whose names are certain"
        )
    prefix = max(found, key=lambda prefix: len(found[prefix]))
    missing = [path for path in modules if path not in found[prefix]]
    expected = {path: prefix(_candidates(path, modules[path])[0]) for path in missing[:_SHOWN]}
    named = [
        f"{path!r}, nearest to {nearest_tensors(expected[path], tensors)}" for path in expected
    ]
    if len(missing) == len(modules):
        raise MismatchError(
            f"{where}: none of the adapter's {len(modules)} modules is in this model; the first "
            f"is {named[0]}; is it the right base?"
        )
    raise MismatchError(
        f"{where}: {len(missing)} of the adapter's {len(modules)} modules are not in this model: "
        f"{'; '.join(named)}; is it the right base?"
    )


def nearest_tensors(name: str, tensors: Iterable[str]) -> str:
    """Returns the tensors whose names are most like this one, for messages."""
    return ", ".join(map(repr, nearest(name, tensors, _SHOWN))) or "nothing: it has no tensors"


def _prefixes(modules: Iterable[str], tensors: Iterable[str]) -> list[Prefix]:
    """Returns the ways in which names may differ, the most likely first."""
    firsts = dict.fromkeys(path.partition(".")[0] for path in modules if "." in path)
    tops = dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name)
    lacking = [Prefix(lacking=f"{first}.") for first in firsts]
    return [Prefix(), *lacking, *(Prefix(added=f"{top}.") for top in tops)][:_TRIED]


def _find(modules: Mapping[str, Kind], tensors: Collection[str], prefix: Prefix) -> dict[str, str]:
    found = {}
    for path, kind in modules.items():
        for name in _candidates(path, kind):
            if prefix(name) in tensors:
                found[path] = prefix(name)
                break
    return found


def _candidates(path: str, kind: Kind) -> tuple[str, ...]:
    if kind.name == "expert":
        return (split_expert(path)[0],)
    path = unwrapped(path)
    if kind.name == "linear":  # of a torch.nn.MultiheadAttention, whose weight is a parameter
        return f"{path}.weight", f"{path}.in_proj_weight"
    return (f"{path}.weight",)
