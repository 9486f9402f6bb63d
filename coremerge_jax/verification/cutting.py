"""Cuts of a merge that is made again: to the ranks of the found one, where rounding decides."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from coremerge_jax.lora import Adapter, LoRA
from coremerge_jax.merging.truncation import Cut
from coremerge_jax.recipe import Recipe
from coremerge_jax.verification.tolerance import Expected, directions

# Accuracy of energies, and of shares of them, computed from factors in float32.
_SHARE = 1e-6


@dataclasses.dataclass(frozen=True)
class Cutting:
    """The cut of a merge by a recipe; made by `of`.

    Attributes:
        cut: the cut; None if nothing is to be cut.
        scores: of a limit of the whole model, ``(k,)`` by path: the energy of each direction, per
            parameter where these are limited. Else empty.
    """

    cut: Cut | None
    scores: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, adapters: Sequence[Adapter]) -> "Cutting":
        """Returns the cut of a recipe's merge of adapters; a budget takes a pass over the merge."""
        if recipe.limit.nothing:
            return cls(None)
        resolved = recipe.resolve()
        cut = Cut(recipe.limit, resolved.metric(adapters))
        if not recipe.limit.whole_model:
            return cls(cut)
        stream = resolved.stream(adapters)
        energies, outline = cut.energies(map(Adapter, stream)), stream.outline
        scores = {path: x / recipe.limit.cost(outline[path].shape) for path, x in energies.items()}
        return cls(cut.with_energies(energies, outline), scores)

    def expected(self, part: Mapping[str, LoRA], found: Mapping[str, LoRA]) -> dict[str, Expected]:
        """Returns the found modules as they should be.

        Args:
            part: modules of the merge that is made again, before the cut.
            found: some of these as they are found.
        """
        whole = jax.device_get({path: part[path] for path in found})
        if not whole or self.cut is None:
            return {path: Expected(lora, lora) for path, lora in whole.items()}
        cut, kept = self.cut(Adapter(whole))
        for path in whole:
            rank = directions(found[path])
            if rank not in (0, cut[path].rank) and self._may_be(path, rank, cut[path].rank):
                other, shares = self._cut_to(rank, path, whole[path])
                if self._is_close(kept[path], shares):
                    cut[path] = other
        by_inputs = set() if self.cut.metric is None else self.cut.metric.matched.paths.keys()
        return {
            # The nearest cut in the metric of inputs is not the nearest in the Frobenius norm.
            path: Expected(cut[path] if path in by_inputs else whole[path], cut[path])
            for path in whole
        }

    def _cut_to(self, rank: int, path: str, whole: LoRA) -> tuple[LoRA, float]:
        """Returns a module cut to a rank, and the share of energy that it keeps."""
        assert self.cut is not None
        cut, kept = dataclasses.replace(self.cut, ranks={path: rank})(Adapter({path: whole}))
        return cut[path], kept[path]

    def _is_close(self, kept: float, other: float) -> bool:
        """Returns True if rounding decides which of two shares is the least that is enough."""
        assert self.cut is not None
        energy = self.cut.limit.energy
        return energy is None or abs(min(kept, other) - energy) <= _SHARE

    def _may_be(self, path: str, rank: int, expected: int) -> bool:
        """Returns True if rounding may give a module one rank in place of another."""
        assert self.cut is not None
        if self.cut.ranks is None:
            return self.cut.limit.energy is not None and abs(rank - expected) == 1
        scores, (least, most) = self.scores[path], self._margin
        if rank > expected:
            return rank <= len(scores) and bool(scores[rank - 1] >= least * (1 - _SHARE))
        return bool(scores[rank] <= most * (1 + _SHARE))

    @functools.cached_property
    def _margin(self) -> tuple[float, float]:
        """The least score of a direction that is kept for it, and the largest that is not."""
        assert self.cut is not None
        ranks = self.cut.ranks or {}
        kept = [x[1 : ranks[path]].min(initial=np.inf) for path, x in self.scores.items()]
        left = [x[ranks[path] :].max(initial=0.0) for path, x in self.scores.items()]
        return float(min(kept)), float(max(left))
