"""Files with the original names of image and video models as a format.

JAX is imported in methods only, for the sake of help.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.io.outputs import WRITER_OPTIONS
from coremerge_jax.io.single_file import ORIGINAL, SingleFile

if TYPE_CHECKING:
    from coremerge_jax.io.one_file.keyed_layout import KeyedLayout
    from coremerge_jax.lora import Adapter


class OriginalFormat(SingleFile):
    """A file with keys such as ``diffusion_model.blocks.0.self_attn.q.lora_A.weight``.

    ComfyUI, diffusion-pipe and ai-toolkit write them. The scaling is alpha / rank, and 1 without an
    alpha, as in ComfyUI (``comfy/weight_adapter/lora.py``).
    """

    name = "original-name adapter"
    description = "a .safetensors file with keys diffusion_model.* (ComfyUI, diffusion-pipe)"
    shown = "original"
    targets: Mapping[str, tuple[str, ...]] = {"original": WRITER_OPTIONS}

    def read(self, file: Path, name: str) -> "Adapter":
        """Opens a file; see `keyed.open_keyed`. Paths begin with ``diffusion_model.``."""
        from coremerge_jax.io.one_file.keyed import open_keyed

        return open_keyed(
            file,
            name=name,
            rename=lambda path: ORIGINAL.sub("", path),
            format="original",
            prefix="",
        )

    def layout(self, outline: "Adapter") -> "KeyedLayout":
        """Returns the places of an adapter's modules in the file, by their paths."""
        from coremerge_jax.io.one_file.keyed_layout import KeyedLayout

        for path in outline:
            _check(path)
        return KeyedLayout(
            outline,
            name=self.name,
            weights=None,
            stems={path: path for path in outline},
        )


def _check(path: str) -> None:
    if path.startswith(("diffusion_model.", "text_encoders.")):
        return
    if path.startswith(("unet.", "transformer.", "transformer_2.", "text_encoder")):
        reason = (
            "has diffusers' name for a layer, which the model's authors call otherwise, or join "
            "with others"
        )
    elif path.startswith(("lora_", "lycoris_")):
        reason = "has a kohya name, whose words are not known"
    else:
        reason = "is no part of an image or video model"
    raise UnsupportedError(
        f"module {path!r} {reason}, so it has no original name (diffusion_model.*); write it with "
        "--to kohya, diffusers or peft"
    )
