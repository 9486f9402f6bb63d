"""Embeddings that are input and output of a model at once."""

import math
import re

import numpy as np

from coremerge_jax.checkpoint.base_model.folder import CONFIG, BaseModel
from coremerge_jax.errors import UnsupportedError
from coremerge_jax.lora import Adapter, LoRA

TOKENS = ".token_adapter.trainable_tokens_delta"

_UNTIE = (
    "folding would change both; load the model with tie_word_embeddings=False, copy the input "
    "embedding's weight into the output embedding, save that and apply to it"
)
# Models without a head that predicts tokens.
_HEADLESS = re.compile(
    r"(?!.*Head).*Model|.*For(\w*Classification|QuestionAnswering|MultipleChoice)"
)
_COMPARED = 2**20


def refuse_tied(base: BaseModel, outline: Adapter) -> None:
    """Refuses to change one of two embeddings that may be one tensor.

    Trained rows are not concerned: in peft, too, they are part of both.

    Raises:
        UnsupportedError: the adapter does.
    """
    sizes = base.configured("vocab_size")
    touched = [path for path, lora in outline.items() if _is_vocabulary(path, lora, sizes)]
    touched += [
        name
        for name, value in outline.extras.items()
        if len(value.shape) == 2 and value.shape[0] in sizes and not name.endswith(TOKENS)
    ]
    if touched and may_be_tied(base):
        raise UnsupportedError(
            f"{base.folder / CONFIG}: input and output embedding are one tensor (or "
            "tie_word_embeddings should be false there), but the adapter changes "
            f"{touched[0]!r} only; {_UNTIE}"
        )
    inputs = [name for name in touched if "lm_head" not in name]
    if inputs and any(base.configured("is_encoder_decoder")):
        raise UnsupportedError(
            f"{base.folder / CONFIG}: encoder and decoder may share the embedding {inputs[0]!r}; "
            "merge the adapter with peft"
        )


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
