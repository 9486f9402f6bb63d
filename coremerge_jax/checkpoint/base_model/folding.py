"""What all ways to fold an adapter into a base model on disk have in common."""

import abc
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from threadpoolctl import threadpool_limits

from coremerge_jax import __version__
from coremerge_jax.checkpoint import atomic
from coremerge_jax.checkpoint.peft.card import PROVENANCE
from coremerge_jax.errors import FormatError
from coremerge_jax.lora import Adapter


@dataclasses.dataclass(frozen=True)
class Applied:
    """What came of a module's update.

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
    """What was done to a base model.

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
        markers: files that tell a model that was written here from any other folder.
        adapter: with the names of the base model.
        report: what will be done; no losses are known yet.
        scale: of the update.
    """

    markers: ClassVar[tuple[str, ...]]

    def __init__(
        self, adapter: Adapter, base: str | Path, folder: Path, report: Report, scale: float
    ) -> None:
        self.adapter, self.report, self.scale = adapter, report, scale
        self._source, self._folder = str(base), folder

    @abc.abstractmethod
    def _fold(self, folder: Path, origin: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """Writes the changed model into a folder; gives each module and its rounding loss.

        Args:
            folder: where to write.
            origin: what the model is made of.
        """

    def check_output(self, out: str | Path, *, force: bool = False) -> None:
        """Raises the error that `write` would for its arguments, before any work is done."""
        path, folder = Path(os.path.realpath(out)), Path(os.path.realpath(self._folder))
        if path == folder or folder in path.parents or path in folder.parents:
            raise FormatError(f"{out}: is, or contains, or is in the base; choose another output")
        atomic.check_output(out, markers=self.markers, force=force)

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
            atomic.atomic_folder(out, markers=self.markers, force=force) as folder,
        ):
            for path, loss in self._fold(folder, origin):
                losses[path] = loss
                advance()
            modules = {
                path: dataclasses.replace(module, rounding_loss=losses[path])
                for path, module in self.report.modules.items()
            }
            report = dataclasses.replace(self.report, modules=modules)
            content = json.dumps({**origin, **dataclasses.asdict(report)}, indent=2)
            (folder / PROVENANCE).write_text(content + "\n", encoding="utf-8")
        return report
