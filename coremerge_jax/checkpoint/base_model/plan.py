"""What of an adapter goes where in a base model. All that can be refused is refused here."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from coremerge_jax.checkpoint.base_model.folder import CONFIG, BaseModel
from coremerge_jax.checkpoint.base_model.names import Prefix, find_tensors, nearest
from coremerge_jax.checkpoint.peft import experts
from coremerge_jax.checkpoint.peft.keys import unwrapped
from coremerge_jax.errors import MismatchError, UnsupportedError
from coremerge_jax.lora import Adapter, Array, LoRA

_TOKENS = ".token_adapter.trainable_tokens_delta"
_LORA_BIAS = ".lora_B.bias"
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_UNTIE = (
    "folding would change both; load the model with tie_word_embeddings=False, copy the input "
    "embedding's weight into the output embedding, save that and apply to it"
)


@dataclasses.dataclass(frozen=True)
class Update:
    """Where the update of a module goes: into rows of a tensor, seen as a matrix.

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


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a tensor, and the values that replace them."""

    indices: list[int]
    values: Array


@dataclasses.dataclass
class Plan:
    """What happens to each tensor: it is replaced, then added to, as far as that is planned.

    Attributes:
        base: the model.
        dtype: of tensors that are appended.
        updates: low-rank updates of each tensor.
        replaced: tensors that get other values.
        rows: tensors of which some rows get other values.
        biases: what is added to tensors as it is.
        appended: tensors that the base does not have.
    """

    base: BaseModel
    dtype: np.dtype
    updates: dict[str, list[Update]] = dataclasses.field(default_factory=dict)
    replaced: dict[str, Array] = dataclasses.field(default_factory=dict)
    rows: dict[str, Rows] = dataclasses.field(default_factory=dict)
    biases: dict[str, Array] = dataclasses.field(default_factory=dict)
    appended: dict[str, Array] = dataclasses.field(default_factory=dict)


def make_plan(outline: Adapter, base: BaseModel) -> Plan:
    """Finds a place in the base model for everything in an adapter.

    Args:
        outline: the adapter; only shapes of factors matter.
        base: the base model.

    Raises:
        MismatchError: the adapter does not fit the base model.
        UnsupportedError: there is no correct way to fold it in.
    """
    _refuse_tied(outline, base)
    kinds = {path: lora.kind for path, lora in outline.items()}
    prefix, tensors = find_tensors(kinds, base.shard, str(base.folder))
    plan = Plan(base, _float_tensor(base, next(iter(tensors.values()))).dtype)
    for tensor, paths in _grouped(tensors).items():
        loras = {path: outline[path] for path in paths}
        place = _place_experts if next(iter(loras.values())).kind.name == "expert" else _place
        plan.updates[tensor] = place(base, tensor, loras, outline, tensors)
    for name, value in outline.extras.items():
        _place_extra(plan, prefix, name, value, outline)
    return plan


def _grouped(tensors: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path, tensor in tensors.items():
        groups.setdefault(tensor, []).append(path)
    return groups


def _float_tensor(base: BaseModel, name: str) -> Any:
    """Shape and dtype of a tensor that takes an update."""
    tensor = base.tensor(name)
    if tensor.dtype.name not in _FLOATS:
        raise UnsupportedError(
            f"{base.folder}: tensor {name!r} has dtype {tensor.dtype}, so it is quantized, or no "
            "weight; apply the adapter to the model in a floating-point dtype"
        )
    return tensor


def _place(base: BaseModel, name: str, loras: Mapping[str, LoRA], *_: object) -> list[Update]:
    """The update of one layer."""
    (path, lora), *more = loras.items()
    if more:
        raise MismatchError(
            f"{base.folder}: modules {path!r} and {more[0][0]!r} are both tensor {name!r} there"
        )
    shape, kind = _float_tensor(base, name).shape, lora.kind
    stored = (lora.shape[0], *kind.kernel) if kind.name == "conv2d" else lora.shape
    expected = stored[::-1] if kind.transposed else stored
    if shape != expected:
        flipped = kind.name == "linear" and shape == expected[::-1]
        hint = f"; if it is stored so, fan_in_fan_out is {not kind.transposed}" if flipped else ""
        raise MismatchError(
            f"{base.folder}: tensor {name!r} has shape {shape}, but the update of module {path!r} "
            f"needs {expected}{hint}; is it the right base?"
        )
    return [Update(path, 0, (shape[0], math.prod(shape[1:])), kind.transposed)]


def _place_experts(
    base: BaseModel,
    name: str,
    loras: Mapping[str, LoRA],
    outline: Adapter,
    tensors: Mapping[str, str],
) -> list[Update]:
    """The updates of all experts of a parameter, each at its index."""
    shape = _float_tensor(base, name).shape
    experts_shape = shape[-2:]
    count = math.prod(shape[:-2])
    index = {path: experts.split_path(path)[1] for path in loras}
    m, n = next(iter(loras.values())).shape
    fits = {
        transposed: experts_shape == ((n, m) if transposed else (m, n))
        for transposed in ((False, True) if len(shape) == 3 else (False,))
    }
    whole = sorted(index.values()) == list(range(count))
    alike = all(lora.shape == (m, n) for lora in loras.values())
    if len(shape) not in (2, 3) or not any(fits.values()) or not whole or not alike:
        raise MismatchError(
            f"{base.folder}: tensor {name!r} has shape {shape}, but the adapter has "
            f"{len(loras)} experts for it whose updates have shape {(m, n)}; is it the right base?"
        )
    if all(fits.values()) and len(fits) == 2:
        transposed = _siblings_transposed(base, name, outline, tensors)
    else:
        transposed = fits.get(True, False)
    return [Update(path, index[path] * m * n, experts_shape, transposed) for path in loras]


def _siblings_transposed(
    base: BaseModel, name: str, outline: Adapter, tensors: Mapping[str, str]
) -> bool:
    """Whether experts of as many inputs as outputs are stored transposed, as their siblings are.

    peft asks the model's class, of whose parameters all or none are.
    """
    owner = name.rpartition(".")[0]
    for path, sibling in tensors.items():
        lora = outline[path]
        if sibling.rpartition(".")[0] == owner and lora.kind.name == "expert":
            m, n = lora.shape
            if m != n:
                return base.tensor(sibling).shape[-2:] == (n, m)
    raise UnsupportedError(
        f"{base.folder}: experts in {name!r} have as many inputs as outputs, so neither shape nor "
        "adapter tells whether they are stored transposed; merge the adapter with peft"
    )


def _place_extra(plan: Plan, prefix: Prefix, name: str, value: Array, outline: Adapter) -> None:
    base = plan.base
    if name.endswith(_TOKENS):
        path = name.removesuffix(_TOKENS)
        tensor = prefix(f"{path}.weight")
        plan.rows[tensor] = _token_rows(base, tensor, path, value, outline)
        if tensor in plan.updates:
            raise UnsupportedError(
                f"{base.folder}: tensor {tensor!r} has both trained rows and a low-rank update; "
                "merge the adapter with peft"
            )
        return
    added = name.endswith(_LORA_BIAS)
    tensor = prefix(unwrapped(name.removesuffix(_LORA_BIAS)) + ".bias" if added else name)
    if tensor in base.shard:
        _check_extra(base, tensor, name, value)
        (plan.biases if added else plan.replaced)[tensor] = value
    elif added and not np.any(np.asarray(value)):  # what peft needs of layers without a bias
        return
    elif added or not _is_new(base, tensor, outline):
        raise MismatchError(
            f"{base.folder}: no place for the adapter's {name!r}: there is no tensor {tensor!r}; "
            f"nearest are {nearest(tensor, base.shard)}"
        )
    else:
        plan.appended[tensor] = value


def _check_extra(base: BaseModel, tensor: str, name: str, value: Array) -> None:
    found = base.tensor(tensor)
    same_sort = found.dtype.name in _FLOATS if _is_float(value) else found.dtype == value.dtype
    if found.shape != tuple(value.shape) or not same_sort:
        raise MismatchError(
            f"{base.folder}: tensor {tensor!r} is {found.dtype} of shape {found.shape}, but the "
            f"adapter's {name!r} is {value.dtype} of shape {tuple(value.shape)}; if the vocabulary "
            "or the head was resized, save the resized base first"
        )


def _is_new(base: BaseModel, tensor: str, outline: Adapter) -> bool:
    """Whether a tensor belongs to a module that the base lacks, such as a classifier."""
    owner, _, leaf = tensor.rpartition(".")
    known = any(name.startswith(f"{owner}.") for name in base.shard)
    alone = leaf == "bias" and not any(
        name.endswith(f"{owner.rpartition('.')[2]}.weight") for name in outline.extras
    )
    return not known and not alone


def _token_rows(base: BaseModel, tensor: str, path: str, value: Array, outline: Adapter) -> Rows:
    if tensor not in base.shard:
        raise MismatchError(
            f"{base.folder}: no place for trained rows of {path!r}: there is no tensor {tensor!r}; "
            f"nearest are {nearest(tensor, base.shard)}"
        )
    told = outline.metadata.config.get("trainable_token_indices") or []
    if isinstance(told, Mapping):
        named = (rows for name, rows in told.items() if f".{path}".endswith(f".{name}"))
        told = next(named, [])
    rows, shape = list(told), _float_tensor(base, tensor).shape
    inside = all(isinstance(row, int) and 0 <= row < shape[0] for row in rows)
    if len(shape) != 2 or not inside or tuple(value.shape) != (len(rows), shape[1]):
        raise MismatchError(
            f"{base.folder}: tensor {tensor!r} has shape {shape}, but the adapter has rows of "
            f"shape {tuple(value.shape)} for the indices {rows[:5]}; is it the right base?"
        )
    twins = [n for n in base.shard if n != tensor and base.shape(n) == shape]
    if base.tied and twins:
        raise UnsupportedError(
            f"{base.folder}: {tensor!r} and {twins[0]!r} may be tied though both are there, so it "
            "is not certain what trained rows belong to; save the base again with transformers"
        )
    return Rows(rows, value)


def _is_float(value: Array) -> bool:
    return value.dtype.name in _FLOATS


def _refuse_tied(outline: Adapter, base: BaseModel) -> None:
    """Refuses to change an embedding that may be input and output at once.

    Trained rows are part of both also in peft.
    """
    sizes = base.configured("vocab_size")
    touched = [path for path, lora in outline.items() if _is_vocabulary(path, lora, sizes)]
    touched += [
        name
        for name, value in outline.extras.items()
        if len(value.shape) == 2 and value.shape[0] in sizes and not name.endswith(_TOKENS)
    ]
    if not touched:
        return
    if base.tied:
        raise UnsupportedError(
            f"{base.folder / CONFIG}: tie_word_embeddings is not false, so input and output "
            f"embedding are one tensor, but the adapter changes {touched[0]!r} only; {_UNTIE}"
        )
    shared = any(base.configured("is_encoder_decoder"))
    if shared and any(outline[p].kind.name == "embedding" for p in touched if p in outline):
        raise UnsupportedError(
            f"{base.folder / CONFIG}: encoder and decoder may share the embedding {touched[0]!r}; "
            "merge the adapter with peft"
        )


def _is_vocabulary(path: str, lora: LoRA, sizes: list[int]) -> bool:
    if lora.kind.name == "embedding":
        return not sizes or lora.shape[1] in sizes
    return path.rpartition(".")[2] == "lm_head" or lora.shape[0] in sizes
