"""`Adapter` to PEFT adapter folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from coremerge_jax.checkpoint import atomic
from coremerge_jax.checkpoint.peft.card import PROVENANCE, model_card
from coremerge_jax.checkpoint.peft.layout import to_config, to_tensors
from coremerge_jax.checkpoint.peft.source import CONFIG, WEIGHTS, same_folder
from coremerge_jax.errors import FormatError
from coremerge_jax.lora import Adapter

DTYPES = ("float32", "bfloat16", "float16")


def check_output(
    out: str | Path, *, force: bool = False, sources: Iterable[str | Path] = ()
) -> None:
    """Raises the error that `save_peft` would, before any work is done.

    Args:
        out: the folder to write.
        force: whether an adapter folder there may be replaced.
        sources: folders that may not be replaced.

    Raises:
        FormatError: the output exists and may not be replaced.
    """
    for source in sources:
        if same_folder(source, out):
            raise FormatError(f"{out}: is one of the sources; choose another output")
    atomic.check_output(out, marker=CONFIG, force=force)


def save_peft(
    adapter: Adapter,
    out: str | Path,
    *,
    dtype: str = "float32",
    rank: int | None = None,
    energy: float | None = None,
    force: bool = False,
    card: Mapping[str, Any] | None = None,
) -> dict[str, float] | None:
    """Writes a PEFT adapter folder that peft loads, with a scaling of 1 in every module.

    The folder appears whole or not at all; one that is replaced is deleted last.

    Args:
        adapter: what to write.
        out: the folder to write.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        rank: cut every module to this rank first.
        energy: cut every module to the lowest rank that keeps this fraction of ``||ΔW||_F^2``.
        force: replace an adapter folder that is already there.
        card: where the adapter comes from, for README.md and coremerge.json; under ``"sources"``
            a list of mappings with ``"name"``, ``"path"`` and ``"sha256"``.

    Returns:
        The energy kept in each module, where `rank` or `energy` is given.

    Raises:
        FormatError: the output may not be replaced, or a value does not fit into `dtype`.
    """
    card = dict(card or {})
    sources = [source["path"] for source in card.get("sources", ()) if source.get("path")]
    check_output(out, force=force, sources=sources)
    if dtype not in DTYPES:
        raise FormatError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    kept = None
    if rank is not None or energy is not None:
        from coremerge_jax.truncation import truncate

        adapter, kept = truncate(adapter, rank=rank, energy=energy)
    config = to_config(adapter)
    tensors = {key: _cast(key, value, dtype) for key, value in to_tensors(adapter).items()}
    with atomic.atomic_folder(out, marker=CONFIG, force=force) as folder:
        _save_tensors(folder / WEIGHTS, tensors, out)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        readme, provenance = model_card(adapter, {"dtype": dtype, **card})
        (folder / "README.md").write_text(readme, encoding="utf-8")
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    return kept


def _save_tensors(file: Path, tensors: dict[str, np.ndarray], out: str | Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{out}: cannot write {file.name} ({error})") from error
    # safetensors makes files that only their owner can read.
    file.chmod(file.parent.stat().st_mode & 0o666)


def _cast(key: str, value: Any, dtype: str) -> np.ndarray:
    value = np.asarray(value)
    if np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_:
        return value
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(value, jnp.dtype(dtype))
    if np.isfinite(cast).all():
        return cast
    if np.isfinite(value).all():
        raise FormatError(f"tensor {key!r} overflows {dtype}; choose bfloat16 or float32")
    raise FormatError(f"tensor {key!r} has NaN or infinite values, so it is not written")
