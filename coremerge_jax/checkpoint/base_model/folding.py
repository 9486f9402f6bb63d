"""Common parts of folding an adapter into a base model on disk, whatever its format."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from coremerge_jax import __version__
from coremerge_jax.checkpoint.atomic import atomic_folder
from coremerge_jax.checkpoint.outputs import MODEL, check_output, write_record
from coremerge_jax.lora import Adapter


@dataclasses.dataclass(frozen=True)
class Applied:
    """Result of adding one module's update.

    Attributes:
        tensor: name of the tensor in the base model.
        shape: of the update, as it is stored.
        dtype: of the tensor.
        rounding_loss: the share of the update that rounding to the dtype changed,
            ``‖cast(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖``; 0 without an update.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    rounding_loss: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """Report on the changes to a base model.

    Attributes:
        modules: what came of the update of each module.
        replaced: tensors that were set to trained values, in whole or in some rows, or to which
            a trained bias was added.
        appended: tensors that the base model does not have.
        copied: files that were copied as they are, beside those with the weights.
        skipped: what was left out: files that hold weights without the update, other items of a
            checkpoint.
    """

    modules: dict[str, Applied]
    replaced: list[str] = dataclasses.field(default_factory=list)
    appended: list[str] = dataclasses.field(default_factory=list)
    copied: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


class Folding(abc.ABC):
    """An adapter and its base model, found to fit. See `apply_adapter` for arguments and errors.

    Attributes:
        adapter: with the names of the base model.
        report: what will be done; no losses are known yet.
        scale: of the update.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: str | Path,
        inputs: Sequence[Path],
        report: Report,
        scale: float,
    ) -> None:
        self.adapter, self.report, self.scale = adapter, report, scale
        self._source, self._inputs = str(base), inputs

    @abc.abstractmethod
    def _fold(self, folder: Path, origin: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """Writes the changed model into a folder; gives each module and its rounding loss.

        Args:
            folder: where to write.
            origin: what the model is made of.
        """

    def check_output(self, out: str | Path, *, force: bool = False) -> None:
        """Raises the error that `write` would for its arguments, before any work is done."""
        check_output(out, kind=MODEL, inputs=self._inputs, force=force)

    def write(
        self,
        out: str | Path,
        *,
        force: bool = False,
        provenance: Mapping[str, Any] | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> Report:
        """Writes the changed model.

        Args:
            out: see `apply_adapter`.
            force: see `apply_adapter`.
            provenance: see `apply_adapter`.
            advance: called after each module.
        """
        self.check_output(out, force=force)
        origin = {
            "coremerge_version": __version__,
            "base": self._source,
            "adapter": self.adapter.metadata.name,
            "scale": self.scale,
            **(provenance or {}),
        }
        losses = {}
        # The products are small: threads would wait for each other for longer than they compute.
        with (
            threadpool_limits(1, user_api="blas"),
            atomic_folder(out, kind=MODEL, inputs=self._inputs, force=force) as folder,
        ):
            for path, loss in self._fold(folder, origin):
                losses[path] = loss
                advance()
            modules = {
                path: dataclasses.replace(module, rounding_loss=losses[path])
                for path, module in self.report.modules.items()
            }
            report = dataclasses.replace(self.report, modules=modules)
            write_record(folder, MODEL, {**origin, **dataclasses.asdict(report)})
        return report
