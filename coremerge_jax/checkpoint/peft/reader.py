"""PEFT adapter folder to `Adapter`."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from coremerge_jax.checkpoint.peft.config import PeftConfig
from coremerge_jax.checkpoint.peft.contents import Contents
from coremerge_jax.checkpoint.peft.source import CONFIG, locate, weights_file
from coremerge_jax.checkpoint.tensor_file import TensorReader
from coremerge_jax.lora import Adapter, AdapterFile, LoRA, Metadata

# Fields that writing the extras of an adapter back needs.
_EXTRA_FIELDS = ("bias", "modules_to_save", "revision", "trainable_token_indices")


class PeftFile(AdapterFile):
    """An adapter whose factors are still in its file, see `open_peft`.

    Threads may read from it at once.
    """

    def __init__(self, reader: TensorReader, contents: Contents, metadata: Metadata) -> None:
        outlines = {path: source.outline for path, source in contents.modules.items()}
        super().__init__(outlines, metadata=metadata, extras=contents.extras)
        self._reader, self._sources = reader, contents.modules

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the adapter."""
        return (self._reader.file.parent,)

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths, by one opening of the file.

        Experts of one parameter, and VeRA's projections, are read once if asked for in a row.

        Raises:
            FormatError: a module has values that are not finite, or the file has changed.
        """
        with self._reader.opened() as tensor:
            return {path: self._sources[path].read(tensor) for path in paths}


def open_peft(source: str | Path, *, name: str | None = None) -> Adapter:
    """Opens a PEFT adapter, whose factors stay in the file; the scaling becomes part of ``b``.

    The configuration and the header of the file are read and checked. Factors, float32 NumPy
    arrays, are read when a module is asked for, and not kept; whether they are finite is checked
    then. So are extras, when ``np.asarray`` makes an array of one.

    Module paths are those of the base model, except that the output projection of a
    ``torch.nn.MultiheadAttention`` keeps peft's ``.base_layer.out_proj``, and that the experts of
    a fused parameter are modules ``parameter[index]``. A VeRA module gets the input width of the
    shared projections, as the file does not hold its own.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a
            Hugging Face id ``owner/name`` or ``owner/name@revision``.
        name: a name for messages and tables; the name of the folder or repository by default.

    Raises:
        FormatError: the files are missing, broken or inconsistent.
        UnsupportedError: the adapter is more than a low-rank update of the base model.
    """
    folder = locate(source)
    config = PeftConfig.read(folder / CONFIG)
    reader = TensorReader(weights_file(folder))
    contents = Contents(reader, config)
    metadata = Metadata(
        name=name or _name(source, folder),
        base_model=config.fields.get("base_model_name_or_path") or None,
        task_type=config.fields.get("task_type") or None,
        rank=int(config.fields["r"]),
        alpha=config.fields.get("lora_alpha"),
        dtype=contents.dtype,
        config={f: config.fields[f] for f in _EXTRA_FIELDS if config.fields.get(f)},
    )
    return PeftFile(reader, contents, metadata)


def load_peft(source: str | Path, *, name: str | None = None) -> Adapter:
    """Reads a PEFT adapter into memory: all of what `open_peft` gives.

    Args:
        source: see `open_peft`.
        name: see `open_peft`.

    Raises:
        FormatError: the files are missing, broken or inconsistent, or a value is not finite.
        UnsupportedError: the adapter is more than a low-rank update of the base model.
    """
    opened = open_peft(source, name=name)
    return Adapter(
        opened.read(opened),
        metadata=opened.metadata,
        extras={key: np.asarray(value) for key, value in opened.extras.items()},
    )


def _name(source: str | Path, folder: Path) -> str:
    return (folder.resolve() if Path(source).is_dir() else Path(str(source).split("@")[0])).name
