"""Files of PEFT adapters, in a folder or on the Hugging Face hub."""

import os
import re
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io import untrusted
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.folders import find_folder
from coremerge_jax.io.single_file import PIPELINE, SUFFIX, WEIGHTS
from coremerge_jax.io.unknown import describe
from coremerge_jax.io.untrusted import is_regular

INDEX = f"{WEIGHTS}.index.json"
PICKLE = "adapter_model.bin"

_FILES = (WEIGHTS, INDEX, PICKLE)
_ADAPTER = "a PEFT adapter folder"
_SHARD = re.compile(r"adapter_model-(\d{1,9})-of-(\d{1,9})\.safetensors")
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")

# Endings of the names of files with weights, and names of those that say nothing of the model:
# what a trainer needs to go on, and the adapter itself in other formats.
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".msgpack")
_HARMLESS = re.compile(
    r"adapter_model.*|adapter_\d+\.pt|adapter\.pt|optimizer.*|scheduler.*|scaler\.pt|rng_state.*"
    r"|random_states.*|training_args\.bin|.*trainer_state.*|.*tokenizer.*|.*optim_states.*"
)


def locate(source: str | Path) -> Path:
    """Returns the folder that holds an adapter's files.

    Of a trainer's folder without an adapter of its own, that is the newest checkpoint.

    Args:
        source: a folder, or a Hugging Face id, which is looked for in the local cache and then
            downloaded: ``owner/name``, ``owner/name/folder``, and any of these with ``@revision``.

    Raises:
        FormatError: there is no such folder, or the id can neither be found nor downloaded.
    """
    folder = find_folder(source, _download, CONFIG)
    checkpoints = [] if is_adapter(folder) else find_checkpoints(folder)
    return checkpoints[-1] if checkpoints else folder


def is_adapter(folder: Path) -> bool:
    """Returns True if a folder has one of peft's files."""
    return any(os.path.lexists(folder / name) for name in (CONFIG, *_FILES))


def find_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders ``checkpoint-N`` in a folder that have both files, the newest last."""
    if not folder.is_dir():
        return []
    numbers = {x: _CHECKPOINT.fullmatch(x.name) for x in folder.glob("checkpoint-*")}
    whole = [
        (int(match[1]), place)
        for place, match in numbers.items()
        if match and (place / CONFIG).is_file() and any((place / x).is_file() for x in _FILES)
    ]
    return [place for _, place in sorted(whole)]


def _download(repo: str, *, subfolder: str | None = None, **options: Any) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repo, start + name, **options))

    start = f"{subfolder}/" if subfolder else ""
    try:
        try:
            fetch(WEIGHTS)
        except EntryNotFoundError:  # raised anew below, unless the weights are in several files
            for name in _names_in(fetch(INDEX)):
                fetch(name)
        return fetch(CONFIG).parent
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise FormatError(
            f"{repo}: the repository has no {start}{WEIGHTS} with {CONFIG}; expected a PEFT "
            f"adapter, {PIPELINE}, or one other {SUFFIX} file; of an adapter in a folder of it, "
            f"give {repo}/FOLDER"
        ) from error


def weights_files(folder: Path) -> list[Path]:
    """Returns the adapter's safetensors files: one, or those that an index names.

    Raises:
        FormatError: there are no weights, or the index is broken.
        UnsupportedError: there is only a pickle file.
    """
    if is_regular(folder / WEIGHTS):
        return [folder / WEIGHTS]
    if is_regular(folder / INDEX):
        return _indexed(folder / INDEX)
    if shards := _shards(folder):
        return shards
    pickles = [*folder.glob("adapter_model*.bin"), *folder.glob("adapter*.pt")]
    if pickles:
        raise UnsupportedError(f"{pickles[0]}: {describe(pickles[0])}")
    found = sorted(x.name for x in folder.iterdir() if x.suffix in _ENDINGS)
    told = f"; it has {', '.join(found[:3])}" if found else ""
    raise FormatError(f"{folder}: no {WEIGHTS}{told}")


def _shards(folder: Path) -> list[Path]:
    """Returns files ``adapter_model-I-of-N.safetensors`` in order.

    Raises:
        FormatError: one of them is missing.
    """
    found = [(_SHARD.fullmatch(file.name), file) for file in folder.glob("adapter_model-*")]
    files = {(int(match[1]), int(match[2])): file for match, file in found if match}
    last = max((total for _, total in files), default=0)
    for i in range(1, min(last, len(files) + 1) + 1):
        if (i, last) not in files:
            raise FormatError(
                f"{folder}: number {i} of the {last} files adapter_model-*-of-*.safetensors is "
                "missing; copy or download all of them"
            )
    return [files[key] for key in sorted(files)]


def _indexed(index: Path) -> list[Path]:
    """Returns the files that an index names, all of which are there."""
    for name in (names := _names_in(index)):
        if not is_regular(index.parent / name):
            raise FormatError(f"{index.parent / name}: missing, though {index.name} names it")
    return [index.parent / name for name in names]


def _names_in(index: Path) -> list[str]:
    """Returns the names of the files that an index names, in order."""
    named = untrusted.read_json(index, _ADAPTER).get("weight_map")
    if not isinstance(named, dict) or not named or {*map(type, named.values())} != {str}:
        raise FormatError(f"{index}: no weight_map; expected the file of each tensor")
    for name in set(named.values()):
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise FormatError(f"{index}: {name!r} is not the name of a file")
    return sorted(set(named.values()))


def find_beside(folder: Path) -> tuple[str, ...]:
    """Returns the names of files with other trained weights beside an adapter.

    Trainers write there what they train besides: a value head, a projector, a vision tower.
    """
    return tuple(
        file.name
        for file in sorted(folder.iterdir())
        if file.name.endswith(_ENDINGS) and not _HARMLESS.fullmatch(file.name) and file.is_file()
    )
