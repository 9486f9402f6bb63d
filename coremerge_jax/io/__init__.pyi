from .base_model.apply import apply_adapter
from .formats import Format, hash_source, open_adapter, register_format
from .merge_files import load_merge, save_merge
from .orbax.orbax_adapter import open_orbax, save_orbax
from .packs.pack_files import open_pack, save_pack
from .peft.dora import open_dora
from .peft.reader import load_peft, open_peft
from .peft.writer import save_peft
from .statistics_files import load_statistics, save_statistics

__all__ = [
    "Format",
    "apply_adapter",
    "hash_source",
    "load_merge",
    "load_peft",
    "load_statistics",
    "open_adapter",
    "open_dora",
    "open_orbax",
    "open_pack",
    "open_peft",
    "register_format",
    "save_merge",
    "save_orbax",
    "save_pack",
    "save_peft",
    "save_statistics",
]
