"""Adapters that are one safetensors file: the file of a source, and the format that its keys show.

Only names of tensors are read here, and JAX is not imported, for the sake of help.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coremerge_jax.errors import FormatError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.module_paths import without_wrappers

if TYPE_CHECKING:
    from coremerge_jax.io.adapter_writer import Written
    from coremerge_jax.io.file_layout import FileLayout
    from coremerge_jax.lora import Adapter, ModuleStream

SUFFIX = ".safetensors"

# Names of files: of peft, of diffusers, and of mlx-lm.
WEIGHTS = "adapter_model.safetensors"
PIPELINE = "pytorch_lora_weights.safetensors"
ADAPTERS = "adapters.safetensors"

# Endings of keys that name a part of an update, by the part.
_ENDINGS = {
    "down": r"\.lora_down\.weight|\.lora_A(\.[^.]+)?\.weight|\.lora_A"
    r"|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B(\.[^.]+)?\.weight|\.lora_B"
    r"|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "embedding_down": r"\.lora_embedding_A(\.[^.]+)?",
    "embedding_up": r"\.lora_embedding_B(\.[^.]+)?",
    "lycoris": r"\.(?P<name>hada_[wt][12](_[ab])?|lokr_w[12](_[ab])?|lokr_t2)",
}
_KEY = re.compile(
    "(?P<path>.+?)(" + "|".join(f"(?P<{part}>{end})" for part, end in _ENDINGS.items()) + ")"
)

_KOHYA = re.compile(r"(lora|lycoris)_[^.]+")
ORIGINAL = re.compile(r"^(model\.)?(?=(diffusion_model|text_encoders)\.)")

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)

# Language models have a part "transformer", too; peft's older files name it without a prefix.
_LANGUAGE = re.compile(
    r"transformer\.(h|layers?|encoder|decoder|block|wte|wpe|embedding|output_layer|word_embeddings"
    r"|blocks\.\d+\.(attn\.Wqkv|ffn\.(up|down)_proj|norm_attn_norm))\."
)

_PROCESSOR = re.compile(r"\.processor\..+_lora\.(down|up)\.weight")


class Look(NamedTuple):
    """The format that a file's keys show.

    Attributes:
        file: the file.
        format: ``"kohya"``, ``"original"``, ``"diffusers"``, ``"mlx"`` or ``"peft"``.
        key: a key that shows it.
    """

    file: Path
    format: str
    key: str


def find_file(source: str | Path) -> Path | None:
    """Returns the safetensors file of a source: itself, or the one that a folder is about.

    That is a file by the name that diffusers or mlx-lm gives it; or, in a folder without PEFT's
    configuration, its weights or the only file. Does not raise.
    """
    path = Path(source)
    try:
        if path.is_file():
            return path if path.suffix.lower() == SUFFIX else None
        has_config = os.path.lexists(path / CONFIG)  # PEFT's, or mlx-lm's
        for name in (WEIGHTS, PIPELINE, ADAPTERS):
            if (path / name).is_file():
                return None if has_config and name == WEIGHTS else path / name
        files = [] if has_config else list_files(path)
    except (OSError, ValueError):
        return None
    return files[0] if len(files) == 1 else None


def list_files(folder: Path) -> list[Path]:
    """Returns the safetensors files in a folder, in the order of their names."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and path.is_file())


def read_names(file: Path) -> list[str]:
    """Returns the names of a file's tensors; none if it is broken. Does not raise."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return sorted(opened.keys())
    except (SafetensorError, OSError, ValueError):
        return []


def read_notes(file: Path) -> Mapping[str, str]:
    """Returns the metadata in the header of a file that is not broken."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return opened.metadata() or {}


def look(source: str | Path) -> Look | None:
    """Returns the format that a source's file shows by its keys; None if it shows none."""
    file = find_file(source)
    if file is None:
        return None
    found = look_at(file.name, read_names(file))
    return None if found is None else Look(file, *found)


