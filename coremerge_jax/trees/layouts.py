"""Layouts: how the LoRA factors of JAX training stacks sit in trees of parameters.

A layout is a few lines: how keys are named, and how updates are scaled. Adding one is adding it to
`LAYOUTS`.
"""

import dataclasses
import re
from collections.abc import Mapping

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.lora import LINEAR, Kind
from coremerge_jax.trees.axes import Shape


@dataclasses.dataclass(frozen=True)
class Factor:
    """Meaning of one key of a tree.

    Attributes:
        module: path of the module, parts joined by ``/``.
        param: name of the kernel that is adapted.
        factor: ``"a"`` or ``"b"``.
    """

    module: str
    param: str
    factor: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Convention of a library to store LoRA factors in a tree of parameters.

    The factor of the inputs is called a here, with the rank as its last axis, and that of the
    outputs b, with the rank as its first axis; a batch axis, if there is one, is axis 0 of both or
    axis 1 of both, and if there are two, these are both.

    Attributes:
        name: for messages and options.
        key: the key of a factor, with ``{module}``, ``{factor}`` and perhaps ``{param}``.
        patterns: regular expressions of keys, with groups of these names.
        param: the kernel's name where a key does not tell it.
        scaled: whether the library multiplies the update by alpha / rank; else it does not.
        kinds: what sort of module it is, by the kernel's name; linear by default.
    """

    name: str
    key: str
    patterns: tuple[str, ...]
    param: str = "kernel"
    scaled: bool = False
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    def match(self, key: str) -> Factor | None:
        """Returns the meaning of a key, parts joined by ``/``; None if it is not of this layout."""
        for pattern in self.patterns:
            found = re.fullmatch(pattern, key)
            if found:
                groups = found.groupdict()
                return Factor(groups["module"], groups.get("param") or self.param, groups["factor"])
        return None

    def kind(self, param: str) -> Kind:
        """Returns the kind of module that a kernel of this name makes."""
        return self.kinds.get(param, LINEAR)


GEMMA = Layout(
    name="gemma",
    key="{module}/lora/{factor}",
    patterns=(
        r"(?P<module>.+)/_LoRAEinsum_\d+/lora/(?P<factor>[ab])",
        r"(?P<module>.+)/_LoRAEinsum_(?P<param>[^/]+)/lora/(?P<factor>[ab])",
        r"(?P<module>.+)/lora/(?P<factor>[ab])",
    ),
)

KERAS = Layout(
    name="keras",
    key="{module}/lora_{param}_{factor}",
    patterns=(r"(?P<module>.+)/lora_(?P<param>kernel|embeddings)_(?P<factor>[ab])",),
    scaled=True,
    kinds={"embeddings": Kind("embedding", transposed=True)},
)

MAXTEXT_SERVING = Layout(
    name="maxtext-serving",
    key="{module}/lora_{factor}.kernel",
    patterns=(r"(?P<module>.+)/lora_(?P<factor>[ab])[./]kernel",),
    scaled=True,
)

NNX = Layout(
    name="nnx",
    key="{module}/lora_{factor}",
    patterns=(r"(?P<module>.+?)(/lora)?/lora_(?P<factor>[ab])",),
)

QWIX = Layout(
    name="qwix",
    key="{module}/{param}_lora_{factor}",
    patterns=(r"(?P<module>.+)/(?P<param>[^/]+)_lora_(?P<factor>[ab])",),
    scaled=True,
)

LAYOUTS = {layout.name: layout for layout in (NNX, QWIX, GEMMA, MAXTEXT_SERVING, KERAS)}

# openpi (openpi/models/lora.py) names einsums as gemma does, and factors as flax nnx does.
_OPENPI = re.compile(r".*(?:^|/)(?:q|kv|qkv|attn_vec)_einsum(?:_\d+)?/lora_[ab]")

_CAPITALS = re.compile(r".*/lora_[AB](?:/.*)?")


def refuse_foreign(shapes: Mapping[str, Shape | None]) -> None:
    """Refuses factors whose update is not that of any layout, or of one adapter.

    Args:
        shapes: by key; None where only the key is known.

    Raises:
        FormatError: they are of SkyRL-tx or levanter.
        UnsupportedError: they are of openpi.
    """
    for key, shape in shapes.items():
        if _OPENPI.fullmatch(key) and (shape is None or len(shape) > 2):
            raise UnsupportedError(
                f"{key!r} is a factor as openpi stores them: its einsums sum over attention heads "
                "between the two factors, or have factors for each head, and its feed-forwards "
                "leave out the scale, which no layout here does; fold the adapters into full "
                "weights with openpi, or retrain with another library"
            )
        if shape is None and _CAPITALS.fullmatch(key):
            raise FormatError(
                f"{key!r} is not of a layout that is read from trees: SkyRL-tx has factors of "
                "several adapters in one array (adapters, inputs, r), levanter has axes with "
                "names; export each adapter as a PEFT folder (SkyRL-tx: save_lora_checkpoint, "
                "levanter: save_peft_pretrained) and give these"
            )
