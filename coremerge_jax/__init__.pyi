from . import (
    demo,
    diagnosis,
    io,
    linalg,
    rules,
    search,
    spaces,
    verification,
)
from .diagnosis import Diagnosis, diagnose
from .errors import (
    CoreMergeError,
    FormatError,
    MismatchError,
    ProcessError,
    RecipeError,
    UnsupportedError,
)
from .io import (
    apply_adapter,
    load_peft,
    open_adapter,
    open_orbax,
    open_peft,
    save_orbax,
    save_peft,
)
from .lora import Adapter, Kind, LoRA, Metadata
from .merging.merge import merge, merge_stream
from .merging.projected import Projected, project
from .merging.stream import MergeStream
from .merging.truncation import truncate
from .rules import (
    cart,
    chain,
    dare,
    dc_merge,
    flatten,
    from_function,
    iso_cts,
    isotropize,
    mean,
    pico,
    prune,
    sce,
    svc,
    task_arithmetic,
    ties,
    tsv,
)
from .spaces import core, full, knots, tucker
from .trees.adapters import TreeFormat, from_tree, to_tree
from .trees.axes import Axes
from .trees.fold import fold_tree
from .trees.layouts import Layout
from .trees.nnx import from_nnx, update_nnx
from .verification import Verification, verify

__version__: str

__all__ = [
    "Adapter",
    "Axes",
    "CoreMergeError",
    "Diagnosis",
    "FormatError",
    "Kind",
    "Layout",
    "LoRA",
    "MergeStream",
    "Metadata",
    "MismatchError",
    "ProcessError",
    "Projected",
    "RecipeError",
    "TreeFormat",
    "UnsupportedError",
    "Verification",
    "apply_adapter",
    "cart",
    "chain",
    "core",
    "dare",
    "dc_merge",
    "demo",
    "diagnose",
    "diagnosis",
    "flatten",
    "fold_tree",
    "from_function",
    "from_nnx",
    "from_tree",
    "full",
    "io",
    "iso_cts",
    "isotropize",
    "knots",
    "linalg",
    "load_peft",
    "mean",
    "merge",
    "merge_stream",
    "open_adapter",
    "open_orbax",
    "open_peft",
    "pico",
    "project",
    "prune",
    "rules",
    "save_orbax",
    "save_peft",
    "sce",
    "search",
    "spaces",
    "svc",
    "task_arithmetic",
    "ties",
    "to_tree",
    "truncate",
    "tsv",
    "tucker",
    "update_nnx",
    "verification",
    "verify",
]
