"""Parameters of a merge: swept over on projected adapters, or learned; and masks of adapters."""

from coremerge_jax.search.distilling import distill
from coremerge_jax.search.fitting import Fit, fit
from coremerge_jax.search.losses import cosine, cross_entropy, divergence, entropy
from coremerge_jax.search.masking import masks
from coremerge_jax.search.methods import METHODS, Method, grid, line, random
from coremerge_jax.search.parameters import configure, parameters
from coremerge_jax.search.sweeping import Record, Sweep, sweep
from coremerge_jax.search.teachers import agreement

__all__ = [
    "METHODS",
    "Fit",
    "Method",
    "Record",
    "Sweep",
    "agreement",
    "configure",
    "cosine",
    "cross_entropy",
    "distill",
    "divergence",
    "entropy",
    "fit",
    "grid",
    "line",
    "masks",
    "parameters",
    "random",
    "sweep",
]
