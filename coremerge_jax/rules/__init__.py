"""Merge rules: pure functions from the adapters' cores ``(T, p, q)`` to one core ``(p, q)``.

Derivatives. Every selection is constant: the entries and singular directions that are kept, the
signs that are elected, the masks that the key fixes. So derivatives are exact wherever the
selection does not change nearby, and zero by parameters that only select (densities, ranks). They
are exact also where singular values coincide, unless the rule or elementwise coordinates
distinguish such directions; then they are finite. Where stacks or updates are of lower rank
(copies, zeros, shared directions), null directions stay null: derivatives are exact along changes
that keep the rank, and leave out changes that would raise it. `dc_merge` has no derivative.

Second derivatives are exact too where singular values differ. Where they coincide, those of `mean`,
`task_arithmetic`, `tsv` without a rank, `isotropize` and their chains are exact as well; others are
finite, and leave out how coinciding directions mix.
"""

from coremerge_jax.rules.calibration import pico, svc
from coremerge_jax.rules.chain import Chain, Step, as_rule, chain, from_function
from coremerge_jax.rules.linear import mean, task_arithmetic
from coremerge_jax.rules.regression import regmean
from coremerge_jax.rules.rule import Context, Equivariance, Rule
from coremerge_jax.rules.sparse import dare, prune, sce, ties, ties_above
from coremerge_jax.rules.spectral import cart, flatten, isotropize, tsv
from coremerge_jax.rules.subspace import dc_merge, iso_cts

# In the order of tables, by the names of their classes, which are those of recipes.
RULES: dict[str, type[Rule]] = {
    rule.__name__: rule
    for rule in (
        mean,
        task_arithmetic,
        ties,
        sce,
        dare,
        prune,
        tsv,
        cart,
        iso_cts,
        dc_merge,
        regmean,
        isotropize,
        flatten,
        svc,
        pico,
    )
}

__all__ = [
    "RULES",
    "Chain",
    "Context",
    "Equivariance",
    "Rule",
    "Step",
    "as_rule",
    "cart",
    "chain",
    "dare",
    "dc_merge",
    "flatten",
    "from_function",
    "iso_cts",
    "isotropize",
    "mean",
    "pico",
    "prune",
    "regmean",
    "sce",
    "svc",
    "task_arithmetic",
    "ties",
    "ties_above",
    "tsv",
]
