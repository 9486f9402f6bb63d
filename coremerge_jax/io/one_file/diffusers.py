"""Diffusers' files as a format. JAX is imported in methods only, for the sake of help."""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coremerge_jax.errors import CoreMergeWarning, FormatError, UnsupportedError
from coremerge_jax.io import untrusted
from coremerge_jax.io.adapter_config import RANK
from coremerge_jax.io.module_paths import PREFIX
from coremerge_jax.io.outputs import WRITER_OPTIONS
from coremerge_jax.io.single_file import COMPONENTS, PIPELINE, SingleFile, read_notes

if TYPE_CHECKING:
    from coremerge_jax.io.one_file.keyed_layout import KeyedLayout
    from coremerge_jax.lora import Adapter

# The entry of the header with PEFT's configurations of all components (diffusers, lora_base.py).
NOTE = "lora_adapter_metadata"

_FIELDS = {
    "peft_type": untrusted.TEXT,
    "r": RANK,
    "lora_alpha": untrusted.NUMBER,
    "rank_pattern": untrusted.OBJECT,
    "alpha_pattern": untrusted.OBJECT,
    "use_rslora": untrusted.SWITCH,
    "use_dora": untrusted.SWITCH,
    "lora_bias": untrusted.SWITCH,
}


class DiffusersFormat(SingleFile):
    """A file with keys such as ``unet.mid_block.attentions.0.proj_in.lora_A.weight``.

    The scaling is that of an alpha in the file, else of the configuration in its header, else 1.
    """

    name = "diffusers adapter"
    description = f"a diffusers folder or file ({PIPELINE})"
    shown = "diffusers"
    targets: Mapping[str, tuple[str, ...]] = {"diffusers": WRITER_OPTIONS}

    def read(self, file: Path, name: str) -> "Adapter":
        """Opens a file; see `keyed.open_keyed`. Paths begin with the component, as ``unet.``.

        Warns if modules have several ranks and neither alphas nor a configuration: diffusers then
        scales by the rank of the first.
        """
        from coremerge_jax.io.one_file.keyed import open_keyed

        scales = _Scales(file)
        adapter = open_keyed(file, name=name, rename=_rename, scale=scales, format="diffusers")
        scales.warn()
        return adapter

    def layout(self, outline: "Adapter") -> "KeyedLayout":
        """Returns the places of an adapter's modules in the file, by their paths."""
        from coremerge_jax.io.one_file.keyed_layout import KeyedLayout

        for path in outline:
            _check(path)
        return KeyedLayout(
            outline,
            name=self.name,
            weights=PIPELINE,
            stems={path: path for path in outline},
            notes=lambda ranks: {NOTE: json.dumps(configuration(ranks), sort_keys=True)},
        )


# --- Names ----------------------------------------------------------------------------------
_WRAPPED = re.compile(rf"^(({'|'.join(COMPONENTS)})\.)?{re.escape(PREFIX)}")
_UNET = re.compile(r"^(?=(down_blocks|up_blocks|mid_block)\.)")
_ENCODER = re.compile(r"(?<=\.self_attn)\.to_(q|k|v|out)$")


def _rename(path: str) -> str:
    """Returns a module's path in its component, by the one in a file of any release."""
    path = _WRAPPED.sub(r"\1", path)
    before, processor, name = path.rpartition(".processor.")
    if processor:
        path = f"{before}.{name}" + (".0" if name == "to_out" else "")
    return _UNET.sub("unet.", _ENCODER.sub(r".\1_proj", path), count=1)


def _check(path: str) -> None:
    component, _, rest = path.partition(".")
    if component in COMPONENTS and rest:
        return
    if component == "diffusion_model":
        reason = (
            "has the name of the model's authors, whose layers diffusers splits or calls "
            "otherwise; write it with --to original or kohya, which diffusers converts when it "
            "loads them"
        )
    elif path.startswith(("lora_", "lycoris_")):
        reason = "has a kohya name, whose words are not known; write it with --to kohya"
    else:
        reason = (
            f"is of none of diffusers' components ({', '.join(COMPONENTS)}); write it with --to "
            "peft"
        )
    raise UnsupportedError(f"module {path!r} {reason}")


def _split(path: str) -> tuple[str, str]:
    """Splits a path into the component and the module in it.

    The models of text encoders have lost the part ``text_model`` in newer releases of transformers.
    """
    component, _, rest = path.partition(".")
    if component not in COMPONENTS:
        return "", path
    is_text = component.startswith("text_encoder")
    return component, rest.removeprefix("text_model.") if is_text else rest


