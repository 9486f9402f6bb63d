"""Accuracy on the demo's tasks, relative to each task's own adapter."""

import numpy as np

import coremerge_jax as cm
from coremerge_jax import demo


class Normalized:
    """The mean over tasks, as a function of a merged adapter.

    Attributes:
        adapters: those of the demo.
    """

    def __init__(self) -> None:
        self.adapters = [cm.load_peft(path) for path in demo.adapters()]
        self._alone = {split: self._own(split) for split in ("validation", "test")}

    def _own(self, split: str) -> list[float]:
        pairs = zip(demo.TASKS, self.adapters, strict=True)
        return [demo.evaluate(adapter, split=split)[task] for task, adapter in pairs]

    def __call__(self, merged: cm.Adapter, split: str = "validation") -> float:
        """Returns the mean on the images of a split."""
        found = demo.evaluate(merged, split=split).values()
        return float(np.mean([x / y for x, y in zip(found, self._alone[split], strict=True)]))
