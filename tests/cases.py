"""The rules and spaces under test, one row each: all that tests of many rules have to know of one.

A new rule is one file in `coremerge_jax/rules/` and one row here. Rows with the name of a rule are
those that speak for it; others are chains, or the same rule with other parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import definitions as by_hand
import numpy as np
from helpers import dense

import coremerge_jax as cm
from coremerge_jax.lora import LoRA
from coremerge_jax.rules import RULES, Rule
from coremerge_jax.spaces import Space

# Each kind of rule has laws of its own (`laws/test_invariants.py`).
LINEAR, SPECTRAL, ELEMENTWISE, RANDOM = "linear", "spectral", "elementwise", "random"
# Spectral rules that cut to a rank: the directions of copies, which rounding errors turn, count.
CUTTING = "cutting"
# Rules for which KnOTS space is not defined: it has no factors, and singular values coincide there.
SINGULAR = "singular"


@dataclasses.dataclass(frozen=True)
class Slope:
    """A rule as a function of its continuous parameter, for its derivatives.

    Attributes:
        rule: the parameter -> the rule.
        at: a value of the parameter; None if there is none.
        smooth: where derivatives exist though singular values coincide: names of points.
        spaces: the spaces beside core space in which derivatives are tested.
        narrow: false if tests with one version of JAX are enough.
    """

    rule: Callable[[Any], Rule]
    at: Any = None
    smooth: tuple[str, ...] = ()
    spaces: tuple[str, ...] = ()
    narrow: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule with its parameters.

    Attributes:
        name: that of the rule in `RULES`, or of a row of its own.
        rule: what is tested.
        kind: which laws it obeys; None if definition and derivatives are all that is tested.
        definition: LoRA factors of one module -> the merged update, in NumPy; None if none.
        defined_in: the spaces in which the definition holds.
        slope: for derivatives; None if it has none.
        refused: by parameter, values out of its range, beside those that no parameter takes.
        alone: whether one adapter comes back as it is, for these parameters.
        zero_is_absent: whether an update of zero counts for nothing: the rule takes no mean and
            no variance over all adapters.
        narrow: false if tests with one version of JAX are enough.
    """

    name: str
    rule: Rule
    kind: str | None = None
    definition: Callable[[Sequence[LoRA]], np.ndarray] | None = None
    defined_in: tuple[str, ...] = ("core", "full", "knots")
    slope: Slope | None = None
    refused: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    alone: Rule | None = None
    zero_is_absent: bool = False
    narrow: bool = False


def of_updates(definition: Callable) -> Callable:
    """A definition that takes updates as one that takes factors."""
    return lambda loras: definition([dense(lora) for lora in loras])


WEIGHTS = [0.7, 1.2, 1.0]
COINCIDE = ("orthogonal_updates", "isometries")
FACTORED = ("core", "full")  # spaces that know the adapters' factors

