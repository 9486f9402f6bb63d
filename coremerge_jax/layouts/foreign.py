"""Formats that are not read from trees, though their keys look like those of a layout."""

import re
from collections.abc import Mapping

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.layouts.axes import Shape

# openpi (openpi/models/lora.py) names einsums as gemma does, and factors as flax nnx does.
_OPENPI = re.compile(r".*(?:^|/)(?:q|kv|qkv|attn_vec)_einsum(?:_\d+)?/lora_[ab]")
_CAPITALS = re.compile(r".*/lora_[AB](?:/.*)?")


def refuse_foreign(shapes: Mapping[str, Shape | None]) -> None:
    """Refuses factors whose update is not that of any layout, or of one adapter.

    Args:
        shapes: by key; None where only the key is known.

    Raises:
        FormatError: they are of SkyRL-tx or levanter.
        UnsupportedError: they are of openpi.
    """
    for key, shape in shapes.items():
        if _OPENPI.fullmatch(key) and (shape is None or len(shape) > 2):
            raise UnsupportedError(
                f"{key!r} is a factor as openpi stores them: its einsums sum over attention heads "
                "between the two factors, or have factors for each head, and its feed-forwards "
                "leave out the scale, which no layout here does; fold the adapters into full "
                "weights with openpi, or retrain with another library"
            )
        if shape is None and _CAPITALS.fullmatch(key):
            raise FormatError(
                f"{key!r} is not of a layout that is read from trees: SkyRL-tx has factors of "
                "several adapters in one array (adapters, inputs, r), levanter has axes with "
                "names; export each adapter as a PEFT folder (SkyRL-tx: save_lora_checkpoint, "
                "levanter: save_peft_pretrained) and give these"
            )
