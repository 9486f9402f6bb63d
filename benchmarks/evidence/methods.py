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

    @property
    def tried(self) -> list[Any]:
        """Returns all that decides about the result, for JSON."""
        return [self.rules, self.space, self.cut, dict(self.values)]

    @property
    def slug(self) -> str:
        """Returns a part of a file's name."""
        text = f"{self.rules}-{self.space}" + (f"-cut-{self.cut}" if self.cut else "")
        return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)


AVERAGE = Method("mean", scales=(1.0,))
SUM = Method("task_arithmetic")
FLAT = ("ties", "dare + ties", "tsv", "cart")
TUNED = Method("tsv")
SAME = (
    *((rule, "full") for rule in ("task_arithmetic", "tsv", "cart:rank=10", "isotropize")),
    *(("tsv + isotropize", "full"), ("task_arithmetic", "knots"), ("isotropize", "knots")),
)
"""Rules and spaces whose result is that in core space."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The merges of a study; by default, those of the text tasks.

    Attributes:
        total: the sum, with which all others are compared.
        paper: the paper's rules and spaces, without those that are the same in core space: `SAME`.
        more: what the paper has not.
        small: results of the adapters' rank: cut, or merged in subspaces of that rank.
        mixed: of adapters of mixed ranks.
        curve: of more and more tasks.
        counts: so many tasks.
        orders: random orders of the tasks, for these.
        learned: rules with learned coefficients, and what has a coefficient: an adapter, or each
            of its modules.
        tuned: with which merges of unlabelled inputs are compared.
        retrained: tasks whose adapters are trained more than once.
        retrained_with_inputs: merges of these with unlabelled inputs.
        scaled: with a scale alone to choose, which the automatic one is compared with.
        few: so many tasks, for the automatic scale.
        scales: tried by agreement.
        inputs: unlabelled inputs of each task for statistics.
        taught: unlabelled inputs of each task for distilled coefficients.
        numbers: of inputs, for statistics of fewer and more.
        cut: the rank of cut merges, and mean rank of those with a budget.
        same: rules and spaces whose distance from core space is measured.
    """

    total: Method = SUM
    paper: tuple[Method, ...] = (
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
    more: tuple[Method, ...] = (
        *(Method(rules) for rules in ("flatten + tsv", "tsv + svc", "pico + tsv")),
        *(Method(rules) for rules in ("iso_cts", "dc_merge", "sce", "prune")),
        Method("ties", "core:gauge=balanced"),
    )
    small: tuple[Method, ...] = (
        *(Method(rules, cut=16) for rules in ("task_arithmetic", "ties", "dare + ties", "tsv")),
        *(Method(rules, cut=16) for rules in ("isotropize", "tsv + isotropize")),
        *(Method(rules, "tucker:rank=16") for rules in ("task_arithmetic", "ties", "dare + ties")),
        *(Method(rules, "tucker:rank=16") for rules in ("tsv", "isotropize", "tsv + isotropize")),
    )
    mixed: tuple[Method, ...] = (
        *(AVERAGE, SUM, Method("ties"), TUNED, Method("cart"), Method("isotropize")),
        *(Method("ties + isotropize"), Method("tsv + isotropize")),
        *(Method("ties", "full"), Method("ties", "knots")),
    )
    curve: tuple[Method, ...] = (AVERAGE, SUM, TUNED, Method("tsv + isotropize"))
    counts: tuple[int, ...] = (2, 4, 6, 8)
    orders: int = 2
    learned: tuple[tuple[Method, str], ...] = tuple(
        (method, per) for method in (SUM, TUNED) for per in ("adapter", "module")
    )
    tuned: Method = TUNED
    retrained: tuple[str, ...] = ()
    retrained_with_inputs: tuple[str, ...] = ("regmean", "regmean, distilled")
    scaled: tuple[Method, ...] = (
        *(TUNED, Method("cart:rank=0.08"), Method("isotropize")),
        Method("ties:density=0.2"),
    )
    few: tuple[int, ...] = (2, 4, 8)
    scales: tuple[float, ...] = SCALES
    inputs: int = 64
    taught: int = 80
    numbers: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    cut: int = 16
    same: tuple[tuple[str, str], ...] = SAME

    @property
    def most(self) -> int:
        """Returns the largest number of unlabelled inputs of a task."""
        return max(self.inputs, self.taught, *self.numbers)


TEXTS = Plan()
"""The merges of the text tasks."""
