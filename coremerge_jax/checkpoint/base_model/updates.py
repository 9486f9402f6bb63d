"""Placement of low-rank updates: the tensors that they change, and the orientation there."""

import dataclasses
import math
from collections.abc import Mapping

from coremerge_jax.checkpoint.base_model.folder import BaseModel
from coremerge_jax.checkpoint.peft import experts
from coremerge_jax.errors import MismatchError, UnsupportedError
from coremerge_jax.lora import Adapter, LoRA


@dataclasses.dataclass(frozen=True)
class Update:
    """Target of a module's update: rows of a tensor, seen as a matrix.

    Attributes:
        path: of the module.
        start: the first of these elements in the flat tensor.
        shape: rows and columns, as they are stored.
        transposed: whether that is the update transposed.
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
    index = {path: experts.split_path(path)[1] for path in loras}
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
        "adapter tells whether they are stored transposed; merge the adapter with peft"
    )
