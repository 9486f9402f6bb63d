"""Extras of an adapter in a base model, and tensors that are tied there."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from coremerge_jax.errors import MismatchError, UnsupportedError
from coremerge_jax.io.base_model.folder import CONFIG, BaseModel
from coremerge_jax.io.base_model.tensor_names import Names, nearest_tensors
from coremerge_jax.io.module_paths import LORA_BIAS, unwrapped
from coremerge_jax.io.tensors import LazyTensor
from coremerge_jax.lora import FLOATS, Adapter, Array, LoRA
from coremerge_jax.naming.spelling import canonical, template
from coremerge_jax.naming.table import TOKENS
from coremerge_jax.trees import fold as addition


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a tensor, and the values that replace them."""

    indices: list[int]
    values: Array


@dataclasses.dataclass
class Extras:
    """Changes to a model's tensors, in the order in which they are made.

    Attributes:
        replaced: new values of whole tensors.
        rows: new values of some rows of tensors.
        biases: summands of tensors, without the update's scale.
        appended: tensors that the base does not have.
    """

    replaced: dict[str, Array] = dataclasses.field(default_factory=dict)
    rows: dict[str, Rows] = dataclasses.field(default_factory=dict)
    biases: dict[str, Array] = dataclasses.field(default_factory=dict)
    appended: dict[str, Array] = dataclasses.field(default_factory=dict)


def place_extras(base: BaseModel, outline: Adapter, names: Names, twins: Collection[str]) -> Extras:
    """Finds a place for each extra.

    Args:
        base: the base model.
        outline: the adapter.
        names: how names differ.
        twins: extras that are values of one tensor (`find_twins`), which the base has by one of
            their names.

    Raises:
        MismatchError: an extra has no place, or does not fit there.
        UnsupportedError: the place is not certain.
    """
    extras = Extras()
    for name, value in outline.extras.items():
        if name.endswith(TOKENS):
            path = name.removesuffix(TOKENS)
            tensor = names(f"{path}.weight")
            extras.rows[tensor] = _token_rows(base, tensor, path, value, outline)
        elif name not in twins or names(name) in base.shard:
            _place(extras, base, outline, names, name)
    if twins and not any(names(name) in base.shard for name in twins):
        raise MismatchError(
            f"{base.folder}: no place for the adapter's {min(twins)!r}: the base has no embedding "
            f"of that name; nearest are {nearest_tensors(names(min(twins)), base.shard)}"
        )
    return extras


def _place(extras: Extras, base: BaseModel, outline: Adapter, names: Names, name: str) -> None:
    value, added = outline.extras[name], name.endswith(LORA_BIAS)
    tensor = names(unwrapped(name.removesuffix(LORA_BIAS)) + ".bias" if added else name)
    if tensor in base.shard:
        _check(base, tensor, name, value)
        (extras.biases if added else extras.replaced)[tensor] = value
    elif added and not np.any(np.asarray(value)):  # peft needs one in layers without a bias, too
        return
    elif added or not _is_new(base, tensor, outline):
        raise MismatchError(
            f"{base.folder}: no place for the adapter's {name!r}: there is no tensor {tensor!r}; "
            f"nearest are {nearest_tensors(tensor, base.shard)}"
        )
    else:
        extras.appended[tensor] = value


def _check(base: BaseModel, tensor: str, name: str, value: Array) -> None:
    found = base.tensor(tensor)
    same_sort = (
        found.dtype.name in FLOATS if value.dtype.name in FLOATS else found.dtype == value.dtype
    )
    if found.shape != tuple(value.shape) or not same_sort:
        raise MismatchError(
            f"{base.folder}: tensor {tensor!r} is {found.dtype} of shape {found.shape}, but the "
            f"adapter's {name!r} is {value.dtype} of shape {tuple(value.shape)}; if the vocabulary "
            "or the head was resized, save the resized base first"
        )


def _is_new(base: BaseModel, tensor: str, outline: Adapter) -> bool:
    """Returns True if a tensor belongs to a module that the base lacks, such as a classifier.

    It does not if it is in a layer: the base has that by another name, or in parts.
    """
    owner, _, leaf = tensor.rpartition(".")
    known = any(name.startswith(f"{owner}.") for name in base.shard)
    alone = leaf == "bias" and not any(
        name.endswith(f"{owner.rpartition('.')[2]}.weight") for name in outline.extras
    )
    return not known and not alone and not _is_in_layer(base, tensor)


def _is_in_layer(base: BaseModel, tensor: str) -> bool:
    """Returns True if a tensor is in a numbered layer, of a part that the base has."""
    path = canonical(tensor)
    first = path.partition(".")[0]
    return "#" in template(path) and any(
        canonical(name).partition(".")[0] == first for name in base.shard
    )


