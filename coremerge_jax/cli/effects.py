"""Adapters and merges without an effect: what the command line says of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coremerge_jax.errors import MismatchError

if TYPE_CHECKING:
    from coremerge_jax.merging.stream import MergeStream


def idle_adapters(stream: "MergeStream") -> Iterator[str]:
    """Says of each adapter that has no effect why, once they are merged."""
    from coremerge_jax.merging.groups import label

    for t in stream.effects.idle:
        cause = "all its updates are zero, as of one that was never trained"
        if stream.adapters[t].metadata.alpha == 0:
            cause = "its alpha is 0; set the one that it was trained with (lora_alpha)"
        yield f"{label(stream.adapters, t)} has no effect: {cause}"


def refuse_nothing(stream: "MergeStream") -> None:
    """Refuses a merge of no effect at all.

    Raises:
        MismatchError: all merged updates are zero.
    """
    if stream.effects.nothing:
        causes = "; ".join(dict.fromkeys(idle_adapters(stream)))
        raise MismatchError(
            "all merged updates are zero, so nothing is written: "
            f"{causes or 'weights or scale are too small, or the adapters cancel'}"
        )
