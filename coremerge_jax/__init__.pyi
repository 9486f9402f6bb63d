from . import (
    checkpoint,
    demo,
    diagnosis,
    layouts,
    linalg,
    rules,
    search,
    spaces,
    verification,
)
from .checkpoint import (
    apply_adapter,
    load_peft,
    open_adapter,
    open_orbax,
    open_peft,
    save_orbax,
    save_peft,
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
from .folding import fold_tree
from .layouts import Axes, Layout
from .lora import Adapter, Kind, LoRA, Metadata
from .merging import merge, merge_stream
from .models import from_nnx, update_nnx
from .projected import Projected, project
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
from .streaming import MergeStream
from .trees import TreeFormat, from_tree, to_tree
from .truncation import truncate
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
    "checkpoint",
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
    "iso_cts",
    "isotropize",
    "knots",
    "layouts",
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