def look_at(name: str, keys: Iterable[str]) -> tuple[str, str] | None:
    """Returns the format that keys show, and one that shows it; None if they show none.

    Args:
        name: the file's name.
        keys: names of its tensors.
    """
    keys = dict.fromkeys(keys)
    for key in keys:
        if key.endswith((".lora_a", ".lora_b")) or (key.endswith(".A") and f"{key[:-1]}B" in keys):
            return "mlx", key
        split = split_key(key)
        if split is None:
            continue
        if _KOHYA.fullmatch(split[0]):
            return "kohya", key
        if split[1] == "alpha":  # base models have parameters of that name, too
            continue
        if ORIGINAL.match(split[0]):
            return "original", key
        if name == PIPELINE or _PROCESSOR.search(key) or is_pipeline(key):
            return "diffusers", key
        return "peft", key
    return None


def split_key(key: str) -> tuple[str, str] | None:
    """Splits a key into a module's path and the part of its update; None for other tensors.

    What training wraps around a model, and peft's prefix, are no part of the path.

    A part is ``"down"`` (A), ``"up"`` (B), ``"mid"``, ``"alpha"``, ``"embedding_down"``,
    ``"embedding_up"``, or a name of `lycoris.PARTS`.
    """
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    part = found["name"] or next(part for part in _ENDINGS if found[part])
    return without_wrappers(found["path"])[1], part


def is_pipeline(key: str) -> bool:
    """Returns True for the path of a module in a component of a pipeline of diffusers."""
    return key.partition(".")[0] in COMPONENTS and not _LANGUAGE.match(key)


class SingleFile:
    """Base of the formats that are one safetensors file and a name. See `formats.Format`.

    Attributes:
        shown: the format that the keys of such a file show, by `look`.
    """

    name: str
    description: str
    shown: str
    targets: Mapping[str, tuple[str, ...]]
    options: tuple[str, ...] = ()

    def recognises(self, source: str | Path) -> bool:
        """Returns True if the keys of the source's file show this format."""
        found = look(source)
        return found is not None and found.format == self.shown

    def locate(self, source: str | Path) -> Path:
        """Returns the file of a source that has been recognised.

        Raises:
            FormatError: it has changed since.
        """
        found = look(source)
        if found is None:
            raise FormatError(
                f"{source}: has changed while it was read; expected {self.description}"
            )
        return found.file

    def open(self, source: str | Path, *, name: str | None = None, **options: Any) -> "Adapter":
        """Opens an adapter by its file; see `formats.Format`."""
        file = self.locate(source)
        return self.read(file, name or _name(source, file), **options)

    def read(self, file: Path, name: str) -> "Adapter":
        """Opens a file; takes `options`, too.

        Args:
            file: the file.
            name: a name for messages and tables.

        Raises:
            FormatError: it is broken.
            UnsupportedError: it has more than low-rank updates.
        """
        raise NotImplementedError

    def save(
        self, adapter: "Adapter | ModuleStream", out: str | Path, *, to: str, **options: Any
    ) -> "Written":
        """Writes the adapter with a scaling of 1, in a folder with the file and a record."""
        from coremerge_jax.io.adapter_writer import write_adapter

        del to  # the only target
        return write_adapter(adapter, out, self.layout(adapter.outline), kind=self.name, **options)

    def layout(self, outline: "Adapter") -> "FileLayout":
        """Returns the places of an adapter's modules in the file.

        Raises:
            UnsupportedError: the format cannot hold the adapter.
        """
        raise NotImplementedError

    def hash(self, source: str | Path) -> dict[str, str]:
        """Returns the SHA-256 of the file by its name."""
        return hash_files(self.locate(source))


def hash_files(*files: Path) -> dict[str, str]:
    """Returns the SHA-256 of files by name."""
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _name(source: str | Path, file: Path) -> str:
    """Returns the name of a source for messages and tables: of the folder, or of its file alone."""
    return file.stem if Path(source).is_file() else Path(source).resolve().name
