"""Layouts: the keys and the scaling of LoRA factors in the trees of JAX training stacks.

A layout is a row of `LAYOUTS`: adding one is adding a row.
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

    Here a is the factor of the inputs, with the rank as its last axis, and b that of the outputs,
    with the rank as its first axis. One batch axis is axis 0 of both or axis 1 of both; two are
    axes 0 and 1 of both.

    Attributes:
        name: for messages and options.
        key: the key of a factor, with ``{module}``, ``{factor}`` and perhaps ``{param}``.
        patterns: regular expressions of keys, with groups of these names.
        param: the kernel's name if keys do not have it.
        scaled: True if the library multiplies the update by alpha / rank.
        kinds: the kind of module, by the kernel's name; linear by default.
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


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="nnx",
            key="{module}/lora_{factor}",
            patterns=(r"(?P<module>.+?)(/lora)?/lora_(?P<factor>[ab])",),
        ),
        Layout(
            name="qwix",
            key="{module}/{param}_lora_{factor}",
            patterns=(r"(?P<module>.+)/(?P<param>[^/]+)_lora_(?P<factor>[ab])",),
            scaled=True,
        ),
        Layout(
            name="gemma",
            key="{module}/lora/{factor}",
            patterns=(
                r"(?P<module>.+)/_LoRAEinsum_\d+/lora/(?P<factor>[ab])",
                r"(?P<module>.+)/_LoRAEinsum_(?P<param>[^/]+)/lora/(?P<factor>[ab])",
                r"(?P<module>.+)/lora/(?P<factor>[ab])",
            ),
        ),
        Layout(
            name="maxtext-serving",
            key="{module}/lora_{factor}.kernel",
            patterns=(r"(?P<module>.+)/lora_(?P<factor>[ab])[./]kernel",),
            scaled=True,
        ),
        Layout(
            name="keras",
            key="{module}/lora_{param}_{factor}",
            patterns=(r"(?P<module>.+)/lora_(?P<param>kernel|embeddings)_(?P<factor>[ab])",),
            scaled=True,
            kinds={"embeddings": Kind("embedding", transposed=True)},
        ),
    )
}

# openpi (openpi/models/lora.py) names einsums as gemma does, and factors as flax nnx does.
_OPENPI = re.compile(r".*(?:^|/)(?:q|kv|qkv|attn_vec)_einsum(?:_\d+)?/lora_[ab]")

_CAPITALS = re.compile(r".*/lora_[AB](?:/.*)?")


def refuse_foreign(shapes: Mapping[str, Shape | None]) -> None:
    """Refuses factors of libraries that compute another update, or store several adapters in one.

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
                f"{key!r} is not of a layout of one adapter: SkyRL-tx has factors of several in "
                "one array (adapters, inputs, r), which from_stacks reads, levanter has axes with "
                "names; or export each adapter as a PEFT folder (SkyRL-tx: save_lora_checkpoint, "
                "levanter: save_peft_pretrained) and give these"
            )
