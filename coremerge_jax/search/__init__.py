"""Parameters of a merge: swept over on projected adapters, or learned by gradient descent."""

from coremerge_jax.search.fitting import Fit, cross_entropy, entropy, fit
from coremerge_jax.search.methods import METHODS, Method, grid, line, random
from coremerge_jax.search.parameters import configure, parameters
from coremerge_jax.search.sweeping import Record, Sweep, sweep

__all__ = [
    "METHODS",
    "Fit",
    "Method",
    "Record",
    "Sweep",
    "configure",
    "cross_entropy",
    "entropy",
    "fit",
    "grid",
    "line",
    "parameters",
    "random",
    "sweep",
]
