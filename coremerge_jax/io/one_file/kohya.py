"""Files of sd-scripts, LyCORIS and ComfyUI as a format. JAX is imported in methods only."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.io.one_file.kohya_names import flatten_all, unflatten
from coremerge_jax.io.outputs import WRITER_OPTIONS
from coremerge_jax.io.single_file import SingleFile, read_names, split_key

if TYPE_CHECKING:
    from coremerge_jax.io.one_file.keyed_layout import KeyedLayout
    from coremerge_jax.lora import Adapter


class KohyaFormat(SingleFile):
    """A file with keys such as ``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight``.

    It may hold LoRA, LoHa or LoKr. The scaling is alpha / rank, and 1 without an alpha, as in
    sd-scripts (``networks/lora.py``) and ComfyUI (``comfy/weight_adapter``).
    """

    name = "kohya adapter"
    description = "a kohya (sd-scripts, ComfyUI) .safetensors file"
    shown = "kohya"
    targets: Mapping[str, tuple[str, ...]] = {"kohya": WRITER_OPTIONS}

    def read(self, file: Path, name: str) -> "Adapter":
        """Opens a file; see `keyed.open_keyed`.

        Paths of modules are the dotted ones of the model where their names are known
        (`kohya_names`), after ``unet.``, ``diffusion_model.``, ``transformer.``, ``text_encoder.``
        and so on; else the names in the file.
        """
        from coremerge_jax.io.one_file.keyed import open_keyed

        splits = filter(None, map(split_key, read_names(file)))
        paths = unflatten(dict.fromkeys(path for path, _ in splits))
        return open_keyed(
            file, name=name, rename=lambda path: paths.get(path, path), format="kohya"
        )

    def layout(self, outline: "Adapter") -> "KeyedLayout":
        """Returns the places of an adapter's modules in the file, by their flat names."""
        from coremerge_jax.io.one_file.keyed_layout import KeyedLayout

        _refuse_two_tools(outline)
        return KeyedLayout(
            outline,
            name=self.name,
            weights=None,
            stems=flatten_all(outline),
            endings=(".lora_down.weight", ".lora_up.weight"),
            alpha=True,
            notes=lambda _: {"ss_network_module": "networks.lora"},
        )


def _refuse_two_tools(paths: Iterable[str]) -> None:
    """Refuses modules with the names of the model's authors beside some with those of diffusers.

    ComfyUI knows both names, and would add both updates to one layer.

    Raises:
        UnsupportedError: there are both.
    """
    first: dict[str, str] = {}
    for path in paths:
        first.setdefault(path.partition(".")[0], path)
    theirs = first.get("unet") or first.get("transformer")
    if theirs and "diffusion_model" in first:
        raise UnsupportedError(
            f"modules {first['diffusion_model']!r} and {theirs!r} have the names of two tools (the "
            "model's authors, and diffusers), so one layer may be there twice; merge adapters that "
            "name their layers alike"
        )
