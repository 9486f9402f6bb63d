"""What JAX implementations of model families call their modules, against Hugging Face's names."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError
from coremerge_jax.lora import Adapter, Array, LoRA

# From the outputs of Hugging Face's kernel to those of the other, or back.
Change = Callable[[Array, int, bool], Array]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The names of one kernel.

    Attributes:
        ours: in the JAX implementation, with ``{i}`` for the layer.
        theirs: Hugging Face's; several where one kernel here has their outputs behind each other.
        change: what happens to b, if the implementation computes with other outputs.
    """

    ours: str
    theirs: tuple[str, ...]
    change: Change | None = None


@dataclasses.dataclass(frozen=True)
class NameMap:
    """The names of one implementation of a model family.

    Attributes:
        name: for options.
        rules: one for each kernel of a layer, or of the model.
    """

    name: str
    rules: tuple[Rule, ...]

    def to_hugging_face(self, adapter: Adapter, *, head_dim: int | None = None) -> Adapter:
        """The adapter with Hugging Face's names, its fused kernels split.

        Args:
            adapter: with this implementation's names.
            head_dim: the size of an attention head, where outputs have to be reordered.

        Raises:
            MismatchError: a module has no name there.
            UnsupportedError: ``head_dim`` is needed, or does not fit.
        """
        modules: dict[str, LoRA] = {}
        for path, lora in adapter.read(adapter).items():
            rule, layer = self._rule(path, adapter)
            changed = _changed(path, lora, rule, head_dim, back=True)
            names = [name.format(i=layer) for name in rule.theirs]
            for name, b in zip(names, _split(path, changed.b, len(names)), strict=True):
                modules[name] = dataclasses.replace(changed, b=b)
        return adapter.replace(modules=modules)

    def from_hugging_face(self, adapter: Adapter, *, head_dim: int | None = None) -> Adapter:
        """The inverse of `to_hugging_face`.

        Kernels that are one here get an A with the rows of all of them.

        Args:
            adapter: with Hugging Face's names.
            head_dim: see there.

        Raises:
            MismatchError: a module has no name here, or not all parts of a fused kernel are there.
            UnsupportedError: ``head_dim`` is needed, or does not fit.
        """
        waiting = dict(adapter.read(adapter))
        modules: dict[str, LoRA] = {}
        for path in adapter:
            if path not in waiting:
                continue
            rule, layer = self._rule(path, adapter, theirs=True)
            names = [name.format(i=layer) for name in rule.theirs]
            missing = [name for name in names if name not in waiting]
            if missing:
                raise MismatchError(
                    f"{path!r} is fused with {missing[0]!r} in {self.name}, which the adapter does "
                    "not have; merge it with an adapter that has both"
                )
            lora = _fuse([waiting.pop(name) for name in names])
            modules[rule.ours.format(i=layer)] = _changed(path, lora, rule, head_dim, back=False)
        return adapter.replace(modules=modules)

    def fits(self, paths: Iterable[str]) -> bool:
        """Whether all of these are names of this implementation."""
        return all(any(_match(rule.ours, path) for rule in self.rules) for path in paths)

    def _rule(self, path: str, adapter: Adapter, *, theirs: bool = False) -> tuple[Rule, str]:
        """The rule for a module, and its layer; one whose parts are all there, if there is one."""
        found = []
        for rule in self.rules:
            names = rule.theirs if theirs else (rule.ours,)
            layer = next((x for x in (_match(name, path) for name in names) if x is not None), None)
            if layer is not None:
                found.append((all(name.format(i=layer) in adapter for name in names), rule, layer))
        if found:
            _, rule, layer = max(found, key=lambda entry: entry[0])
            return rule, layer
        known = [name for rule in self.rules for name in (rule.theirs if theirs else (rule.ours,))]
        near = difflib.get_close_matches(path, known, n=1, cutoff=0)
        raise MismatchError(
            f"module {path!r} has no name in {self.name}; nearest is {near[0]!r}, with a number "
            "for {i}"
        )


def _match(template: str, path: str) -> str | None:
    """The layer that a template names, "" for none; None where it does not fit."""
    if "{i}" not in template:
        return "" if path == template else None
    before, after = map(re.escape, template.split("{i}"))
    found = re.fullmatch(rf"{before}(\d+){after}", path)
    return found[1] if found else None


def _changed(path: str, lora: LoRA, rule: Rule, head_dim: int | None, *, back: bool) -> LoRA:
    if rule.change is None:
        return lora
    if head_dim is None:
        raise UnsupportedError(
            f"module {path!r}: the outputs of each attention head are stored in another order; "
            "give head_dim (--head-dim)"
        )
    if lora.shape[0] % head_dim or head_dim % 2:
        raise UnsupportedError(
            f"module {path!r} has {lora.shape[0]} outputs; head_dim={head_dim} does not fit"
        )
    return dataclasses.replace(lora, b=rule.change(lora.b, head_dim, back))


def _split(path: str, b: Array, parts: int) -> list[Array]:
    if len(b) % parts:
        raise UnsupportedError(f"module {path!r} has {len(b)} outputs, not {parts} equal parts")
    size = len(b) // parts
    return [b[i * size : (i + 1) * size] for i in range(parts)]


