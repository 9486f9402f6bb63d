"""Splits of examples for training, validation and testing, without common groups."""

import random
from collections import defaultdict
from collections.abc import Iterable

Example = tuple[str, str]
"""A text and its label or answer."""


def split(
    groups: Iterable[list[Example]], rng: random.Random, by_label: bool = True
) -> dict[str, list[Example]]:
    """Returns ``"train"``, ``"validation"`` and ``"test"``, each text once, and groups whole.

    Every third group is for testing, every fifteenth for validation.

    Args:
        groups: of examples that stay together.
        rng: for their order.
        by_label: every third group of each label, instead of all groups.
    """
    kept = _without_repeats(groups)
    rng.shuffle(kept)
    if by_label:
        kept.sort(key=lambda group: group[0][1])
    parts: dict[str, list[Example]] = defaultdict(list)
    for i, group in enumerate(kept):
        name = "test" if i % 3 == 0 else "validation" if i % 15 == 1 else "train"
        parts[name] += group
    return parts


def _without_repeats(groups: Iterable[list[Example]]) -> list[list[Example]]:
    """Keeps each text once, ignoring case and spaces."""
    seen: set[str] = set()
    kept = []
    for group in groups:
        new = []
        for text, label in group:
            text = " ".join(text.split())
            if text and text.lower() not in seen:
                seen.add(text.lower())
                new.append((text, label))
        if new:
            kept.append(new)
    return kept


def even(examples: list[Example], each: int) -> list[Example]:
    """Returns the first examples of each label, so many of each."""
    count: dict[str, int] = defaultdict(int)
    kept = []
    for text, label in examples:
        if count[label] < each:
            count[label] += 1
            kept.append((text, label))
    return kept
