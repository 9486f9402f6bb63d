"""A tiny random model with tiny tasks, on which all steps take seconds."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from common.splits import Example
from evidence.base import Learning
from tokenizers import Tokenizer, models, pre_tokenizers

from smollm.model import NAMES, Config
from smollm.plan import QUICK
from smollm.scoring import Exam
from smollm.study import Study, encoded
from smollm.tasks import Task

WORDS = [f"w{i}" for i in range(24)]
STEPS = 80
TOKENS = ["<end>", "user", "assistant", "one", "two", "three", *WORDS]
CONFIG = Config(
    vocabulary=len(TOKENS),
    layers=2,
    width=24,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_base=1e4,
    epsilon=1e-5,
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A random model, with one token for each word."""

    config: Config = CONFIG
    end: int = 0

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields tensors by their names in GGUF files."""
        rng, c = np.random.default_rng(0), self.config
        heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
        shapes = {
            "attn.q_proj.w": (heads, c.width),
            "attn.k_proj.w": (kv_heads, c.width),
            "attn.v_proj.w": (kv_heads, c.width),
            "attn.o_proj.w": (c.width, heads),
            "mlp.gate_proj.kernel": (c.hidden, c.width),
            "mlp.up_proj.kernel": (c.hidden, c.width),
            "mlp.down_proj.kernel": (c.width, c.hidden),
        }
        for name, ours in NAMES.items():
            if "." in ours and ours.split(".")[0] in ("embedder", "final_norm"):
                size = (c.vocabulary, c.width) if "token" in name else (c.width,)
                value = rng.standard_normal(size) if "token" in name else np.ones(size)
                yield name, value.astype(np.float32)
                continue
            for layer in range(c.layers):
                shape = shapes.get(ours, (c.width,))
                normal = rng.standard_normal(shape) / shape[-1] ** 0.5
                value = normal if len(shape) == 2 else np.ones(shape)
                yield f"blk.{layer}.{name}", value.astype(np.float32)

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer."""
        words = models.WordLevel({word: i for i, word in enumerate(TOKENS)}, unk_token="<end>")
        tokenizer = Tokenizer(words)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer


def _task(name: str, first: int) -> Task:
    """Returns a task: which of two words is in a text? The answer is the word, maybe twice."""

    def parse(_: Path) -> Iterator[list[Example]]:
        rng = random.Random(first)
        for i in range(900):
            word = WORDS[first + i % 2]
            words = [*rng.choices(WORDS[12:], k=3), word]
            yield [(" ".join(rng.sample(words, 4)), f"{word} {word}" if i % 2 else word)]

    return Task(name, "made", "made here", name, parse)


def quick(folder: Path) -> Study:
    """Returns a study of a tiny model and three tiny tasks."""
    tasks = [_task(name, 2 * i) for i, name in enumerate(("one", "two", "three"))]
    sizes = {"train": 400, "validation": 40, "test": 120}
    examples = encoded(Tiny(), [(task, folder) for task in tasks], sizes)
    return Study(
        folder=folder,
        tasks=tasks,
        exam=Exam(Tiny(), examples, jnp.float32),
        steps=STEPS,
        rate=0.03,
        plan=QUICK,
        learning=Learning(steps=10, decide=8),
    )