def _fuse(loras: Sequence[LoRA]) -> LoRA:
    """One update with the outputs of all: A below each other, B in blocks."""
    if len(loras) == 1:
        return loras[0]
    on_host = all(isinstance(x, np.ndarray) for lora in loras for x in (lora.a, lora.b))
    xp = np if on_host else jnp
    starts = np.cumsum([0, *(lora.rank for lora in loras)])
    rows = [
        xp.pad(lora.b, ((0, 0), (int(start), int(starts[-1] - start - lora.rank))))
        for lora, start in zip(loras, starts[:-1], strict=True)
    ]
    return dataclasses.replace(
        loras[0], a=xp.concatenate([lora.a for lora in loras]), b=xp.concatenate(rows)
    )


def interleaved(b: Array, head_dim: int, back: bool) -> Array:
    """Rotary pairs (j, j + half) of each head beside each other, as MaxText's Llama has them."""
    inner = (head_dim // 2, 2) if back else (2, head_dim // 2)
    heads = b.reshape(-1, *inner, b.shape[1])
    return heads.swapaxes(1, 2).reshape(b.shape)


def interleaved_query(b: Array, head_dim: int, back: bool) -> Array:
    """The same, and 1/√head_dim, by which attention does not divide there."""
    factor = np.asarray(head_dim**0.5 if back else head_dim**-0.5, b.dtype)
    return interleaved(b, head_dim, back) * factor


def _in_layers(
    ours: str,
    theirs: str,
    pairs: Mapping[str, str | tuple],
    change: Mapping[str, Change] | None = None,
) -> tuple[Rule, ...]:
    """Rules for kernels of each layer, from the ends of their names."""
    return tuple(
        Rule(
            ours + x,
            tuple(theirs + name for name in ((y,) if isinstance(y, str) else y)),
            (change or {}).get(x),
        )
        for x, y in pairs.items()
    )


_HF = "model.layers.{i}."
_MLP: dict[str, str | tuple] = {
    f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_EINSUMS: dict[str, str | tuple] = {
    "attn.q_einsum": "self_attn.q_proj",
    "attn.kv_einsum": _QKV[1:],
    "attn.qkv_einsum": _QKV,
    "attn.attn_vec_einsum": "self_attn.o_proj",
}
_MAXTEXT: dict[str, str | tuple] = {
    "self_attention.query": "self_attn.q_proj",
    "self_attention.key": "self_attn.k_proj",
    "self_attention.value": "self_attn.v_proj",
    "self_attention.out": "self_attn.o_proj",
    "mlp.wi_0": "mlp.gate_proj",
    "mlp.wi_1": "mlp.up_proj",
    "mlp.wo": "mlp.down_proj",
}

# Tunix's Llama and Qwen rotate as Hugging Face's do (tunix/models/*/params.py); so do its Gemma
# and google-deepmind's. MaxText's Llama does not (maxtext/checkpoint_conversion/utils/
# param_mapping.py), its Qwen does.
NAME_MAPS = {
    found.name: found
    for found in (
        NameMap(
            "tunix",
            (
                *_in_layers(
                    "layers.{i}.",
                    _HF,
                    {f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"} | _MLP,
                ),
                Rule("lm_head", ("lm_head",)),
            ),
        ),
        NameMap("tunix-gemma", _in_layers("layers.{i}.", _HF, _EINSUMS | _MLP)),
        NameMap(
            "gemma",
            _in_layers(
                "layer.{i}.",
                _HF,
                _EINSUMS
                | {
                    "mlp.gating_einsum": ("mlp.gate_proj", "mlp.up_proj"),
                    "mlp.linear": "mlp.down_proj",
                },
            ),
        ),
        NameMap(
            "maxtext-llama",
            _in_layers(
                "decoder.layers.{i}.",
                _HF,
                _MAXTEXT,
                {
                    "self_attention.query": interleaved_query,
                    "self_attention.key": interleaved,
                },
            ),
        ),
        NameMap("maxtext-qwen", _in_layers("decoder.layers.{i}.", _HF, _MAXTEXT)),
    )
}


def translate(adapter: Adapter, names: str, *, head_dim: int | None = None) -> Adapter:
    """An adapter with the other names: Hugging Face's if it has those of ``names``, else these.

    Args:
        adapter: with names of either.
        names: one of `NAME_MAPS`.
        head_dim: the size of an attention head, where outputs have to be reordered.

    Raises:
        RecipeError: there are no such names.
        MismatchError: a module has no name there, or not all parts of a fused kernel are there.
        UnsupportedError: ``head_dim`` is needed, or does not fit.
    """
    if names not in NAME_MAPS:
        raise RecipeError(f"names {names!r}: expected one of {', '.join(NAME_MAPS)}")
    found = NAME_MAPS[names]
    if found.fits(adapter.outline):
        return found.to_hugging_face(adapter, head_dim=head_dim)
    return found.from_hugging_face(adapter, head_dim=head_dim)
