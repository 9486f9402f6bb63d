"""An adapter's updates, added to the weights of its base model: ``W' = W + b @ a``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coremerge_jax.checkpoint.base_model.files import FileFolding
from coremerge_jax.checkpoint.base_model.folding import Folding, Report
from coremerge_jax.checkpoint.base_model.tree import TreeFolding
from coremerge_jax.checkpoint.orbax_tree import is_orbax
from coremerge_jax.checkpoint.urls import refuse_url
from coremerge_jax.errors import RecipeError
from coremerge_jax.lora import Adapter
from coremerge_jax.untrusted import check_path


def apply_adapter(
    adapter: Adapter,
    base: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Folds an adapter into the weights of its base model on disk.

    ``W' = W + scale * b @ a``, in float32 (the sum with float64 weights in float64), and rounded
    once to the dtype of W.

    Of a Hugging Face safetensors folder, every file with weights is copied, and the adapted tensors
    in it are overwritten block by block: all else stays as it is, to the byte, and memory does not
    depend on the size of the model. Weights in other formats, and hidden files, are not copied.

    Of an orbax checkpoint, the tree of parameters is read into the host's memory, changed there and
    written as it was, with its structure, dtypes and custom metadata, to which ``"coremerge"`` is
    added. Kernels are found as by `fold_tree`. Other items are not copied.

    Extras of the adapter, with a Hugging Face folder: full weights and biases replace the base's,
    trained token rows those of the embedding, and what the base does not have (a classifier) comes
    at the end of its last file, in the dtype of its weights.

    Args:
        adapter: the adapter; one from `open_peft` is read module by module.
        base: a folder with ``config.json`` and ``model.safetensors``, or shards and their index;
            or a Hugging Face id ``owner/name`` or ``owner/name@revision``; or an orbax checkpoint,
            or a folder of steps.
        out: the folder to write; it appears whole or not at all.
        scale: of the update.
        force: replace a folder written by coremerge that is already there.
        provenance: what coremerge.json shall say beside names, scale and report.
        **options: for an orbax checkpoint: ``item`` and ``step`` as of `open_orbax`; ``scan_axis``
            and ``axes`` as of `fold_tree`; and ``names`` (of `names.NAME_MAPS`) and ``head_dim``
            where the adapter has Hugging Face's names.

    Raises:
        FormatError: files of the base are missing or broken, the output may not be replaced, or a
            result does not fit into the base's dtype.
        MismatchError: the adapter does not fit the base.
        RecipeError: the scale is not finite, or options are not for this base.
        UnsupportedError: the base is quantized or no safetensors folder; or the adapter changes
            one of two embeddings that are tied, or has extras and the base is a tree.
    """
    folding = find_folding(adapter, base, scale=scale, **options)
    return folding.write(out, force=force, provenance=provenance)


def find_folding(
    adapter: Adapter, base: str | Path, *, scale: float = 1.0, **options: Any
) -> Folding:
    """Checks that an adapter fits a base model, of whichever kind; see `apply_adapter`."""
    if not math.isfinite(scale):
        raise RecipeError(f"scale is {scale}; expected a finite number")
    refuse_url(base)
    check_path(base)
    if is_orbax(base):
        return TreeFolding(adapter, base, scale=scale, **options)
    if options:
        told = ", ".join(f"{name} (--{name.replace('_', '-')})" for name in options)
        raise RecipeError(f"{base}: no orbax checkpoint; {told} can be said of these only")
    return FileFolding(adapter, base, scale=scale)