# --- Scales ---------------------------------------------------------------------------------
def configuration(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Returns PEFT's configurations of all components, by which diffusers takes a scaling of 1.

    Args:
        ranks: rank of each module, by its path.
    """
    components: dict[str, dict[str, int]] = {}
    for path, rank in ranks.items():
        component, module = _split(path)
        components.setdefault(component, {})[module] = rank
    return {
        f"{component}.{field}": value
        for component, modules in components.items()
        for field, value in _configuration(modules, component.startswith("text")).items()
    }


def _configuration(ranks: Mapping[str, int], is_text: bool) -> dict[str, Any]:
    top = max(ranks.values())
    start = "" if is_text else "^"  # a text encoder's modules may begin with text_model.
    patterns = {start + re.escape(path): rank for path, rank in ranks.items() if rank != top}
    return {
        "r": top,
        "lora_alpha": top,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "use_rslora": False,
        "lora_bias": False,
    }


def read_scales(file: Path) -> Callable[[str, int], float | None] | None:
    """Returns scales by path and rank, from the configurations in a file's header; None without.

    Of a module in a component without a configuration, the scale is None.

    Raises:
        FormatError: the configurations are broken.
        UnsupportedError: they describe more than low-rank updates.
    """
    text = read_notes(file).get(NOTE)
    if not text:
        return None
    where = f"{file}: {NOTE} in the header"
    content = untrusted.parse_json(text, where)
    if not isinstance(content, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(content).__name__}")
    configs = {component: _Config(where, component, content) for component in ("", *COMPONENTS)}

    def scale(path: str, rank: int) -> float | None:
        component, module = _split(path)
        return configs[component].scale(module, rank)

    return scale


class _Config:
    """PEFT's configuration of one component, of a larger object with all of them."""

    def __init__(self, where: str, component: str, content: Mapping[str, Any]) -> None:
        from coremerge_jax.io.patterns import Patterns

        start = f"{component}." if component else ""
        self._where = where
        fields = {name: content.get(start + name) for name in _FIELDS}
        untrusted.check_kinds(f"{where}: {component}", fields, _FIELDS)
        if (kind := fields["peft_type"] or "LORA") != "LORA":
            raise UnsupportedError(
                f"{where}: {start}peft_type is {kind!r}, and only of 'LORA' the scaling is known; "
                "save it in a PEFT folder, with its adapter_config.json"
            )
        for name in ("use_dora", "lora_bias"):
            if fields[name]:
                raise UnsupportedError(
                    f"{where}: {start}{name} is true: more than a plain low-rank update, which "
                    "cannot be merged as LoRA; train the task again with plain LoRA"
                )
        self._fields: dict[str, Any] = fields
        self._patterns = {}
        for name, kind in (("rank_pattern", RANK), ("alpha_pattern", untrusted.NUMBER)):
            values = fields[name] or {}
            untrusted.check_kinds(f"{where}: {start}{name}", values, dict.fromkeys(values, kind))
            try:
                self._patterns[name] = Patterns({k: v for k, v in values.items() if v is not None})
            except ValueError as error:
                raise FormatError(f"{where}: {start}{name} has a {error}") from error

    def scale(self, module: str, rank: int) -> float | None:
        """Returns alpha / rank of a module, or alpha / sqrt(rank) if it is rank-stabilized.

        None if there is no configuration.

        Raises:
            FormatError: the configuration is of another rank.
        """
        if self._fields["r"] is None:
            return None
        expected = self._value("rank_pattern", module, self._fields["r"])
        if int(expected) != rank:
            raise FormatError(
                f"{self._where}: module {module!r} has rank {rank} in the file, but the "
                f"configuration says {int(expected)}"
            )
        default = rank if self._fields["lora_alpha"] is None else self._fields["lora_alpha"]
        alpha = self._value("alpha_pattern", module, default)
        return alpha / (rank**0.5 if self._fields["use_rslora"] else rank)

    def _value(self, field: str, module: str, default: float) -> float:
        try:
            first = self._patterns[field].first(module)
        except ValueError as error:
            raise FormatError(f"{self._where}: {field}, module {module!r}: {error}") from error
        return default if first is None else float(self._fields[field][first])


class _Scales:
    """Scales of modules that have no alpha in a file's tensors: 1 if its header has none either."""

    def __init__(self, file: Path) -> None:
        self._file, self._told = file, read_scales(file)
        self._ranks: dict[str, set[int]] = {}

    def __call__(self, path: str, rank: int) -> float:
        path = _rename(path)
        told = None if self._told is None else self._told(path, rank)
        if told is None:
            self._ranks.setdefault(_split(path)[0], set()).add(rank)
            return 1.0
        return told

    def warn(self) -> None:
        """Warns if such modules have several ranks: diffusers then scales by the first's."""
        for component, ranks in self._ranks.items():
            if len(ranks) > 1:
                warnings.warn(
                    f"{self._file}: modules of {component or 'the model'} have ranks {min(ranks)} "
                    f"to {max(ranks)}, and no alpha: each is read with a scaling of 1, as ComfyUI "
                    "does; diffusers scales by the rank of the first",
                    CoreMergeWarning,
                    stacklevel=5,
                )