ROWS = [
    Case(
        "mean",
        cm.mean(),
        LINEAR,
        of_updates(lambda x: np.mean(x, axis=0)),
        slope=Slope(lambda _: cm.mean(), smooth=COINCIDE),
        alone=cm.mean(),
        narrow=True,
    ),
    Case(
        "task_arithmetic",
        cm.task_arithmetic(),
        LINEAR,
        of_updates(sum),
        slope=Slope(lambda x: cm.task_arithmetic(weights=x), WEIGHTS),
        refused={"weights": [(1.0, float("inf")), {"a": 1}]},
        alone=cm.task_arithmetic(),
        zero_is_absent=True,
    ),
    Case(
        "ties",
        cm.ties(density=0.4),
        ELEMENTWISE,
        slope=Slope(lambda x: cm.ties(density=0.5, weights=x), WEIGHTS, narrow=True),
        refused={
            "density": [0, -0.1, 1.1, 2, np.float32(2)],
            "weights": [(1.0, float("nan")), ("1", 2), {"a": 1}],
        },
        alone=cm.ties(density=1.0),
        zero_is_absent=True,
    ),
    Case(
        "ties by number",
        cm.ties(density=0.8, elect="count", reduce="max"),
        slope=Slope(
            lambda x: cm.ties(density=0.8, elect="count", reduce="max", weights=x), WEIGHTS
        ),
    ),
    Case(
        "ties of the model",
        cm.ties(density=0.4, elect="count", reduce="max", scope="model"),
        ELEMENTWISE,
        narrow=True,
    ),
    Case(
        "sce",
        cm.sce(density=0.4),
        ELEMENTWISE,
        of_updates(lambda x: by_hand.sce(x, 0.4)),
        defined_in=("full",),
        slope=Slope(lambda _: cm.sce(density=0.5)),
        refused={"density": [0, 1.1]},
    ),
    Case(
        "prune",
        cm.prune(density=0.4),
        ELEMENTWISE,
        of_updates(lambda x: sum(by_hand.prune(y, 0.4) for y in x)),
        defined_in=("full",),
        slope=Slope(lambda _: cm.prune(density=0.5)),
        refused={"density": [0, 1.1]},
        zero_is_absent=True,
    ),
    Case(
        "dare",
        cm.dare(drop=0.3),
        RANDOM,
        slope=Slope(lambda x: cm.dare(drop=x), 0.3),
        refused={"drop": [-0.1, 1, 1.5]},
        alone=cm.dare(drop=0.0),
    ),
    Case(
        "dare|ties",
        cm.chain(cm.dare(drop=0.3), cm.ties()),
        RANDOM,
        slope=Slope(lambda x: cm.chain(cm.dare(drop=x), cm.ties(density=0.7)), 0.3),
        narrow=True,
    ),
    Case(
        "tsv",
        cm.tsv(),
        SPECTRAL,
        of_updates(by_hand.tsv),
        slope=Slope(lambda _: cm.tsv(), smooth=COINCIDE, spaces=("full", "knots"), narrow=True),
        refused={"rank": [0, -1, 1.5, np.int64(0)]},
        alone=cm.tsv(),
        zero_is_absent=True,
        narrow=True,
    ),
    Case("tsv of a rank", cm.tsv(rank=2), CUTTING, of_updates(lambda x: by_hand.tsv(x, 2))),
    Case("tsv of rank 1", cm.tsv(rank=1), definition=of_updates(lambda x: by_hand.tsv(x, 1))),
    Case(
        "cart",
        cm.cart(rank=2, scale=0.7),
        SPECTRAL,
        of_updates(lambda x: by_hand.cart(x, 2, 0.7)),
        slope=Slope(
            lambda x: cm.cart(rank=2, scale=x),
            0.7,
            smooth=("orthogonal_isometries",),
            spaces=("full", "knots"),
        ),
        refused={"rank": [0, -1, 1.5], "scale": [10**400]},
        alone=cm.cart(rank=2),
    ),
    Case(
        "isotropize",
        cm.isotropize(),
        SPECTRAL,
        of_updates(lambda x: by_hand.flatten(sum(x), 0)),
        slope=Slope(lambda _: cm.isotropize(), smooth=COINCIDE),
        zero_is_absent=True,
    ),
    Case(
        "flatten",
        cm.flatten(power=0.5),
        definition=of_updates(lambda x: by_hand.flatten(sum(x), 0.5)),
        slope=Slope(
            lambda x: cm.flatten(power=x),
            0.5,
            smooth=COINCIDE,
            spaces=("full", "knots"),
        ),
        refused={"power": [-0.5]},
    ),
    Case(
        "flatten|tsv|flatten",
        cm.chain(cm.flatten(), cm.tsv(), cm.flatten(power=0.3)),
        SPECTRAL,
        of_updates(
            lambda x: by_hand.flatten(by_hand.tsv([by_hand.flatten(y, 0.5) for y in x]), 0.3)
        ),
    ),
    Case(
        "flatten|tsv",
        cm.chain(cm.flatten(power=0.5), cm.tsv()),
        definition=of_updates(lambda x: by_hand.tsv([by_hand.flatten(y, 0.5) for y in x])),
        slope=Slope(lambda x: cm.chain(cm.flatten(power=x), cm.tsv()), 0.5, smooth=COINCIDE),
    ),
    Case(
        "tsv|isotropize",
        cm.chain(cm.tsv(), cm.isotropize()),
        slope=Slope(lambda _: cm.chain(cm.tsv(), cm.isotropize()), smooth=COINCIDE),
    ),
    Case(
        "ties|isotropize",
        cm.chain(cm.ties(density=0.7), cm.isotropize()),
        slope=Slope(lambda _: cm.chain(cm.ties(density=0.7), cm.isotropize())),
    ),
    Case(
        "iso_cts",
        cm.iso_cts(common=3, specific=1),
        CUTTING,
        of_updates(lambda x: by_hand.iso_cts(x, 3, 1)),
        slope=Slope(lambda _: cm.iso_cts(common=3, specific=1)),
        refused={"common": [-1, 0.0, 1.5], "specific": [-1, 0.5]},
    ),
    # In spaces of 8 directions: ⌊0.8 · 8⌋ = 6, round(2 / 3) = 1 for each, and 8 - 3 in common. In
    # full space, 0.8 of 12 directions are more than the 8 that there are: all are common.
    Case(
        "iso_cts of shares",
        cm.iso_cts(),
        definition=of_updates(lambda x: by_hand.iso_cts(x, 5, 1)),
        defined_in=("core", "knots"),
    ),
    Case(
        "iso_cts where all is common",
        cm.iso_cts(),
        definition=of_updates(lambda x: by_hand.flatten(sum(x), 0)),
        defined_in=("full",),
    ),
    Case(
        "svc",
        cm.svc(),
        SPECTRAL,
        of_updates(lambda x: by_hand.svc(sum(x), x)),
        slope=Slope(lambda x: cm.svc(alpha=x), 0.7, spaces=("full", "knots"), narrow=True),
        refused={"alpha": [0, -1]},
        narrow=True,
    ),
    Case(
        "tsv|svc",
        cm.chain(cm.tsv(), cm.svc(alpha=0.1)),
        definition=of_updates(lambda x: by_hand.svc(by_hand.tsv(x), x, 0.1)),
    ),
    Case(
        "dc_merge",
        cm.dc_merge(density=0.2, rho=5.0),
        SINGULAR,
        of_updates(lambda x: by_hand.dc_merge(x, 0.2, 5.0)),
        refused={"density": [0, 1.1], "rho": [0, 0.5]},
    ),
    Case(
        "dc_merge, averaging",
        cm.dc_merge(density=0.1),
        definition=of_updates(lambda x: by_hand.dc_merge(x, 0.1, None)),
    ),
    Case(
        "dc_merge, one entry",
        cm.dc_merge(),
        definition=of_updates(lambda x: by_hand.dc_merge(x, 0.001, None)),
    ),
    Case(
        "pico",
        cm.pico(),
        definition=lambda x: by_hand.pico(x, sum),
        defined_in=FACTORED,
        slope=Slope(lambda _: cm.pico(), smooth=COINCIDE, spaces=("full",), narrow=True),
    ),
    Case(
        "pico|tsv",
        cm.chain(cm.pico(), cm.tsv()),
        SINGULAR,
        lambda x: by_hand.pico(x, by_hand.tsv),
        defined_in=FACTORED,
        slope=Slope(lambda _: cm.chain(cm.pico(), cm.tsv())),
        narrow=True,
    ),
]
CASES = {case.name: case for case in ROWS}

