"""PEFT's weights without their configuration as a format. JAX is imported in methods only."""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge_jax.errors import FormatError, RecipeError, UnsupportedError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.module_paths import WRAPPED, without_wrappers
from coremerge_jax.io.one_file.diffusers import read_scales
from coremerge_jax.io.single_file import (
    WEIGHTS,
    SingleFile,
    read_names,
    read_notes,
)

if TYPE_CHECKING:
    from coremerge_jax.lora import Adapter

# Names of alpha in the header.
_ALPHAS = ("lora_alpha", "ss_network_alpha")

_MISTRAL = re.compile(r"layers\.\d+\.(attention|feed_forward)\.w.*")


class PeftFileFormat(SingleFile):
    """A file with keys such as ``base_model.model.layers.0.q_proj.lora_A.weight``, by itself.

    The scaling is alpha / rank, with the alpha of the file's tensors or header, else with one that
    is given. It is never guessed: PEFT's default is another than that of most trainers.
    """

    name = "PEFT weights"
    description = f"PEFT's weights alone (.safetensors without {CONFIG}, with an alpha)"
    shown = "peft"
    targets: Mapping[str, tuple[str, ...]] = {}
    options = ("alpha",)

    def read(self, file: Path, name: str, alpha: float | None = None) -> "Adapter":
        """Opens a file; see `keyed.open_keyed`.

        Args:
            file: the file.
            name: a name for messages and tables.
            alpha: the alpha of modules that have none in the file.

        Raises:
            FormatError: neither the file nor `alpha` tells the scaling.
            RecipeError: `alpha` is no number that scales.
        """
        from coremerge_jax.io.one_file.keyed import open_keyed

        if alpha is not None and not (math.isfinite(alpha) and alpha):
            raise RecipeError(f"alpha {alpha}: expected a finite number other than 0")
        if alpha is None and (file.parent / CONFIG).is_file() and file.name == WEIGHTS:
            raise FormatError(
                f"{file}: its {CONFIG} is beside it and has the scaling; give the folder "
                f"{file.parent} instead"
            )
        has_prefix = all(without_wrappers(key)[0] for key in read_names(file))
        found: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
        return open_keyed(
            file,
            name=name,
            rename=partial(_rename, file),
            scale=_Scales(file, alpha),
            format="peft",
            prefix=None if has_prefix else "",
            **found,
        )


def _rename(file: Path, path: str) -> str:
    """Returns the path of a module in the base model.

    Raises:
        UnsupportedError: its factors may be those of several experts, which only the configuration
            tells apart.
    """
    if path.endswith(".experts") or WRAPPED in path:
        raise UnsupportedError(
            f"{file}: module {path!r} may have the factors of several experts, or of a layer that "
            f"peft has wrapped twice; {CONFIG} tells: put it beside the file"
        )
    return path


class _Scales:
    """Scales of modules that have no alpha in a file's tensors."""

    def __init__(self, file: Path, alpha: float | None) -> None:
        self._file = file
        self._told = read_scales(file) if alpha is None else None
        self._alpha = _header_alpha(file) if alpha is None else alpha

    def __call__(self, path: str, rank: int) -> float:
        told = None if self._told is None else self._told(path, rank)
        if told is not None:
            return told
        if self._alpha is None:
            is_mistral = _MISTRAL.fullmatch(path)
            hint = "; mistral-finetune's is the scaling in params.json times the rank"
            raise FormatError(
                f"{self._file}: module {path!r} has rank {rank}, but nothing tells its alpha: "
                f"there is no {CONFIG}, and neither tensors nor header have one; put {CONFIG} "
                "beside it, or give the alpha of its training: coremerge convert FILE -o FOLDER "
                f"--alpha NUMBER{hint if is_mistral else ''}"
            )
        return self._alpha / rank


def _header_alpha(file: Path) -> float | None:
    """Returns the alpha in a file's header, if there is one number."""
    notes = read_notes(file)
    for text in (notes[name] for name in _ALPHAS if name in notes):
        try:
            alpha = float(text)
        except ValueError:
            continue
        if math.isfinite(alpha) and alpha:
            return alpha
    return None
