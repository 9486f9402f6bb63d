"""Methods to compare: rules and spaces, and the values to try for their parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

SCALES = (
    0.15,
    0.2,
    0.25,
    0.3,
    0.4,
    0.5,
    0.6,
    0.8,
    1.0,
    1.25,
    1.6,
    2.0,
    2.5,
    3.2,
    4.0,
    5.0,
    6.3,
    8.0,
)
VALUES = {
    "dare.drop": (0.1, 0.3, 0.5, 0.7, 0.9),
    "flatten.power": (0.25, 0.5, 0.75),
    "prune.density": (0.1, 0.2, 0.3, 0.5, 0.7),
    "sce.density": (0.1, 0.2, 0.3, 0.5, 0.7),
    "ties.density": (0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    "dc_merge.density": (0.001, 0.01, 0.1, 0.3, 1.0),
    "cart.rank": (0.04, 0.08, 0.16, 0.32),
    "cart.scale": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    "iso_cts.common": (0.8, 0.6, 0.4, 0.2),
}
"""Tried after the scale, in this order: that of the paper (arXiv 2509.17786, appendix D.3)."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        rules: as the command line writes them, with `` + `` between them.
        space: as the command line writes it.
        cut: the rank that the result is cut to, if it is.
        scales: tried first.
    """

    rules: str
    space: str = "core"
    cut: int | None = None
    scales: tuple[float, ...] = SCALES

    @property
    def values(self) -> Mapping[str, Any]:
        """Returns the values to try, by the name of the parameter."""
        names = self.rules.split(" + ")
        own = {name: values for name, values in VALUES.items() if name.split(".")[0] in names}
        return {"scale": self.scales, **own}


AVERAGE = Method("mean", scales=(1.0,))
SUM = Method("task_arithmetic")
FLAT = ("ties", "dare + ties", "tsv", "cart")
PAPER = (
    *(AVERAGE, SUM, Method("isotropize")),
    *(Method(rules + more) for rules in FLAT for more in ("", " + isotropize")),
    *(
        Method(rules + more, space)
        for space, rules in (
            *(("full", rules) for rules in ("ties", "dare + ties", "cart")),
            *(("knots", rules) for rules in FLAT),
        )
        for more in ("", " + isotropize")
    ),
)
"""The paper's rules and spaces, without those that are the same in core space: `results.SAME`."""
MORE = (
    *(Method(rules) for rules in ("flatten + tsv", "tsv + svc", "pico + tsv")),
    *(Method(rules) for rules in ("iso_cts", "dc_merge", "sce", "prune")),
    Method("ties", "core:gauge=balanced"),
)
"""What the paper has not."""
SMALL = (
    *(Method(rules, cut=16) for rules in ("task_arithmetic", "ties", "dare + ties", "tsv")),
    *(Method(rules, cut=16) for rules in ("isotropize", "tsv + isotropize")),
    *(Method(rules, "tucker:rank=16") for rules in ("task_arithmetic", "ties", "dare + ties")),
    *(Method(rules, "tucker:rank=16") for rules in ("tsv", "isotropize", "tsv + isotropize")),
)
"""A result of rank 16, that of each adapter: cut, or merged in subspaces of that rank."""
TUNED = Method("tsv")
SCALED = (TUNED, Method("cart:rank=0.08"), Method("isotropize"), Method("ties:density=0.2"))
"""With a scale alone to choose."""
MIXED = (
    *(AVERAGE, SUM, Method("ties"), Method("tsv"), Method("cart"), Method("isotropize")),
    *(Method("ties + isotropize"), Method("tsv + isotropize")),
    *(Method("ties", "full"), Method("ties", "knots")),
)
CURVE = (AVERAGE, SUM, Method("tsv"), Method("tsv + isotropize"))
LEARNED = (Method("task_arithmetic"), Method("tsv"))
