"""Diagnosis of how adapters relate to each other and a merge to them.

`measures` has the definitions, `diagnose` applies them module by module, and `results` holds and
sums up the numbers. `page` shows them, with the figures of `plots` and the words of `sentences`.
"""

from coremerge_jax.diagnosis.diagnose import Diagnosis, diagnose
from coremerge_jax.diagnosis.measures import (
    Contribution,
    Measures,
    Pairs,
    Spectra,
    alignment,
    contribution,
    measure,
    overlap,
    signs,
)
from coremerge_jax.diagnosis.results import Module, RuleCost

__all__ = [
    "Contribution",
    "Diagnosis",
    "Measures",
    "Module",
    "Pairs",
    "RuleCost",
    "Spectra",
    "alignment",
    "contribution",
    "diagnose",
    "measure",
    "overlap",
    "signs",
]
