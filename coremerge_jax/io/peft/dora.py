"""DoRA adapters as plain LoRA, which takes the base model.

DoRA (arXiv 2402.09353, eq. 5) sets the norm of each row of the adapted weight:
``W' = m (W + ΔW) / ‖W + ΔW‖``. What it adds to W is of full rank in general; its best approximation
of a lower rank is LoRA. peft has one m for each output (``peft/tuners/lora/dora.py``).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg

from coremerge_jax.errors import FormatError, MismatchError, RecipeError, UnsupportedError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.base_model.folder import BaseModel
from coremerge_jax.io.base_model.tensor_names import find_tensors
from coremerge_jax.io.factors import FactorFile, check_finite, outline_of
from coremerge_jax.io.peft.config import PeftConfig
from coremerge_jax.io.peft.files import locate
from coremerge_jax.io.peft.reader import Contents, metadata_of, open_weights
from coremerge_jax.io.tensors import TensorFiles, TensorReader
from coremerge_jax.lora import AdapterFile, LoRA, Metadata

# Up to this share of all singular values, ARPACK finds the largest faster than LAPACK finds all.
_FEW = 1 / 4


class DoraFile(AdapterFile):
    """A DoRA adapter whose modules are cut to LoRA as they are read.

    Attributes:
        kept: the share of ``‖ΔW‖_F²`` that each module kept, of those that have been read.
    """

    def __init__(
        self,
        plain: FactorFile,
        magnitudes: Mapping[str, str],
        reader: TensorReader | TensorFiles,
        base: BaseModel,
        rank: int,
        metadata: Metadata,
    ) -> None:
        self._plain, self._magnitudes, self._reader, self._base = plain, magnitudes, reader, base
        self._tensors = _find_weights(plain, magnitudes, base)
        outlines = dict(plain.outline)
        for path in magnitudes:
            m, n = outlines[path].shape
            outlines[path] = outline_of(min(rank, m, n), m, n, outlines[path].kind)
        super().__init__(outlines, metadata=metadata, extras=plain.extras)
        self.kept: dict[str, float] = {}

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the adapter and of its base model."""
        return (*self._plain.folders, self._base.folder)

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths.

        Raises:
            FormatError: a module has values that are not finite, or a file has changed.
        """
        loras = self._plain.read(paths)
        return {
            path: self._cut(path, lora) if path in self._magnitudes else lora
            for path, lora in loras.items()
        }

    def _cut(self, path: str, lora: LoRA) -> LoRA:
        weight = self._weight(path)
        rescaled = _rescaled(weight, lora, self._magnitude(path))
        if not np.isfinite(rescaled).all():
            raise FormatError(
                f"{self._reader.file}: module {path!r}: a row of the adapted weight is zero, so "
                "DoRA cannot set its norm; is it the right base?"
            )
        update = rescaled - weight
        rank = self._modules[path].rank
        u, s, vt = _leading(update, rank)
        total = float(np.square(update).sum())
        self.kept[path] = float(np.square(s).sum()) / total if total else 1.0
        a, b = vt.astype(np.float32), (u * s).astype(np.float32)
        return LoRA(a=a, b=b, kind=lora.kind)

    def _weight(self, path: str) -> np.ndarray:
        """Returns the weight of the base model, (m, n) in float64."""
        tensor = self._tensors[path]
        with self._base.shards[self._base.shard[tensor]].opened() as read:
            weight = read(tensor).astype(np.float64)
        transposed = self._base.is_transposed(tensor, self._modules[path].kind)
        return weight.T if transposed else weight

    def _magnitude(self, path: str) -> np.ndarray:
        with self._reader.opened() as read:
            value = read(self._magnitudes[path])
        check_finite(self._reader.file, self._magnitudes[path], value)
        return value.astype(np.float64).reshape(-1)


def open_dora(
    source: str | Path, base: str | Path, *, rank: int, name: str | None = None
) -> DoraFile:
    """Opens a DoRA adapter as LoRA of a rank, given its base model.

    The base has to be the one that it was trained on, as the norms of its weights count. Modules
    are cut as they are read, one weight of the base in memory at a time.

    Args:
        source: as of `open_peft`.
        base: a folder or Hugging Face id, as of `apply_adapter`.
        rank: the rank of the result, module by module.
        name: a name for messages and tables.

    Raises:
        FormatError: files are missing, broken or inconsistent.
        MismatchError: the adapter does not fit the base.
        RecipeError: it is no DoRA adapter.
        UnsupportedError: a module with a magnitude is no linear layer with a weight of its own.
    """
    folder = locate(source)
    config = PeftConfig(folder / CONFIG, allowed=("use_dora",))
    reader = open_weights(folder)
    contents = Contents(reader, config, dora=True)
    if not contents.magnitudes:
        raise RecipeError(f"{source}: no DoRA adapter, so it needs no base; leave out --base")
    metadata = metadata_of(source, folder, contents, name)
    plain = FactorFile(reader, contents.modules, metadata, contents.extras)
    return DoraFile(plain, contents.magnitudes, reader, BaseModel(base), rank, metadata)


def _find_weights(
    plain: FactorFile, magnitudes: Mapping[str, str], base: BaseModel
) -> dict[str, str]:
    """Returns the tensor of the base that each module with a magnitude rescales."""
    for path, key in magnitudes.items():
        if path not in plain or plain.outline[path].kind.name != "linear":
            raise UnsupportedError(
                f"{plain.folders[0]}: {key!r} is the magnitude of no linear layer; merge the "
                "adapter with peft"
            )
    kinds = {path: plain.outline[path].kind for path in magnitudes}
    _, sites = find_tensors(kinds, base.shard, str(base.folder))
    tensors: dict[str, str] = {}
    for path, (site, *more) in sites.items():
        lora = plain.outline[path]
        transposed = base.is_transposed(site.tensor, lora.kind)
        expected = lora.shape[::-1] if transposed else lora.shape
        found = base.floating(site.tensor).shape
        if more or site.index is not None or site.part != (0, 1):
            raise UnsupportedError(
                f"{base.folder}: module {path!r} is a part of tensor {site.tensor!r} there, so its "
                "norm is not certain; merge the adapter with peft"
            )
        if found != expected:
            raise MismatchError(
                f"{base.folder}: tensor {site.tensor!r} has shape {found}, but the update of "
                f"module {path!r} needs {expected}; is it the right base?"
            )
        tensors[path] = site.tensor
    return tensors


def _rescaled(weight: np.ndarray, lora: LoRA, magnitude: np.ndarray) -> np.ndarray:
    """Returns the adapted weight, (m, n), with rows of these norms."""
    adapted = weight + np.asarray(lora.b, np.float64) @ np.asarray(lora.a, np.float64)
    norms: Any = np.linalg.norm(adapted, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (magnitude / norms)[:, None] * adapted


def _leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the leading singular triplets: (m, r), (r,) and (r, n)."""
    least = min(matrix.shape)
    if rank > _FEW * least or not matrix.any():
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    start = np.random.default_rng(0).standard_normal(least)  # so that the result is always the same
    u, s, vt = scipy.sparse.linalg.svds(matrix, k=rank, v0=start)
    return u[:, ::-1], s[::-1], vt[::-1]
