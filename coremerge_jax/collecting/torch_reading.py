"""The reading of each task's unlabelled examples by a PyTorch model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from coremerge_jax.collecting.torch_modules import TorchModel
from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError
from coremerge_jax.lora import Adapter, AdapterSource
from coremerge_jax.merging.alignment import align
from coremerge_jax.merging.base_names import best_name
from coremerge_jax.merging.checks import as_adapters, check_whole
from coremerge_jax.merging.groups import label
from coremerge_jax.text import short

# Arguments of a model by name, such as ``input_ids`` and ``attention_mask``.
Batch = Mapping[str, Any]


class Reader:
    """A model that reads the examples of each task.

    Attributes:
        host: the model.
        adapters: by common names.
        seen: inputs of the task at hand that have been read, counted by who reads.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        adapters: Sequence[Adapter],
        batches: Sequence[Iterable[Batch]],
        limit: int | None,
    ) -> None:
        self.adapters: Sequence[AdapterSource] = align(as_adapters(adapters))
        if not self.adapters or len(batches) != len(self.adapters):
            raise MismatchError(
                f"inputs of {len(batches)} tasks for {len(self.adapters)} adapters; expected those "
                "of one task for each adapter, at least one"
            )
        if limit is not None:
            check_whole("limit", limit, 1)
        self.host, self._batches, self._limit = TorchModel(model), batches, limit
        self.seen, self._tokens = 0, Tokens(None)

    @property
    def base_model(self) -> str | None:
        """The name of the base model that says most: the adapters', or the model's own."""
        names = [adapter.metadata.base_model for adapter in self.adapters]
        return best_name(name for name in [*names, self.host.name] if name)

    def read(self, t: int, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[Batch, Any]]:
        """Yields the batches of a task and the model's outputs, up to the limit.

        Raises:
            MismatchError: nothing has been read.
            RecipeError: a batch has no names.
        """
        self.seen = 0
        for batch in self._batches[t]:
            if not isinstance(batch, Mapping):
                raise RecipeError(
                    f"batches[{t}]: expected batches with the model's arguments by name, such as "
                    f"[{{'input_ids': ...}}], got one that is {short(batch)}"
                )
            yield batch, self.run(batch, weights)
            if self._limit is not None and self.seen >= self._limit:
                return
        if not self.seen:
            raise MismatchError(
                f"{label(self.adapters, t)}: no inputs of its task have reached the model; give "
                "some"
            )

    def run(self, batch: Batch, weights: Mapping[str, torch.Tensor]) -> Any:
        """Returns the model's output for a batch."""
        mask = batch.get("attention_mask")
        if mask is not None and not mask.all() and self.host.has_decoder_inputs:
            raise UnsupportedError(
                f"{self.host.label} is an encoder-decoder model, and a batch has padding; give "
                "batches of equal lengths, such as one example each"
            )
        self._tokens = Tokens(mask)
        try:
            return self.host.run(batch, weights)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"{self.host.label}: the device has no memory left for a batch; give smaller ones "
                "(--batch-size), or shorter examples (--length)"
            ) from error

    def select(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """Returns the rows of a module's inputs that count, ``(N, n)``."""
        return self._tokens.select(path, x)

    def predictions(self, output: Any) -> torch.Tensor:
        """Returns ``(N, labels)``, the logits that count in an output of the model."""
        if not isinstance(logits := getattr(output, "logits", None), torch.Tensor):
            raise UnsupportedError(
                f"{self.host.label} gives no logits; load the model with its head, such as by "
                "AutoModelForCausalLM"
            )
        return self.select("logits", logits)


class Tokens:
    """The tokens of a batch that count.

    Args:
        mask: ``(batch, length)``, nonzero where there is no padding; None for no padding at all.
    """

    def __init__(self, mask: torch.Tensor | None) -> None:
        if mask is not None and mask.ndim != 2:
            raise MismatchError(
                f"attention_mask has shape {tuple(mask.shape)}; expected (batch, length)"
            )
        self._mask = None if mask is None or mask.all() else mask
        # Of a mask itself, a GPU would have to be waited for at each module.
        self._places = None if mask is None else mask.flatten().nonzero()[:, 0]

    def select(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """Returns the rows of ``(batch, length, n)`` that count; or all, if each is an example."""
        rows = x.reshape(-1, x.shape[-1])
        if self._mask is None or self._places is None:
            return rows
        if x.shape[:-1] == self._mask.shape or (x.ndim == 2 and len(x) == self._mask.numel()):
            return rows[self._places.to(x.device)]
        if x.ndim == 2 and len(x) == len(self._mask):  # after pooling
            return rows
        raise MismatchError(
            f"module {path!r} has inputs of shape {tuple(x.shape)} for an attention_mask of shape "
            f"{tuple(self._mask.shape)}, so which are padding is not certain; give batches without "
            "padding, such as one example each (--batch-size 1)"
        )
