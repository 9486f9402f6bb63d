"""PEFT adapters as a format. JAX is imported in methods only, for the sake of help."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge_jax.errors import CoreMergeWarning
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.folders import is_hub_id
from coremerge_jax.io.outputs import ADAPTER, WRITER_OPTIONS
from coremerge_jax.io.peft.files import (
    WEIGHTS,
    find_checkpoints,
    is_adapter,
    locate,
    weights_files,
)
from coremerge_jax.io.single_file import hash_files

if TYPE_CHECKING:
    from coremerge_jax.io.adapter_writer import Written
    from coremerge_jax.io.peft.layout import PeftLayout
    from coremerge_jax.lora import Adapter, ModuleStream


_MIXED = (
    "llama.cpp and Ollama divide one alpha by the rank of each module, so they apply those of "
    "lower rank too strongly (vLLM, too, reads one alpha for all); --uniform-rank gives one rank"
)
_FILLED = (
    "zeros fill them up to one rank, as llama.cpp, Ollama and vLLM read one alpha for all modules; "
    "--mixed-ranks writes a smaller file, for peft"
)


class PeftFormat:
    """PEFT's adapters, in a folder or on the Hugging Face hub. See `formats.Format`."""

    name = ADAPTER
    description = f"a PEFT adapter folder ({CONFIG} and {WEIGHTS}) or its Hugging Face id"
    targets: Mapping[str, tuple[str, ...]] = {"peft": WRITER_OPTIONS}
    options = ()

    def recognises(self, source: str | Path) -> bool:
        """Returns True for a folder with peft's files or checkpoints, and for a Hugging Face id."""
        folder = Path(source)
        return is_adapter(folder) or bool(find_checkpoints(folder)) or is_hub_id(source)

    def open(self, source: str | Path, *, name: str | None = None, **options: Any) -> "Adapter":
        """Calls `open_peft`."""
        from coremerge_jax.io.peft.reader import open_peft

        return open_peft(source, name=name, **options)

    def save(
        self, adapter: "Adapter | ModuleStream", out: str | Path, *, to: str, **options: Any
    ) -> "Written":
        """Writes as `save_peft` does.

        Warns:
            CoreMergeWarning: ranks differ, which not all programs support, or would, and were
                filled up.
        """
        import jax

        from coremerge_jax.io.peft.writer import write_peft

        del to  # the only target
        written = write_peft(adapter, out, **options)
        least, largest = written.least_rank, max(written.ranks.values())
        if least < largest and jax.process_index() == 0:
            uniform = min(written.ranks.values()) == largest
            warnings.warn(
                f"the modules have ranks {least} to {largest}; {_FILLED if uniform else _MIXED}",
                CoreMergeWarning,
                stacklevel=2,
            )
        return written

    def layout(self, outline: "Adapter") -> "PeftLayout":
        """Returns the places of an adapter's modules in the files."""
        from coremerge_jax.io.peft.layout import PeftLayout

        return PeftLayout(outline)

    def hash(self, source: str | Path) -> dict[str, str]:
        """Returns the SHA-256 of the configuration and the weights, by file name."""
        folder = locate(source)
        return hash_files(folder / CONFIG, *weights_files(folder))
