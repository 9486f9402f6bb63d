"""llama.cpp's adapters as a format. JAX is imported in methods only, for the sake of help."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.io.outputs import GGUF, WRITER_OPTIONS
from coremerge_jax.io.single_file import hash_files

if TYPE_CHECKING:
    from coremerge_jax.io.adapter_writer import Written
    from coremerge_jax.io.gguf.gguf_writer import GgufLayout
    from coremerge_jax.lora import Adapter, ModuleStream

SUFFIX = ".gguf"


class GgufFormat:
    """GGUF adapters, which are only written. See `formats.Format`."""

    name = GGUF
    description = ""
    targets: Mapping[str, tuple[str, ...]] = {"gguf": (*WRITER_OPTIONS, "base_config")}
    options = ()

    def recognises(self, source: str | Path) -> bool:
        """Returns True for a GGUF file, and for a folder with one."""
        return _find_file(source) is not None

    def open(self, source: str | Path, *, name: str | None = None, **options: Any) -> "Adapter":
        """Refuses: names and rows are llama.cpp's, and the file does not say what was permuted.

        Raises:
            UnsupportedError: always.
        """
        del name, options
        raise UnsupportedError(
            f"{_find_file(source) or source}: is a GGUF file (llama.cpp, Ollama); GGUF adapters "
            "are written, but not read; use the adapter in its other format, or merge again "
            "without --to gguf"
        )

    def save(
        self,
        adapter: "Adapter | ModuleStream",
        out: str | Path,
        *,
        to: str,
        base_config: str | Path | None = None,
        **options: Any,
    ) -> "Written":
        """Calls `gguf.write_gguf`."""
        from coremerge_jax.io.gguf.gguf_writer import write_gguf

        del to  # the only target
        return write_gguf(adapter, out, base_config=base_config, **options)

    def layout(self, outline: "Adapter", *, base_config: str | Path | None = None) -> "GgufLayout":
        """Returns the places of an adapter's modules in the file."""
        from coremerge_jax.io.gguf.gguf_writer import layout_for

        return layout_for(outline, base_config)[0]

    def hash(self, source: str | Path) -> dict[str, str]:
        """Returns the SHA-256 of the file by its name."""
        return hash_files(*filter(None, [_find_file(source)]))


def _find_file(source: str | Path) -> Path | None:
    """Returns a GGUF file, or the first in a folder; None if there is none."""
    path = Path(source)
    try:
        if path.suffix.lower() == SUFFIX and path.is_file():
            return path
        files = (file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
        return min(files, default=None)
    except (OSError, ValueError):
        return None
