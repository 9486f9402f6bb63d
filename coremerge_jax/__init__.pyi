from . import checkpoint, demo, linalg, rules, spaces
from .checkpoint import apply_adapter, load_peft, open_peft, save_peft
from .errors import CoreMergeError, FormatError, MismatchError, RecipeError, UnsupportedError
from .lora import Adapter, Kind, LoRA, Metadata
from .merging import MergeStream, merge, merge_stream
from .rules import (
    cart,
    chain,
    dare,
    from_function,
    isotropize,
    mean,
    task_arithmetic,
    ties,
    tsv,
)
from .spaces import core, full, knots
from .truncation import truncate

__version__: str

__all__ = [
    "Adapter",
    "CoreMergeError",
    "FormatError",
    "Kind",
    "LoRA",
    "MergeStream",
    "Metadata",
    "MismatchError",
    "RecipeError",
    "UnsupportedError",
    "apply_adapter",
    "cart",
    "chain",
    "checkpoint",
    "core",
    "dare",
    "demo",
    "from_function",
    "full",
    "isotropize",
    "knots",
    "linalg",
    "load_peft",
    "mean",
    "merge",
    "merge_stream",
    "open_peft",
    "rules",
    "save_peft",
    "spaces",
    "task_arithmetic",
    "ties",
    "truncate",
    "tsv",
]
