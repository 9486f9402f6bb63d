"""Findings of a diagnosis in words, and the summary numbers behind them."""

from collections.abc import Sequence

import numpy as np

from coremerge_jax.diagnosis.results import Results, arrange, mean_known


# --- Sentences -----------------------------------------------------------------------------
def stack_directions(diagnosis: Results) -> str:
    """Returns the number of directions that the B factors span in the median module."""
    stacks = [np.asarray(module.measures.spectra.stack_b) for module in diagnosis]
    ranks = np.median([sum(module.ranks) for module in diagnosis])
    used = np.median([np.count_nonzero(s) for s in stacks])
    most = np.median([_count_for(s, 0.9) for s in stacks])
    return (
        f"The ranks add up to {ranks:.0f}; B spans {used:.0f} directions, and {most:.0f} hold 90% "
        "of its energy."
    )


def fewest_directions(diagnosis: Results) -> str:
    """Returns the adapters that need most and fewest directions for 90% of their energy."""
    needed: list[list[int]] = [[] for _ in diagnosis.adapters]
    for module in diagnosis:
        for t, s in zip(module.adapters, module.measures.spectra.updates, strict=True):
            needed[t].append(_count_for(s, 0.9))
    means = np.asarray([np.mean(x) for x in needed])
    if len(means) == 1:
        return f"Directions for 90% of the energy: {means[0]:.1f} on average."
    text = [f"{diagnosis.adapters[t]} ({means[t]:.1f})" for t in (means.argmin(), means.argmax())]
    return f"Directions for 90% of the energy: fewest in {text[0]}, most in {text[1]}."


def ranks_needed(diagnosis: Results) -> str:
    """Returns the ranks that keep most of the energy."""
    update = "merged" if diagnosis.merged else "total"
    full = len(diagnosis.energy_kept(update))
    ranks = [diagnosis.rank_for(share, update) for share in (0.9, 0.99)]
    return f"Of {full} directions, {ranks[0]} keep 90% and {ranks[1]} keep 99%."


def first_direction(diagnosis: Results) -> str:
    """Returns the share of the energy in the first direction."""
    merged, total = (diagnosis.energy_kept(update)[0] for update in ("merged", "total"))
    return (
        f"The first direction holds {merged:.0%} of the merge's energy, {total:.0%} of the sum's."
    )


def pair(what: str, names: Sequence[str], matrix: np.ndarray, sign: int = 1) -> str:
    """Returns the two adapters with the highest number; with the lowest for sign -1."""
    rows, columns = np.triu_indices(len(matrix), 1)
    values = matrix[rows, columns]
    if np.isnan(values).all():
        return "No two adapters have a module in common."
    best = int(np.nanargmax(sign * values))
    return f"{what}: {names[rows[best]]} and {names[columns[best]]} ({two_digits(values[best])})."


def pairs(names: Sequence[str], matrix: np.ndarray) -> str:
    """Returns the pairs with the highest and the lowest number."""
    ends = [pair("Highest", names, matrix), pair("Lowest", names, matrix, -1)]
    return " ".join(dict.fromkeys(ends))


def highest(what: str, names: Sequence[str], values: np.ndarray) -> str:
    """Returns the adapter with the highest number."""
    best = int(np.nanargmax(values))
    return f"{what}: {names[best]} ({values[best]:.2f})."


def extremes(low: str, high: str, names: Sequence[str], values: np.ndarray) -> str:
    """Returns the adapters with the lowest and the highest number."""
    least, most = int(np.nanargmin(values)), int(np.nanargmax(values))
    if least == most:
        return ""
    return (
        f"{low}: {names[least]} ({values[least]:.2f}); {high}: {names[most]} ({values[most]:.2f})."
    )


def extreme_module(
    diagnosis: Results, values: np.ndarray, what: str = "Highest", sign: int = 1
) -> str:
    """Returns the module with the highest number; with the lowest for sign -1."""
    if len(values) < 2 or np.isnan(values).all():
        return ""
    best = int(np.nanargmax(sign * values))
    return f"{what}: {diagnosis.modules[best].path} ({values[best]:.3g})."


def layers(diagnosis: Results, kept: np.ndarray) -> str:
    """Returns the layers that keep least and most."""
    grid = arrange([module.path for module in diagnosis])
    if grid is None:
        return ""
    rows = np.asarray(grid.cells)[:, 0]
    means = np.asarray([mean(kept[rows == i]) for i in range(len(grid.layers))])
    low, high = means.argmin(), means.argmax()
    return (
        f"Kept least in layer {grid.layers[low]} ({means[low]:.2f}), most in layer "
        f"{grid.layers[high]} ({means[high]:.2f})."
    )


def two_digits(value: float) -> str:
    """Returns a number with two digits and without a sign of zero; a dash for NaN."""
    return "–" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"


# --- Numbers -------------------------------------------------------------------------------
def _count_for(s: np.ndarray, share: float) -> int:
    kept = np.cumsum(s**2)
    return int(np.searchsorted(kept, share * kept[-1])) + 1 if kept[-1] > 0 else 0


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Returns the numbers of all pairs of different adapters."""
    return matrix[np.triu_indices(len(matrix), 1)]


def mean(values: np.ndarray) -> float:
    """Returns the mean of all values but NaN; 0 if there is none."""
    return float(np.nan_to_num(mean_known(values.ravel())))


def row_means(values: np.ndarray) -> np.ndarray:
    """Returns the mean of all values but NaN in each row; 0 if there is none."""
    return np.nan_to_num(mean_known(values, 1))


def means_with_others(matrix: np.ndarray) -> np.ndarray:
    """Returns the mean of each row without its entry on the diagonal."""
    return row_means(np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix))


def weighted_mean(diagnosis: Results, name: str) -> np.ndarray:
    """Returns the mean over modules, weighted by their energy, for each adapter."""
    values, energy = diagnosis.by_adapter(name), diagnosis.by_adapter("norms") ** 2
    total = np.nansum(energy, axis=0)
    return np.nansum(values * energy, axis=0) / np.where(total > 0, total, 1)


def relative_size(diagnosis: Results) -> np.ndarray:
    """Returns the size of each merged module relative to its adapters, NaN where undefined."""
    norms = np.sqrt(row_means(diagnosis.by_adapter("norms") ** 2))
    return of_merged(diagnosis, "norm") / np.where(norms > 0, norms, np.nan)


def of_merged(diagnosis: Results, name: str) -> np.ndarray:
    """Returns a number of each merged module, NaN where there is none."""
    parts = [module.measures.contribution for module in diagnosis]
    return np.asarray([np.nan if part is None else float(getattr(part, name)) for part in parts])


def above_chance(diagnosis: Results, overlap: np.ndarray, field: str = "outputs") -> float:
    """Returns the end of a color scale on which an overlap by chance looks low."""
    return max(float(np.nan_to_num(overlap).max()), 3 * chance_overlap(diagnosis, field))


def chance_overlap(diagnosis: Results, field: str = "outputs") -> float:
    """Returns the mean overlap of random spaces of these ranks."""
    axis = 0 if field == "outputs" else 1
    means = []
    for module in diagnosis:
        ranks = np.count_nonzero(module.measures.spectra.updates, axis=1)
        if len(ranks) > 1:
            larger = np.maximum(ranks[:, None], ranks[None, :])
            means.append(off_diagonal(larger).mean() / module.shape[axis])
    return float(np.mean(means)) if means else 0.0