WITH_INPUTS = {
    "regmean": Case(
        "regmean",
        cm.regmean(),
        refused={
            "ridge": [0, -1],
            "norm": [0, -1],
            "weighting": ["traces", 1],
            "orthogonalize": ["yes", 1],
        },
    ),
}
"""Rules that need inputs: their laws are in `laws/test_regression.py`."""

WITHOUT_INPUTS = {name: make for name, make in RULES.items() if not make.needs_inputs}


@dataclasses.dataclass(frozen=True)
class Place:
    """A space with its parameters.

    Attributes:
        space: what is tested.
        laws: whether the laws of rules are tested there.
        refused: by parameter, values out of its range, beside those that no parameter takes.
        defined: the space in which spectral rules obey their definitions, if another one.
    """

    space: Space
    laws: bool = True
    refused: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    defined: Space | None = None


SPACES = {
    "core": Place(
        cm.core(), refused={"rtol": [1, 2, -0.1, True], "gauge": ["balance", 1], "rows": ["all", 1]}
    ),
    "balanced": Place(cm.core(gauge="balanced"), laws=False),
    "full": Place(cm.full()),
    "knots": Place(cm.knots(), refused={"scaled": [0, "yes"]}, defined=cm.knots(scaled=True)),
    # Its subspaces leave something out: it has laws of its own.
    "tucker": Place(
        cm.tucker(rank=3),
        laws=False,
        refused={
            "rank": [0, -1, 1.5, True],
            "beta": [-0.1, 1.1],
            "iterations": [0, 1.5],
            "tolerance": [-1],
        },
    ),
}
