"""Safetensors files whose keys name modules and parts of their updates, to an `Adapter`.

Such are the files of sd-scripts, ComfyUI, diffusers and others, and PEFT's without its
configuration; they differ in the names of modules, and in where a missing alpha is looked for.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io import lycoris
from coremerge_jax.io.adapter_config import RETRAIN
from coremerge_jax.io.factors import FactorFile, Factors, FactorSource, is_float, outline_of
from coremerge_jax.io.one_file.kohya_names import flat_key
from coremerge_jax.io.single_file import split_key
from coremerge_jax.io.tensors import TensorReader
from coremerge_jax.lora import LINEAR, Kind, Metadata

# Parts of keys that are not of a plain low-rank update, and what they are.
_OTHERS = {
    "dora_scale": "DoRA, which rescales the base weights",
    "lora_magnitude_vector": "DoRA, which rescales the base weights",
    "diff": "a whole difference of weights, not a low-rank one",
    "diff_b": "a difference of a bias",
    "bias": "a bias, which this format's tools add to the layer's",
    "w_norm": "a trained norm",
    "b_norm": "a trained norm",
    "a1": "GLoRA, which scales the base weights",
    "b1": "GLoRA, which scales the base weights",
    "oft_blocks": "OFT, which rotates the base weights",
    "oft_diag": "OFT, which rotates the base weights",
    "on_input": "IA3, which scales activations",
    "reshape_weight": "a control adapter, which makes layers of the base model wider",
    "lora_E": "AdaLoRA",
}

# Fields of a header (sd-scripts' ``networks/lora.py``, Stability AI's ModelSpec) that are as true
# of a merge, and those that the layout of the factors replaces. Others are of a training run.
_ABOUT_MODEL = frozenset(
    [f"ss_{x}" for x in ("base_model_version", "sd_model_hash", "sd_model_name", "v2")]
    + [f"modelspec.{x}" for x in ("architecture", "implementation", "prediction_type")]
)
_ABOUT_FACTORS = frozenset(
    ["format", "lora_adapter_metadata", "lora_alpha", "alpha"]
    + [f"ss_network_{x}" for x in ("alpha", "args", "dim", "dropout", "module")]
)
_LONGEST = 1000

# The scale of a module without an alpha in the file, by its path in the file and its rank.
Scale = Callable[[str, int], float]


def open_keyed(
    file: Path,
    *,
    name: str,
    rename: Callable[[str], str] = str,
    scale: Scale | None = None,
    **metadata: Any,
) -> FactorFile:
    """Opens a file of low-rank updates, which may be LoHa's and LoKr's.

    Headers and alphas are read and checked; factors are read and checked when they are asked for.

    Args:
        file: the file.
        name: a name for messages and tables.
        rename: gives the path of a module by the one in the file.
        scale: gives the scale of a module that has no alpha in the file; 1 by default.
        **metadata: further fields of `Metadata`; ranks and alphas that all modules share are found.

    Raises:
        FormatError: the file is broken, or a module is not whole.
        UnsupportedError: it has more than low-rank updates.
    """
    contents = Contents(TensorReader(file), rename, scale or (lambda *_: 1.0))
    found = {
        "rank": _common(contents.ranks.values()),
        "alpha": _common(contents.alphas.values()),
        "dtype": contents.dtype,
        "header": _header(contents.reader.metadata),
    }
    known = Metadata(name=name, **{**found, **metadata})
    return KeyedFile(contents.reader, contents.modules, known)


def _header(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the fields of a header, with the text of those that describe the model."""
    return {
        name: text[:_LONGEST] if name in _ABOUT_MODEL else ""
        for name, text in metadata.items()
        if name not in _ABOUT_FACTORS
    }


