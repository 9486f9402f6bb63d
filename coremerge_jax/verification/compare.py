"""Compares a merge with the same merge made again, batch by batch."""

import dataclasses
import functools
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import FormatError
from coremerge_jax.lora import DTYPES, Adapter, AdapterFile, Array, LoRA
from coremerge_jax.merging.alignment import align
from coremerge_jax.recipe import PRECISIONS, Recipe
from coremerge_jax.verification.cutting import Cutting
from coremerge_jax.verification.tolerance import (
    Distance,
    Expected,
    Tolerance,
    directions,
    distance,
    negligible,
    rounding_loss,
    roundoff,
    tolerance,
    went_through,
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of a module, as absolute norms.

    Attributes:
        distance: distance of the found update from the expected one.
        tolerance: the largest error that rounding explains.
        negligible: updates up to this norm count as zero.
        underflow: True if writing in the dtype loses more than rounding of normal numbers does.
        through: a dtype with fewer digits that the values of a factor have gone through, or None.
        coarse: the largest error that rounding to this dtype explains.
        losses: by dtype, the relative error of writing the expected update in it.
        noise: the part of the tolerance for rounding inside the merge.
    """

    distance: Distance
    tolerance: Tolerance
    negligible: float
    underflow: bool
    through: str | None
    coarse: float
    losses: Mapping[str, float | None]
    noise: float = 0.0

    @property
    def differs(self) -> bool:
        """True if rounding does not explain the error."""
        return self.distance.error > self.tolerance.at()

    @property
    def wrong(self) -> bool:
        """True if the module is not the expected one."""
        return self.differs or self.vanished or self.through is not None

    @property
    def nothing(self) -> bool:
        """True if no update is expected."""
        return self.distance.expected <= self.negligible

    @property
    def vanished(self) -> bool:
        """True if the update is zero and the expected one is not."""
        lost = self.distance.norm <= self.negligible
        return lost and not self.nothing and (self.differs or self.underflow)

    def with_noise(self, noise: float) -> "Measured":
        """Returns the same with a wider tolerance, for so much rounding inside the merge."""
        wider = dataclasses.replace(self.tolerance, expected=self.tolerance.expected + noise)
        coarse = self.coarse + noise
        return dataclasses.replace(self, tolerance=wider, coarse=coarse, noise=noise)


def measure(found: LoRA, expected: Expected, dtype: str) -> Measured:
    """Measures a module that was written in a dtype."""
    apart, bound = distance(found, expected), tolerance(found, expected, dtype)
    through = went_through(found, expected.cut, dtype)
    losses = {dtype: rounding_loss(expected.cut, dtype) for dtype in DTYPES}
    lost = (losses.get(dtype) or 0.0) * apart.expected
    return Measured(
        distance=apart,
        tolerance=bound,
        negligible=negligible(expected.whole),
        underflow=lost > roundoff(expected.cut, dtype, underflow=False),
        through=through,
        coarse=roundoff(found, through) + bound.expected if through else 0.0,
        losses=losses,
    )


class Comparison:
    """Comparison of a merge with the same merge made again.

    Args:
        found: the merge.
        adapters: its sources.
        recipe: the recipe by which they were merged.
        dtype: dtype that the merge was written in.
        precision: precision that it was computed in, if known.

    Attributes:
        outline: the expected merge, without its factors.
        paths: modules that can be compared.
        unreadable: messages on modules that cannot be read; filled by reading them.
    """

    def __init__(
        self,
        found: Adapter,
        adapters: Sequence[Adapter],
        recipe: Recipe,
        dtype: str,
        precision: str | None = None,
    ) -> None:
        self.found, self.recipe, self.dtype = found, recipe, dtype
        self.adapters = _aligned(adapters, recipe)
        self._single = "float32" in (recipe.precision, precision)
        self.outline = recipe.resolve().stream(self.adapters).outline
        there = found.outline
        self.paths = [
            path
            for path, lora in self.outline.items()
            if path in there and there[path].shape == lora.shape
        ]
        self.unreadable: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return [x.metadata.name or f"adapter {t}" for t, x in enumerate(self.adapters)]

    @functools.cached_property
    def scales(self) -> set[float]:
        """The scales of the modules, automatic ones as they come out."""
        return set(self.recipe.resolve().stream(self.adapters).scales.values())

    @functools.cached_property
    def _cutting(self) -> Cutting:
        """The cut of the merge."""
        return Cutting.of(self.recipe, self.adapters)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the sources; a source of weight 0 is not merged."""
        return self.recipe.weights or (1.0,) * len(self.adapters)

    def measure(self) -> dict[str, Measured]:
        """Measures all modules."""
        pairs = self.pairs(self.paths)
        return {path: measure(found, expected, self.dtype) for path, found, expected in pairs}

    def pairs(
        self,
        paths: Collection[str],
        recipe: Recipe | None = None,
        adapters: Sequence[Adapter] | None = None,
    ) -> Iterator[tuple[str, LoRA, Expected]]:
        """Yields modules as found and as expected, by this recipe and sources or by others."""
        is_other, wanted = recipe or adapters, set(paths)
        recipe, adapters = recipe or self.recipe, adapters or self.adapters
        cutting = Cutting.of(recipe, adapters) if is_other else self._cutting
        for part in recipe.resolve().stream(adapters):
            found = self.read(path for path in part if path in wanted)
            expected = cutting.expected(part, found)
            yield from ((path, lora, expected[path]) for path, lora in found.items())

    def noise(self, paths: Collection[str], probes: int) -> dict[str, float]:
        """Estimates how much rounding inside the merge changes modules, as norms.

        Merges sources that differ by rounding, and returns the largest changes. If the merge was
        computed in float32, the change to another precision counts too, as moved sources do not
        show all rounding in float32.
        """
        count, recipe = len(self.adapters), self.recipe
        streams = [
            recipe.resolve().stream(
                [_Jittered(x, i * count + t) for t, x in enumerate(self.adapters)]
            )
            for i in range(probes)
        ]
        if self._single:
            for precision in PRECISIONS:
                streams += [
                    dataclasses.replace(recipe, precision=precision).resolve().stream(self.adapters)
                ]
        largest = dict.fromkeys(paths, 0.0)
        for part, *others in zip(recipe.resolve().stream(self.adapters), *streams, strict=True):
            found = self.read(path for path in part if path in largest)
            expected = self._cutting.expected(part, found)
            for other in others:
                moved = self._cutting.expected(other, found)
                for path in found:
                    change = distance(moved[path].cut, expected[path]).error
                    largest[path] = max(largest[path], change)
        return largest

    def sources(self, path: str) -> dict[int, LoRA]:
        """Returns a module of all merged sources that have it, by place of the source."""
        having = (t for t, x in enumerate(self.adapters) if path in x.outline and self.weights[t])
        return {t: jax.device_get(self.adapters[t][path]) for t in having}

    def idle(self) -> dict[int, list[str]]:
        """Returns the modules of sources whose update is zero, by place of the source."""
        found: dict[int, list[str]] = defaultdict(list)
        for path in self.outline:
            for t, lora in self.sources(path).items():
                if not directions(lora):
                    found[t].append(path)
        return found

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns modules of the merge; those that cannot be read are left out and noted."""
        wanted = [path for path in paths if path not in self.unreadable]
        try:
            return _finite(self.found.read(wanted))
        except FormatError:
            return {path: lora for path in wanted for lora in self._read_one(path)}

    def _read_one(self, path: str) -> list[LoRA]:
        try:
            return list(_finite(self.found.read([path])).values())
        except FormatError as error:
            self.unreadable[path] = str(error)
            return []


def _aligned(adapters: Sequence[Adapter], recipe: Recipe) -> Sequence[Adapter]:
    """Returns the sources with the names of modules that merging gives them."""
    weights = recipe.weights or (1.0,) * len(adapters)
    merged = [t for t, _ in enumerate(zip(adapters, weights, strict=False)) if weights[t]]
    renamed: dict[int, Any] = dict(zip(merged, align([adapters[t] for t in merged]), strict=True))
    return [renamed.get(t, adapter) for t, adapter in enumerate(adapters)]


def _finite(loras: dict[str, LoRA]) -> dict[str, LoRA]:
    for path, lora in loras.items():
        if not all(np.isfinite(np.asarray(x, np.float32)).all() for x in (lora.a, lora.b)):
            raise FormatError(f"module {path!r} has NaN or infinite values")
    return loras


class _Jittered(AdapterFile):
    """An adapter with every entry of its factors moved up or down by one unit in the last place.

    The unit is at least that of float32, in which the merge may have been computed.
    """

    def __init__(self, adapter: Adapter, seed: int) -> None:
        outline = adapter.outline
        super().__init__(dict(outline), metadata=adapter.metadata, extras=adapter.extras)
        self._adapter, self._seed = adapter, seed

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths."""
        read = self._adapter.read(paths)
        return {path: self._moved(path, lora) for path, lora in read.items()}

    def _moved(self, path: str, lora: LoRA) -> LoRA:
        rng = np.random.default_rng([self._seed, zlib.crc32(path.encode())])

        def move(x: Array) -> np.ndarray:
            host = np.asarray(x)
            unit = max(float(jnp.finfo(host.dtype).eps), float(np.finfo(np.float32).eps))
            up_or_down = rng.choice([-1, 1], host.shape)
            return (host.astype(np.float64) * (1 + unit * up_or_down)).astype(host.dtype)

        return dataclasses.replace(lora, a=move(lora.a), b=move(lora.b))
