"""MLX adapters as a format. JAX is imported in methods only, for the sake of help."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from coremerge_jax.errors import FormatError
from coremerge_jax.io.adapter_config import CONFIG
from coremerge_jax.io.outputs import WRITER_OPTIONS
from coremerge_jax.io.single_file import (
    ADAPTERS,
    WEIGHTS,
    SingleFile,
    hash_files,
    look,
)

if TYPE_CHECKING:
    from typing import Any

    from coremerge_jax.io.adapter_writer import Written
    from coremerge_jax.io.mlx.mlx_layers import MlxLayout
    from coremerge_jax.lora import Adapter, ModuleStream


class MlxFormat(SingleFile):
    """A folder of mlx-lm, ``adapters.safetensors`` and ``adapter_config.json``."""

    name = "MLX adapter"
    description = f"an MLX folder ({ADAPTERS} and {CONFIG})"
    shown = "mlx"
    targets: Mapping[str, tuple[str, ...]] = {"mlx": WRITER_OPTIONS}

    def recognises(self, source: str | Path) -> bool:
        """Returns True for mlx-lm's keys, and for a folder with its file and no other's."""
        found = look(source)
        if found is not None:
            return found.format == self.shown
        names = (CONFIG, ADAPTERS)
        try:
            there = all(os.path.lexists(Path(source, name)) for name in names)
            return there and not os.path.lexists(Path(source, WEIGHTS))
        except ValueError:
            return False

    def locate(self, source: str | Path) -> Path:
        """Returns the file with the factors, which has its configuration beside it.

        Raises:
            FormatError: it has not.
        """
        found = look(source)
        file = Path(source, ADAPTERS) if found is None else found.file
        if not os.path.lexists(file.parent / CONFIG):
            raise FormatError(
                f"{file}: no {CONFIG} beside it, which has the scaling of an MLX adapter; copy it "
                "there"
            )
        return file

    def read(self, file: Path, name: str) -> "Adapter":
        """Calls `mlx_layers.open_mlx`."""
        from coremerge_jax.io.mlx.mlx_layers import open_mlx

        return open_mlx(file, file.parent / CONFIG, name)

    def save(
        self, adapter: "Adapter | ModuleStream", out: str | Path, *, to: str, **options: "Any"
    ) -> "Written":
        """Writes the adapter with a scaling of 1, and with one rank: its configuration has one."""
        return super().save(adapter, out, to=to, **{**options, "uniform_rank": True})

    def layout(self, outline: "Adapter") -> "MlxLayout":
        """Returns the places of an adapter's modules in the files."""
        from coremerge_jax.io.mlx.mlx_layers import MlxLayout

        return MlxLayout(outline, self.name)

    def hash(self, source: str | Path) -> dict[str, str]:
        """Returns the SHA-256 of both files by name."""
        file = self.locate(source)
        return hash_files(file.parent / CONFIG, file)
