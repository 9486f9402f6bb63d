# `__all__` is what users write. What is imported with `as` is public too, but a namespace, the type
# of a result, or an error that `CoreMergeError` covers.
from . import collecting as collecting
from . import demo as demo
from . import diagnosis as diagnosis
from . import errors as errors
from . import io as io
from . import linalg as linalg
from . import recipe as recipe
from . import rules as rules
from . import search as search
from . import serve as serve
from . import spaces as spaces
from . import trees as trees
from . import verification as verification
from .collecting import collect
from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import diagnose
from .errors import CoreMergeError
from .errors import FormatError as FormatError
from .errors import MismatchError as MismatchError
from .errors import ProcessError as ProcessError
from .errors import RecipeError as RecipeError
from .errors import UnsupportedError as UnsupportedError
from .io import (
    apply_adapter,
    load_merge,
    load_peft,
    load_statistics,
    open_adapter,
    open_orbax,
    open_pack,
    open_peft,
    save_merge,
    save_orbax,
    save_pack,
    save_peft,
    save_statistics,
)
from .lora import Adapter, Kind, LoRA, Metadata
from .merging.compiled import Merge as Merge
from .merging.compiled import compile_merge
from .merging.merge import merge, merge_stream
from .merging.packing import Pack as Pack
from .merging.packing import pack
from .merging.projected import Projected as Projected
from .merging.projected import project
from .merging.statistics import Gram as Gram
from .merging.statistics import Statistics
from .merging.stream import MergeStream as MergeStream
from .merging.truncation import truncate
from .rules import (
    cart,
    dare,
    dc_merge,
    flatten,
    from_function,
    iso_cts,
    isotropize,
    mean,
    pico,
    prune,
    regmean,
    sce,
    svc,
    task_arithmetic,
    ties,
    tsv,
)
from .rules.chain import chain
from .spaces.core import core
from .spaces.full import full
from .spaces.knots import knots
from .spaces.tucker import tucker
from .trees.adapters import TreeFormat as TreeFormat
from .trees.adapters import from_tree, to_tree
from .trees.axes import Axes
from .trees.fold import fold_tree
from .trees.layouts import Layout
from .trees.nnx import from_nnx, update_nnx
from .trees.stacks import from_stacks
from .verification import Verification as Verification
from .verification import verify

__version__: str

__all__ = [
    "Adapter",
    "Axes",
    "CoreMergeError",
    "Kind",
    "Layout",
    "LoRA",
    "Metadata",
    "Statistics",
    "apply_adapter",
    "cart",
    "chain",
    "collect",
    "compile_merge",
    "core",
    "dare",
    "dc_merge",
    "diagnose",
    "flatten",
    "fold_tree",
    "from_function",
    "from_nnx",
    "from_stacks",
    "from_tree",
    "full",
    "iso_cts",
    "isotropize",
    "knots",
    "load_merge",
    "load_peft",
    "load_statistics",
    "mean",
    "merge",
    "merge_stream",
    "open_adapter",
    "open_orbax",
    "open_pack",
    "open_peft",
    "pack",
    "pico",
    "project",
    "prune",
    "regmean",
    "save_merge",
    "save_orbax",
    "save_pack",
    "save_peft",
    "save_statistics",
    "sce",
    "svc",
    "task_arithmetic",
    "ties",
    "to_tree",
    "truncate",
    "tsv",
    "tucker",
    "update_nnx",
    "verify",
]