def _token_rows(base: BaseModel, tensor: str, path: str, value: Array, outline: Adapter) -> Rows:
    if tensor not in base.shard:
        raise MismatchError(
            f"{base.folder}: no place for trained rows of {path!r}: there is no tensor {tensor!r}; "
            f"nearest are {nearest_tensors(tensor, base.shard)}"
        )
    told = outline.metadata.config.get("trainable_token_indices") or []
    if isinstance(told, Mapping):
        named = (rows for name, rows in told.items() if f".{path}".endswith(f".{name}"))
        told = next(named, [])
    rows, shape = list(told), base.floating(tensor).shape
    inside = all(isinstance(row, int) and 0 <= row < shape[0] for row in rows)
    if len(shape) != 2 or not inside or tuple(value.shape) != (len(rows), shape[1]):
        raise MismatchError(
            f"{base.folder}: tensor {tensor!r} has shape {shape}, but the adapter has rows of "
            f"shape {tuple(value.shape)} for the indices {rows[:5]}; is it the right base?"
        )
    twins = [n for n in base.shard if n != tensor and base.shape(n) == shape]
    if twins and may_be_tied(base):
        raise UnsupportedError(
            f"{base.folder}: {tensor!r} and {twins[0]!r} may be tied though both are there, so it "
            "is not certain what trained rows belong to; save the base again with transformers"
        )
    return Rows(rows, value)


_UNTIE = (
    "folding would change both; load the model with tie_word_embeddings=False, copy the input "
    "embedding's weight into the output embedding, save that and apply to it"
)

# Models without a head that predicts tokens.
_HEADLESS = re.compile(
    r"(?!.*Head).*Model|.*For(\w*Classification|QuestionAnswering|MultipleChoice)"
)

_COMPARED = 2**20


def find_twins(base: BaseModel, outline: Adapter) -> set[str]:
    """Finds the full weights that an adapter has for both of two embeddings that are one tensor.

    They have equal values, so it does not matter which of them the tensor gets. An adapter that
    changes them in any other way is refused. Trained rows are not concerned: in peft, too, they are
    part of both.

    Returns:
        The names of the extras. Of those, the base may have one only.

    Raises:
        UnsupportedError: the adapter changes one of two embeddings that may be one tensor, or both
            in two ways.
    """
    sizes = base.configured("vocab_size")
    updated = [path for path, lora in outline.items() if _is_vocabulary(path, lora, sizes)]
    saved = [
        name
        for name, value in outline.extras.items()
        if len(value.shape) == 2 and value.shape[0] in sizes and not name.endswith(TOKENS)
    ]
    if (updated or saved) and may_be_tied(base):
        tied = outline.metadata.config.get("ensure_weight_tying")
        if updated or (len(saved) == 1 and not tied):
            raise UnsupportedError(
                f"{base.folder / CONFIG}: input and output embedding are one tensor (or "
                "tie_word_embeddings should be false there), but the adapter changes "
                f"{(updated + saved)[0]!r} only; {_UNTIE}"
            )
        first, *others = saved
        for other in others:
            if not _equal(outline.extras[first], outline.extras[other]):
                raise UnsupportedError(
                    f"{base.folder / CONFIG}: input and output embedding are one tensor (or "
                    f"tie_word_embeddings should be false there), but the adapter's {first!r} and "
                    f"{other!r} differ; {_UNTIE}"
                )
        return set(saved)
    inputs = [name for name in (*updated, *saved) if "lm_head" not in name]
    if inputs and any(base.configured("is_encoder_decoder")):
        raise UnsupportedError(
            f"{base.folder / CONFIG}: encoder and decoder may share the embedding {inputs[0]!r}; "
            "merge the adapter with peft"
        )
    return set()


def _equal(one: Array | LazyTensor, other: Array | LazyTensor) -> bool:
    """Returns True if two tensors have one shape and equal values; a part is read at a time."""
    if tuple(one.shape) != tuple(other.shape):
        return False
    pairs = zip(read_parts(one), read_parts(other), strict=True)
    return all(np.array_equal(x, y) for (_, x), (_, y) in pairs)


def may_be_tied(base: BaseModel) -> bool:
    """Returns True if input and output embedding may be one tensor.

    Where the configuration does not say so, its default depends on the architecture. They are not
    if the model predicts no tokens, or if both are in the files and differ.
    """
    if told := base.configured("tie_word_embeddings"):
        return any(told)
    architectures = [name for names in base.configured("architectures") for name in names]
    if architectures and all(map(_HEADLESS.fullmatch, architectures)):
        return False
    sizes = base.configured("vocab_size")
    shapes = {name: base.shape(name) for name in base.shard}
    both = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] in sizes]
    if len(both) != 2:
        return True
    count = min(_COMPARED, *(math.prod(shapes[name]) for name in both))
    one, other = (base.shards[base.shard[name]].read_part(name, 0, count) for name in both)
    return np.array_equal(one, other)


def _is_vocabulary(path: str, lora: LoRA, sizes: list[int]) -> bool:
    if lora.kind.name == "embedding":
        return not sizes or lora.shape[1] in sizes
    return path.rpartition(".")[2] == "lm_head" or lora.shape[0] in sizes


def read_parts(value: Array | LazyTensor | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the start and the values of each part of a flat tensor; nothing for None."""
    if value is None:
        return
    if isinstance(value, LazyTensor):
        read = value.read
    else:
        flat = np.asarray(value).reshape(-1)
        read = lambda start, stop: flat[start:stop]  # noqa: E731
    size = math.prod(value.shape)
    for start in range(0, size, addition.BLOCK):
        yield start, read(start, min(start + addition.BLOCK, size))
