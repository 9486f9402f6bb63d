"""all-MiniLM-L6-v2, a small BERT that embeds sentences, as a Flax NNX module.

Attributes have the names that its weights have in the Hugging Face file, so that loading is a
walk through these names, and adapters have the names that PEFT gives them.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

NAME = "sentence-transformers/all-MiniLM-L6-v2"
LENGTH = 64
"""Texts are cut to so many tokens."""
STEP = 8
"""Lengths are multiples of this, for few compiled programs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of the model's ``config.json`` that matter.

    Attributes:
        rank: of LoRA factors on query, key, value and attention output; 0 for none.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    rank: int = 0

    @classmethod
    def load(cls, folder: Path) -> "Config":
        """Loads a folder in Hugging Face's format."""
        found = json.loads((folder / "config.json").read_text())
        known = [field.name for field in dataclasses.fields(cls) if field.name in found]
        return cls(**{name: found[name] for name in known})


def _adapted(config: Config, rngs: nnx.Rngs) -> nnx.Linear:
    d = config.hidden_size
    if not config.rank:
        return nnx.Linear(d, d, rngs=rngs)
    return nnx.LoRALinear(d, d, lora_rank=config.rank, rngs=rngs)


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


class Embeddings(nnx.Module):
    """Words, positions and the one token type that is used."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        embed = functools.partial(nnx.Embed, features=config.hidden_size, rngs=rngs)
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_position_embeddings)
        self.token_type_embeddings = embed(config.type_vocab_size)
        self.LayerNorm = _norm(config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ``(N, L)`` to ``(N, L, d)``."""
        places = self.position_embeddings(jnp.arange(tokens.shape[1]))
        return self.LayerNorm(
            self.word_embeddings(tokens)
            + places
            + self.token_type_embeddings(jnp.zeros_like(tokens))
        )


class SelfAttention(nnx.Module):
    """Softmax attention of all tokens to those that are no padding."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.heads = config.num_attention_heads
        for name in ("query", "key", "value"):
            setattr(self, name, _adapted(config, rngs))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps ``(N, L, d)`` and ``(N, L)`` to ``(N, L, d)``."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(x).reshape(split) for layer in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        return mixed.reshape(x.shape)


class Output(nnx.Module):
    """A linear map, the residual connection and the norm."""

    def __init__(self, dense: nnx.Linear, config: Config, rngs: nnx.Rngs) -> None:
        self.dense = dense
        self.LayerNorm = _norm(config, rngs)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """Maps ``(N, L, k)`` and ``(N, L, d)`` to ``(N, L, d)``."""
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nnx.Module):
    """Attention and its output."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.self = SelfAttention(config, rngs)
        self.output = Output(_adapted(config, rngs), config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps ``(N, L, d)`` and ``(N, L)`` to ``(N, L, d)``."""
        return self.output(self.self(x, mask), x)


class Intermediate(nnx.Module):
    """The wide half of a feed-forward layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(N, L, d)`` to ``(N, L, k)``."""
        return jax.nn.gelu(self.dense(x), approximate=False)


class Layer(nnx.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, rngs)
        self.intermediate = Intermediate(config, rngs)
        narrow = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)
        self.output = Output(narrow, config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps ``(N, L, d)`` and ``(N, L)`` to ``(N, L, d)``."""
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Layers(nnx.Module):
    """All layers."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.layer = nnx.List(Layer(config, rngs) for _ in range(config.num_hidden_layers))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps ``(N, L, d)`` and ``(N, L)`` to ``(N, L, d)``."""
        for layer in self.layer:
            x = layer(x, mask)
        return x


class MiniLM(nnx.Module):
    """Sentence embeddings of length 1: the mean over tokens, divided by its norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Layers(config, rngs)

    def hidden(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the last hidden states.

        Args:
            tokens: ``(N, L)``, integers.
            mask: ``(N, L)``, False for padding.

        Returns:
            ``(N, L, d)``.
        """
        return self.encoder(self.embeddings(tokens), mask)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeddings ``(N, d)``; for the arguments see `hidden`."""
        weights = mask[:, :, None].astype(jnp.float32)
        mean = (self.hidden(tokens, mask) * weights).sum(1) / weights.sum(1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def load(folder: Path, rank: int = 0, seed: int = 0) -> MiniLM:
    """Returns the model with the weights of a folder in Hugging Face's format.

    Args:
        folder: has ``config.json`` and ``model.safetensors``.
        rank: of new LoRA factors, 0 for none; B is zero.
        seed: of their A.
    """
    config = dataclasses.replace(Config.load(folder), rank=rank)
    return with_weights(config, load_file(folder / "model.safetensors"), seed)


def with_weights(config: Config, tensors: Mapping[str, np.ndarray], seed: int = 0) -> MiniLM:
    """Returns the model with weights by their names in the Hugging Face file."""
    model = MiniLM(config, nnx.Rngs(seed))
    state = nnx.state(model, lambda path, _: "lora" not in path)
    loaded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _weight(path, leaf, tensors), state
    )
    nnx.update(model, loaded)
    return model


def _weight(path: tuple, leaf: jax.Array, tensors: Mapping[str, np.ndarray]) -> jax.Array:
    *names, kind = (str(key.key) for key in path if hasattr(key, "key"))
    name = {"bias": "bias"}.get(kind, "weight")
    value = tensors[".".join([*names, name])]
    value = jnp.asarray(value.T if kind == "kernel" else value, leaf.dtype)
    if value.shape != leaf.shape:
        raise ValueError(f"{'.'.join(names)}: {value.shape}, expected {leaf.shape}")
    return value


class Tokens:
    """Texts to tokens.

    Args:
        folder: has ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(LENGTH)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the tokens of each text, int32."""
        found = self._tokenizer.encode_batch(list(texts))
        return [np.asarray(text.ids, np.int32) for text in found]


def pad(tokens: Sequence[np.ndarray], full: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``(N, L)`` and mask ``(N, L)``; L is a multiple of `STEP`, or `LENGTH` if full."""
    length = LENGTH if full else -(-max(map(len, tokens)) // STEP) * STEP
    filled = np.zeros((len(tokens), length), np.int32)
    mask = np.zeros(filled.shape, bool)
    for row, text in enumerate(tokens):
        filled[row, : len(text)], mask[row, : len(text)] = text, True
    return filled, mask


def batches(tokens: Sequence[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, tuple]]:
    """Texts of like lengths together: their places, and what `pad` makes of them.

    The last batch of a length is filled up with its own last text, so that shapes are few.
    """
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), size):
        places = np.asarray(order[start : start + size])
        filled = np.resize(places, size) if len(places) < size else places
        yield places, pad([tokens[i] for i in filled])
