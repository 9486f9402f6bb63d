"""Results of a verification: measurements of modules, and findings in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# The kinds of findings and their meanings.
KINDS = {
    "missing-module": "a module of the sources is not in the merge",
    "extra-module": "a module of the merge is in none of the sources",
    "wrong-shape": "a module does not have the shape that it has in the sources",
    "not-finite": "a module cannot be read, as it has NaN or infinite values",
    "zero-effect": "a module's update is zero",
    "factor": "updates are a multiple of what they should be",
    "rounding": "values went through a dtype with fewer digits or a smaller range",
    "left-out": "a source was not merged",
    "weight": "a source was merged with another weight",
    "reverted": "a module is that of one source alone",
    "differs": "a module differs in another way",
    "sensitive": "rounding errors of the merge change a module as much as it differs",
    "extras": "tensors that are not low-rank updates are not those of the sources",
    "changed-source": "a source is not the file that was merged",
    "unmatched-base": "the merge does not fit the base model",
}

_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Finding:
    """A defect of a merge, or a note on it.

    Attributes:
        kind: a key of `KINDS`.
        message: a line with the finding, the expectation and the remedy.
        modules: paths of the modules concerned, if any.
        defect: True if the merge is wrong; False for a note.
    """

    kind: str
    message: str
    modules: tuple[str, ...] = ()
    defect: bool = True

    def __post_init__(self) -> None:
        assert self.kind in KINDS


@dataclasses.dataclass(frozen=True)
class Check:
    """Measurements of a module.

    Attributes:
        norm: ‖F‖, the Frobenius norm of the update in the merge.
        expected: ‖E‖, that of the update merged again.
        error: ‖F - E‖ / ‖E‖, or relative to ‖F‖ if E is zero. If the merge was cut to a rank, the
            distance to the nearest of the best cuts.
        tolerance: the largest error that rounding explains.
        losses: by dtype, the error of writing the merge in it; None if it overflows.
    """

    norm: float
    expected: float
    error: float
    tolerance: float
    losses: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Verification:
    """Result of `verify`.

    Attributes:
        modules: measurements by path, of all modules that could be compared.
        findings: defects, then notes.
        sources: names of the sources, in the order of the recipe.
        recipe: the recipe that was merged again.
        dtype: dtype of the merge that was verified.
    """

    modules: Mapping[str, Check]
    findings: tuple[Finding, ...]
    sources: tuple[str, ...]
    recipe: Mapping[str, Any]
    dtype: str

    @property
    def ok(self) -> bool:
        """True if there is no defect."""
        return not self.defects

    @property
    def defects(self) -> list[Finding]:
        """The findings by which the merge is wrong."""
        return [finding for finding in self.findings if finding.defect]

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as JSON-like data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def some(names: Sequence[str]) -> str:
    """Returns the first few names, for a message."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
