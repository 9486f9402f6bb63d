"""Shapes of models, and synthetic adapters of them as PEFT folders.

    python benchmarks/common/shapes.py SHAPE FOLDER [--tasks T] [--layers N]

writes the adapters of a shape as PEFT folders in bfloat16.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import coremerge_jax as cm

CONDITION = 50.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """Modules of one shape ``(m, n)``, by their names in each layer."""

    m: int
    n: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Adapters of one model: T of them, all of one rank."""

    name: str
    title: str
    layers: int
    kinds: tuple[Kind, ...]
    tasks: int
    rank: int

    @property
    def stacked_rank(self) -> int:
        """Returns R = T r."""
        return self.tasks * self.rank

    def paths(self, kind: Kind, modules: int | None = None) -> list[str]:
        """Returns the paths of a kind's modules, or of the first few."""
        every = [
            f"model.layers.{i}.self_attn.{name}" for i in range(self.layers) for name in kind.names
        ]
        return every[:modules]

    def modules(self, kind: Kind) -> int:
        """Returns the number of modules of a kind."""
        return self.layers * len(kind.names)

    def adapters(self, seed: int = 0) -> list[cm.Adapter]:
        """Returns seeded float32 adapters that resemble trained ones.

        A is drawn as peft initializes it, uniform in ±1/√n (Kaiming's, with a = √5), which training
        moves little. B starts at zero and learns few directions: Gaussian, with singular values
        that fall off exponentially by a factor of `CONDITION`. Those of the stacks are alike.
        """
        rng = np.random.default_rng(seed)
        return [
            cm.Adapter(
                {
                    path: _lora(rng, kind.m, kind.n, self.rank)
                    for kind in self.kinds
                    for path in self.paths(kind)
                },
                metadata=cm.Metadata(
                    name=f"task{t}", rank=self.rank, alpha=float(self.rank), task_type="CAUSAL_LM"
                ),
            )
            for t in range(self.tasks)
        ]

    def tiny(self) -> "Shape":
        """Returns a tiny version, to try that everything runs."""
        kinds = tuple(Kind(kind.m // 16, kind.n // 16, kind.names[:1]) for kind in self.kinds)
        tasks, rank = min(self.tasks, 4), min(self.rank, 8)
        return dataclasses.replace(self, layers=2, kinds=kinds, tasks=tasks, rank=rank)


def _lora(rng: np.random.Generator, m: int, n: int, rank: int) -> cm.LoRA:
    a = (rng.random((rank, n), np.float32) * 2 - 1) / math.sqrt(n)
    spectrum = CONDITION ** -np.linspace(0, 1, rank)
    mix = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
    b = rng.standard_normal((m, rank), np.float32) @ (spectrum[:, None] * mix / m**0.5)
    return cm.LoRA(a=a.astype(np.float32), b=b.astype(np.float32))


def _llama(name: str, title: str, layers: int, tasks: int, size: int) -> Shape:
    kinds = (
        Kind(size, size, ("q_proj", "o_proj")),
        Kind(1024, size, ("k_proj", "v_proj")),
    )
    return Shape(name, title, layers, kinds, tasks, 16)


def _square(name: str, title: str, modules: int, size: int, tasks: int, rank: int) -> Shape:
    return Shape(name, title, modules, (Kind(size, size, ("q_proj",)),), tasks, rank)


TASKS = (2, 4, 8, 16, 32, 64, 100)
RANKS = (4, 16, 64, 256)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "vit-b32",
            "ViT-B/32, T 8, r 16",
            12,
            (Kind(768, 768, ("q_proj", "k_proj", "v_proj", "out_proj")),),
            8,
            16,
        ),
        _llama("llama-3-8b", "Llama-3-8B, T 6, r 16", 32, 6, 4096),
        _llama("llama-3-70b", "Llama-3-70B (8 of 80 layers), T 6, r 16", 8, 6, 8192),
        *(_square(f"tasks-{t}", f"2 × 4096², T {t}, r 16", 2, 4096, t, 16) for t in TASKS),
        *(
            _square(f"rank-{r}", f"2 × 4096², T 8, r {r}", 2, 4096, 8, r)
            for r in RANKS
            if r != 16  # that is tasks-8
        ),
        _square("saturated", "4 × 384², T 16, r 64: R > m, n", 4, 384, 16, 64),
        _square("many", "2 × 1024², T 1000, r 16: R > m, n", 2, 1024, 1000, 16),
    )
}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the adapters of a shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, help="number of adapters")
    parser.add_argument("--layers", type=int, help="number of layers")
    parser.add_argument("--tiny", action="store_true", help="tiny modules")
    options = parser.parse_args(argv)
    shape = SHAPES[options.shape]
    shape = shape.tiny() if options.tiny else shape
    shape = dataclasses.replace(
        shape, tasks=options.tasks or shape.tasks, layers=options.layers or shape.layers
    )
    for adapter in shape.adapters():
        cm.save_peft(adapter, options.folder / str(adapter.metadata.name), dtype="bfloat16")


if __name__ == "__main__":
    main()