class KeyedFile(FactorFile):
    """An adapter whose factors are in one file, which may be in a folder with others."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """The file: nothing else in its folder is read."""
        return (self._reader.file,)


class Contents:
    """Modules of a file.

    Args:
        reader: the file.
        rename: gives the path of a module by the one in the file.
        scale: gives the scale of a module that has no alpha in the file.

    Attributes:
        reader: the file.
        modules: source of each module, by its path.
        ranks: the rank that alpha is divided by, by a module's path in the file.
        alphas: the alphas in the file, by a module's path in it.
        dtype: dtype of the first factor.

    Raises:
        FormatError: the file is broken, or a module is not whole.
        UnsupportedError: it has more than low-rank updates.
    """

    def __init__(self, reader: TensorReader, rename: Callable[[str], str], scale: Scale) -> None:
        self.reader, self.file = reader, reader.file
        groups = self._sort()
        self.alphas = self._read_alphas(groups)
        self.ranks: dict[str, int] = {}
        self.dtype = next(
            (str(reader.tensors[key].dtype) for parts in groups.values() for key in parts.values()),
            None,
        )
        self._scale = scale
        self.modules: dict[str, FactorSource] = {}
        found: dict[str, str] = {}
        for path, parts in groups.items():
            renamed = rename(path)
            other = found.setdefault(flat_key(renamed), path)
            if other != path:
                raise FormatError(
                    f"{self.file}: modules {other!r} and {path!r} are both {renamed!r}; expected "
                    "one update a module"
                )
            self.modules[renamed] = self._source(path, parts)

    def _sort(self) -> dict[str, dict[str, str]]:
        """Returns the keys of a module's parts, by its path in the file and the part."""
        groups: dict[str, dict[str, str]] = {}
        for key in self.reader.tensors:
            split = split_key(key)
            if split is None:
                raise self._refused(key)
            path, part = split
            parts = groups.setdefault(path, {})
            if part in parts:
                raise FormatError(
                    f"{self.file}: {parts[part]!r} and {key!r} are the same part of one module; "
                    "expected one adapter a file"
                )
            parts[part] = key
        if not groups:
            raise FormatError(f"{self.file}: no tensors in it; expected LoRA factors")
        return groups

    def _refused(self, key: str) -> UnsupportedError:
        words = reversed(key.split("."))
        reason = next((_OTHERS[word] for word in words if word in _OTHERS), None)
        told = f"belongs to {reason}" if reason else "is no part of a low-rank update"
        return UnsupportedError(
            f"{self.file}: tensor {key!r} {told}, so it cannot be merged as LoRA; {RETRAIN}"
        )

    def _read_alphas(self, groups: Mapping[str, dict[str, str]]) -> dict[str, float]:
        """Takes the alphas out of the groups, and reads them."""
        keys = {path: parts.pop("alpha") for path, parts in groups.items() if "alpha" in parts}
        with self.reader.opened() as tensor:
            return {path: self._alpha(key, tensor) for path, key in keys.items()}

    def _alpha(self, key: str, tensor: Callable[[str], np.ndarray]) -> float:
        shape = self.reader.tensors[key].shape
        if math.prod(shape) != 1:
            raise FormatError(f"{self.file}: {key!r} has shape {shape}; expected one number")
        alpha = float(tensor(key).reshape(()))
        if not math.isfinite(alpha) or alpha == 0:
            raise FormatError(
                f"{self.file}: {key!r} is {alpha:g}; expected a finite number other than 0, which "
                "some tools take for no update, and others for the rank"
            )
        return alpha

    def _source(self, path: str, parts: dict[str, str]) -> FactorSource:
        """Returns the source of a module, given the keys of its parts."""
        shapes = {part: self._shape(key) for part, key in parts.items()}
        if lycoris.method(parts):
            kind, outline, factors = self._lycoris(path, shapes)
        elif set(parts) in ({"down", "up"}, {"down", "up", "mid"}):
            kind, outline, factors = self._lora(path, shapes)
        elif set(parts) == {"embedding_down", "embedding_up"}:
            kind, outline, factors = self._embedding(path, shapes)
        else:
            there = ", ".join(map(repr, sorted(parts.values()))) or "an alpha"
            raise FormatError(
                f"{self.file}: module {path!r} has {there} only; expected both factors of an update"
            )
        rank, m, n, divisor = outline
        scale = 1.0
        if divisor is not None:
            self.ranks[path] = divisor
            alpha = self.alphas.get(path)
            scale = self._scale(path, divisor) if alpha is None else alpha / divisor
        keys = tuple(parts.values())
        return FactorSource(self.file, path, outline_of(rank, m, n, kind), keys, factors, scale)

    def _shape(self, key: str) -> tuple[int, ...]:
        tensor = self.reader.tensors[key]
        if not is_float(tensor.dtype):
            raise UnsupportedError(
                f"{self.file}: tensor {key!r} has dtype {tensor.dtype}, so the factors are "
                "quantized, or no weights; save the adapter in float32, bfloat16 or float16"
            )
        return tensor.shape

    def _lycoris(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> "_Form":
        try:
            size = lycoris.size(shapes)
        except FormatError as error:
            raise FormatError(f"{self.file}: module {path!r} {error}") from error
        kind = Kind("conv2d", kernel=size.kernel) if size.kernel else LINEAR
        return (
            kind,
            (size.rank, size.m, size.n, size.divisor),
            partial(lycoris.named_factors, tuple(shapes)),
        )

    def _lora(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> "_Form":
        down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
        where = f"{self.file}: module {path!r}"
        told = f"A has shape {down} and B has shape {up}"
        if 0 in (*down, *up):
            raise FormatError(f"{where}: {told}: empty; save the adapter again")
        if {len(down), len(up)} == {2} and mid is None and down[0] == up[1]:
            return LINEAR, (down[0], up[0], down[1], down[0]), partial(_matrices, tuple(shapes))
        if len(down) not in (2, 4) or len(up) not in (2, 4):
            raise UnsupportedError(
                f"{where}: {told}; only linear layers and two-dimensional convolutions are "
                "supported"
            )
        if mid is not None and (len(mid) != 4 or mid[:2] != (up[1], down[0])):
            raise FormatError(f"{where}: {told}, and lora_mid {mid}, which does not fit them")
        if len(down) != 4 or up[2:] != (1, 1) or (mid is None and down[0] != up[1]):
            raise FormatError(
                f"{where}: {told}; expected (r, inputs) and (outputs, r), or (r, inputs, height, "
                "width) and (outputs, r, 1, 1), of one rank r"
            )
        if mid is not None and down[2:] != (1, 1):
            raise FormatError(f"{where}: {told}; expected kernels of 1 x 1 around lora_mid")
        kernel = (down[1], *(down if mid is None else mid)[2:])
        sizes = up[1], up[0], math.prod(kernel), down[0]
        return Kind("conv2d", kernel=kernel), sizes, partial(_matrices, tuple(shapes))

    def _embedding(self, path: str, shapes: Mapping[str, tuple[int, ...]]) -> "_Form":
        down, up = shapes["embedding_down"], shapes["embedding_up"]
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in (*down, *up):
            raise FormatError(
                f"{self.file}: module {path!r}: A has shape {down} and B has shape {up}; "
                "expected (r, rows) and (columns, r) of one rank r"
            )
        sizes = down[0], up[0], down[1], down[0]
        return Kind("embedding", transposed=True), sizes, partial(_matrices, tuple(shapes))


# Kind, sizes (rank, m, n, the divisor of alpha), and the function from tensors to factors.
_Form = tuple[Kind, tuple[int, int, int, int | None], Callable[..., Factors]]


def _matrices(names: tuple[str, ...], *tensors: np.ndarray) -> Factors:
    """Returns A and B; a convolution's are flat, and what is between them becomes part of A."""
    parts = {name.removeprefix("embedding_"): x for name, x in zip(names, tensors, strict=True)}
    down, up = parts["down"], parts["up"]
    up = up.reshape(up.shape[:2])
    if "mid" not in parts:
        return down.reshape(len(down), -1), up
    mid = parts["mid"].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        inner = np.einsum("ij...,jq->iq...", mid, down.reshape(down.shape[:2]).astype(np.float64))
    return inner.reshape(len(inner), -1), up


def _common(values: Iterable[Any]) -> Any:
    """Returns the value that all of these are; None if they differ, or there is none."""
    found = set(values)
    return found.pop() if len(found) == 1 else None
