"""Adapters on the Hugging Face hub that are one file: of diffusers, MLX, sd-scripts and others."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.folders import hub_answers, is_hub_id, split_id
from coremerge_jax.io.single_file import ADAPTERS, PIPELINE, SUFFIX, WEIGHTS

# Files that a trainer's repository has beside the adapter, and that are none.
_OTHERS = re.compile(r"(optimizer|training_args|scheduler|random_states).*|model(-\d.*)?\.\w+")


def find_hub_file(source: str | Path) -> Path | None:
    """Returns the file of an adapter on the hub that is no PEFT folder, from the cache or the hub.

    That is the file that an id ends with, else the one that diffusers or mlx-lm writes, else the
    only safetensors file of the folder. Its configuration is fetched, too.

    Args:
        source: ``owner/name``, ``owner/name/folder`` or ``owner/name/file.safetensors``, and any of
            these with ``@revision``.

    Returns:
        None for a source that is no id, a PEFT adapter, or a repository that has none of these
        files or cannot be reached: `find_folder` says what is missing.

    Raises:
        FormatError: there are several such files.
    """
    if not is_hub_id(source):
        return None
    repo, options = split_id(str(source))
    folder = options.get("subfolder") or ""
    is_file = folder.endswith(SUFFIX)
    for local in (True, False):
        if not local and not hub_answers():
            return None
        for names in [(folder,)] if is_file else _candidates(folder):
            if files := _fetch(repo, names, options["revision"], local):
                is_peft = files[0].name.startswith(WEIGHTS) and not is_file
                return None if is_peft else files[0]
    return None if is_file else _only_file(source, repo, options)


def _candidates(folder: str) -> Iterator[tuple[str, ...]]:
    """Yields sets of files, of which the first has the factors."""
    start = f"{folder}/" if folder else ""
    yield (start + WEIGHTS,)
    yield (start + f"{WEIGHTS}.index.json",)
    yield (start + PIPELINE,)
    yield start + ADAPTERS, start + CONFIG


def _fetch(repo: str, names: tuple[str, ...], revision: str | None, local: bool) -> list[Path]:
    """Returns the files in the cache; none if one is missing, or the repository is."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return [
            Path(
                huggingface_hub.hf_hub_download(
                    repo, name, revision=revision, local_files_only=local
                )
            )
            for name in names
        ]
    except (EntryNotFoundError, OSError, ValueError):
        return []


def _only_file(source: str | Path, repo: str, options: dict[str, Any]) -> Path | None:
    """Returns the only file of a folder that may be an adapter; None if there is none."""
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(repo, revision=options["revision"])
    except (OSError, ValueError):
        return None
    folder = options.get("subfolder") or "."
    found = sorted(
        name
        for name in names
        if name.endswith(SUFFIX)
        and str(Path(name).parent) == folder
        and not _OTHERS.match(Path(name).name)
    )
    if len(found) > 1:
        raise FormatError(
            f"{source}: the repository has {len(found)} {SUFFIX} files that may be adapters, "
            f"{found[0]!r} to {found[-1]!r}; give one: {repo}/{found[0]}"
        )
    files = _fetch(repo, tuple(found), options["revision"], local=False)
    return files[0] if files else None
