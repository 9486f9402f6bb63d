"""The merges of this study: fewer than those of the text tasks, as each takes minutes.

Only scales are searched, in steps of 1.6; densities and ranks are those that the text tasks have
chosen most often.
"""

from evidence.base import Learning
from evidence.methods import AVERAGE, Method, Plan

LEARNING = Learning(steps=160, decide=16)
"""There are 64 validation examples of a task."""
SCALES = (0.25, 0.4, 0.63, 1.0, 1.6)
FLAT = (0.8, 1.25, 2.0, 3.2, 5.0)
"""Scales of flat merges, which are smaller by themselves."""
ISO = " + isotropize"
TIES, CART = "ties:density=0.2", "cart:rank=0.08"


def _method(rules: str, space: str = "core", cut: int | None = None) -> Method:
    return Method(rules, space, cut, FLAT if rules.endswith("isotropize") else SCALES)


def _each(*rules: str, space: str = "core", cut: int | None = None) -> tuple[Method, ...]:
    return tuple(_method(x, space, cut) for x in rules)


SUM, TSV = _each("task_arithmetic", "tsv")
RULES = (TIES, TIES + ISO, "tsv", "tsv" + ISO, CART, CART + ISO)

PLAN = Plan(
    total=SUM,
    paper=(
        *(AVERAGE, SUM),
        *_each("isotropize", *RULES),
        *_each(*(x for x in RULES if "tsv" not in x), space="full"),
        *_each(*RULES, space="knots"),
    ),
    more=_each("tsv + svc", "dc_merge:density=0.01"),
    small=(
        *_each("task_arithmetic", TIES, "tsv", "isotropize", cut=16),
        *_each("task_arithmetic", TIES, "tsv", "isotropize", space="tucker:rank=16"),
    ),
    mixed=(
        *(AVERAGE, SUM),
        *_each(TIES, "tsv", CART, "isotropize", "tsv" + ISO, "regmean"),
    ),
    curve=(AVERAGE, SUM, TSV),
    learned=((TSV, "adapter"), (SUM, "module"), (TSV, "module")),
    tuned=TSV,
    retrained=("numbers", "dates"),
    scaled=_each("tsv", CART, "isotropize", TIES),
    few=(2, 4, 6),
    counts=(2, 4, 6),
    scales=SCALES,
    numbers=(8, 16, 32, 64, 128),
)

QUICK = Plan(
    total=SUM,
    paper=(SUM, Method("tsv", scales=(0.8,)), Method("tsv", "knots", scales=(0.8,))),
    more=(),
    small=(Method("tsv", cut=4, scales=(0.8,)),),
    mixed=(SUM, Method("regmean", scales=(0.8,))),
    curve=(AVERAGE,),
    counts=(2, 3),
    orders=1,
    learned=((SUM, "module"),),
    tuned=Method("tsv", scales=(0.8,)),
    retrained=("one", "two"),
    scaled=(Method("tsv", scales=(0.8,)),),
    few=(3,),
    scales=(0.5, 1.0),
    inputs=16,
    taught=16,
    numbers=(8,),
    cut=4,
    same=(("tsv", "full"),),
)
"""Tiny, and still of every kind."""
