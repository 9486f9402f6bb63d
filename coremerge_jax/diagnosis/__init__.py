"""Diagnosis of how adapters relate, and a merge to them: numbers first, then a page.

`measures` has the definitions, `collecting` applies them module by module, and `results` holds and
sums up what they give. `page` shows it, with the figures of `plots` and the words of `findings`.
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
