"""Embeddings that are input and output of a model at once."""

from coremerge_jax.checkpoint.base_model.extras import TOKENS
from coremerge_jax.checkpoint.base_model.folder import CONFIG, BaseModel
from coremerge_jax.errors import UnsupportedError
from coremerge_jax.lora import Adapter, LoRA

_UNTIE = (
    "folding would change both; load the model with tie_word_embeddings=False, copy the input "
    "embedding's weight into the output embedding, save that and apply to it"
)


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
    if not touched:
        return
    if base.tied:
        raise UnsupportedError(
            f"{base.folder / CONFIG}: tie_word_embeddings is not false, so input and output "
            f"embedding are one tensor, but the adapter changes {touched[0]!r} only; {_UNTIE}"
        )
    inputs = [name for name in touched if "lm_head" not in name]
    if inputs and any(base.configured("is_encoder_decoder")):
        raise UnsupportedError(
            f"{base.folder / CONFIG}: encoder and decoder may share the embedding {inputs[0]!r}; "
            "merge the adapter with peft"
        )


def _is_vocabulary(path: str, lora: LoRA, sizes: list[int]) -> bool:
    if lora.kind.name == "embedding":
        return not sizes or lora.shape[1] in sizes
    return path.rpartition(".")[2] == "lm_head" or lora.shape[0] in sizes
