"""The report: its plots, how to read them, and what stands out. Needs the plot extra."""

import dataclasses
from collections.abc import Iterator, Sequence
from importlib import resources

import numpy as np

from coremerge_jax import __version__
from coremerge_jax.diagnosis import plots
from coremerge_jax.diagnosis.places import arrange
from coremerge_jax.diagnosis.plots import Scale, around
from coremerge_jax.diagnosis.results import Diagnosis
from coremerge_jax.errors import UnsupportedError

try:
    import jinja2
except ImportError as error:
    raise UnsupportedError("reports need jinja2: pip install 'coremerge-jax[plot]'") from error


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with what is said of it.

    Attributes:
        title: what it shows.
        svg: the image.
        reading: how to read it, in a sentence.
        finding: what stands out in it.
    """

    title: str
    svg: str
    reading: str
    finding: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers that matter one by one; all columns but the first."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    reading: str = ""
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """Plots, and tables, that belong together."""

    title: str
    items: Sequence[Plot | Table]


def render(diagnosis: Diagnosis) -> str:
    """The page as HTML text."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        diagnosis=diagnosis,
        version=__version__,
        facts=list(_facts(diagnosis)),
        adapters=_adapters(diagnosis),
        sections=[section for section in _sections(diagnosis) if section.items],
        is_table=lambda item: isinstance(item, Table),
    )


def _sections(diagnosis: Diagnosis) -> Iterator[Section]:
    yield Section("Spectra", list(_spectra(diagnosis)))
    yield Section("How the adapters relate", list(_relations(diagnosis)))
    yield Section("What the merge has of each adapter", list(_merge(diagnosis)))
    yield Section("Module by module", list(_maps(diagnosis)))
    yield Section("What a merge costs", list(_costs(diagnosis)))


# --- The top -------------------------------------------------------------------------------


def _facts(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """The main numbers, and what they are."""
    several = len(diagnosis.adapters) > 1
    yield f"{len(diagnosis.adapters)}", "adapters" if several else "adapter"
    yield f"{len(diagnosis)}", "modules" if len(diagnosis) > 1 else "module"
    if several:
        found = _off_diagonal(diagnosis.pairs("outputs"))
        yield f"{_mean(found):.2f}", f"mean overlap ({_chance(diagnosis):.2f} by chance)"
        yield f"{_mean(_off_diagonal(diagnosis.pairs('conflict'))):.0%}", "sign conflict"
    update = "merged" if diagnosis.merged else "total"
    what = "the merge" if diagnosis.merged else "the sum"
    yield f"{diagnosis.rank_for(0.9, update)}", f"rank for 90% of {what}"
    if diagnosis.merged:
        yield f"{_mean(diagnosis.totals()['kept']):.0%}", "of each adapter kept, on average"


def _adapters(diagnosis: Diagnosis) -> Table:
    norms = np.sqrt(np.nansum(diagnosis.by_adapter("norms") ** 2, axis=0))
    totals = diagnosis.totals()
    overlap, outvoted = _others(diagnosis.pairs("outputs")), _weighted_mean(diagnosis, "outvoted")
    columns = ["adapter", "modules", "rank", "‖ΔW‖"]
    columns += ["kept", "aligned"] if totals else []
    columns += ["overlap", "outvoted"] if len(norms) > 1 else []
    rows = []
    for t, name in enumerate(diagnosis.adapters):
        own = [x for x in diagnosis if t in x.adapters]
        ranks = [x.ranks[x.adapters.index(t)] for x in own]
        row = [name, f"{len(own)}", _range(ranks), f"{norms[t]:.3g}"]
        if totals:
            row += [f"{totals['kept'][t]:.0%}", f"{totals['alignment'][t]:.0%}"]
        if len(norms) > 1:
            row += [f"{overlap[t]:.2f}", f"{outvoted[t]:.0%}"]
        rows.append(row)
    reading = "Rank: of the factors."
    if totals:
        reading += " Kept: see below. Aligned: the share of an adapter's norm within the output "
        reading += "directions that make up the merge (subspace alignment ratio)."
    return Table(f"{len(norms)} adapters", columns, rows, reading)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}–{high}"


# --- Sections ------------------------------------------------------------------------------


def _spectra(diagnosis: Diagnosis) -> Iterator[Plot]:
    yield Plot(
        "Stacks of all adapters",
        plots.stacks(diagnosis),
        "Singular values of all B side by side and of all A below each other, largest = 1; bands "
        "hold 8 of 10 modules. The faster a line falls, the more directions the adapters share.",
        _fullness(diagnosis),
    )
    yield Plot(
        "Updates of the adapters",
        plots.updates(diagnosis),
        "Singular values of each ΔW (those of its core), largest = 1, in the middle of all "
        "modules. A line that falls fast belongs to an adapter of fewer effective ranks.",
        _effective_rank(diagnosis),
    )
    what = "the merged update and of the sum" if diagnosis.merged else "the sum"
    yield Plot(
        "Energy within a rank",
        plots.energy(diagnosis),
        f"Share of ‖ΔW‖² of {what} that is left when every module is cut to a rank (--rank). "
        "Dots: 90% and 99%.",
        _energy_finding(diagnosis),
    )


def _fullness(diagnosis: Diagnosis) -> str:
    stacks = [np.asarray(module.measures.spectra.stack_b) for module in diagnosis]
    ranks, used, most = (
        np.median(x)
        for x in (
            [sum(module.ranks) for module in diagnosis],
            [np.count_nonzero(s) for s in stacks],
            [_count_for(s, 0.9) for s in stacks],
        )
    )
    return (
        f"The ranks add up to {ranks:.0f}; B spans {used:.0f} directions, and {most:.0f} hold 90% "
        "of its energy."
    )


def _count_for(s: np.ndarray, share: float) -> int:
    kept = np.cumsum(s**2)
    return int(np.searchsorted(kept, share * kept[-1])) + 1 if kept[-1] > 0 else 0


def _effective_rank(diagnosis: Diagnosis) -> str:
    """Who needs most and fewest directions for 90% of its energy."""
    needed: list[list[int]] = [[] for _ in diagnosis.adapters]
    for module in diagnosis:
        for t, s in zip(module.adapters, module.measures.spectra.updates, strict=True):
            needed[t].append(_count_for(s, 0.9))
    means = np.asarray([np.mean(x) for x in needed])
    text = [f"{diagnosis.adapters[t]} ({means[t]:.1f})" for t in (means.argmin(), means.argmax())]
    if len(means) == 1:
        return f"Directions for 90% of the energy: {means[0]:.1f} on average."
    return f"Directions for 90% of the energy: fewest in {text[0]}, most in {text[1]}."


def _energy_finding(diagnosis: Diagnosis) -> str:
    update = "merged" if diagnosis.merged else "total"
    full = len(diagnosis.energy_kept(update))
    ranks = [diagnosis.rank_for(share, update) for share in (0.9, 0.99)]
    return f"Of {full} directions, {ranks[0]} keep 90% and {ranks[1]} keep 99%."


def _relations(diagnosis: Diagnosis) -> Iterator[Plot | Table]:
    names = diagnosis.adapters
    if len(names) < 2:
        return
    for field, what, reads in (
        ("outputs", "Overlap of outputs", "write to (column spaces)"),
        ("inputs", "Overlap of inputs", "read from (row spaces)"),
    ):
        values, chance = diagnosis.pairs(field), _chance(diagnosis, field)
        highest = _above_chance(diagnosis, _off_diagonal(values), field)
        yield Plot(
            what,
            plots.pairs(names, values, Scale("viridis", 0.0, highest)),
            f"Mean cos² of the angles between what two adapters {reads}: 1 the same space, 0 "
            "orthogonal. Adapters far above chance share directions, and can help or disturb "
            "each other.",
            f"{_pair('Highest', names, values)} By chance: {chance:.2f}.",
        )
    cosine = diagnosis.pairs("cosine")
    yield Plot(
        "Cosine of updates",
        plots.pairs(names, cosine, around(0.0, _off_diagonal(cosine))),
        "1: both want the same change; 0: unrelated; −1: opposite. Below 0, adapters undo each "
        "other in a sum.",
        f"{_pair('Highest', names, cosine)} {_pair('Lowest', names, cosine, -1)}",
    )
    conflict = diagnosis.pairs("conflict")
    yield Plot(
        "Sign conflict",
        plots.pairs(names, conflict, around(0.5, _off_diagonal(conflict))),
        "Share of two adapters' common weight at core entries where their signs differ: 0.5 is "
        "what unrelated adapters have, more is worse. Rules that elect signs (ties) act on this.",
        f"{_pair('Highest', names, conflict)} {_pair('Lowest', names, conflict, -1)}",
    )
    outvoted = _weighted_mean(diagnosis, "outvoted")
    yield Plot(
        "Outvoted",
        plots.bars(names, outvoted),
        "Share of an adapter's energy at core entries where its sign is not that of the sum: "
        "what an election of signs would drop of it.",
        _highest("Most outvoted", names, outvoted),
    )
    yield _closest(diagnosis)


def _closest(diagnosis: Diagnosis) -> Table:
    outputs, inputs, cosine, conflict = (
        diagnosis.pairs(x) for x in ("outputs", "inputs", "cosine", "conflict")
    )
    rows, columns = np.triu_indices(len(outputs), 1)
    order = np.argsort(-np.nan_to_num(outputs[rows, columns], nan=-1), kind="stable")[:10]
    shown = []
    for i, j in zip(rows[order], columns[order], strict=True):
        names = " and ".join(plots.clip(diagnosis.adapters[t]) for t in (i, j))
        numbers = (x[i, j] for x in (outputs, inputs, cosine, conflict))
        shown.append([names, *map(_two, numbers)])
    return Table(
        "Closest pairs",
        ["pair", "outputs", "inputs", "cosine", "conflict"],
        shown,
        "By overlap of outputs; means over the modules that both have.",
    )


def _merge(diagnosis: Diagnosis) -> Iterator[Plot]:
    totals, names = diagnosis.totals(), diagnosis.adapters
    if not totals:
        return
    yield Plot(
        "Kept of each adapter",
        plots.bars(names, totals["kept"], 1.0),
        "⟨ΔWₜ, ΔW⟩ / ‖ΔWₜ‖²: 1 (dashed) means that the merge moves along the adapter as far as "
        "the adapter alone, 0 that nothing of it is left, below 0 that it is undone.",
        _extremes("Least kept", "most", names, totals["kept"]),
    )
    rest = float(totals["unexplained"])
    yield Plot(
        "Share of the merged update",
        plots.bars([*names, "no adapter"], np.append(totals["share"], rest)),
        "Shares of ‖ΔW‖² that the best weighted sum of the adapters explains. No adapter: what the "
        "rule adds beyond any weighted sum, such as by equal singular values or elected signs.",
        f"A weighted sum explains {1 - rest:.0%} of the merged update.",
    )
    yield Plot(
        "Spectrum of the merge",
        plots.results(diagnosis),
        "Singular values of the merged update and of the sum of all adapters, largest = 1. Flat: "
        "all directions count alike (isotropize); steep: a few dominate.",
    )
    kept = diagnosis.by_adapter("kept")
    yield Plot(
        "Kept by layer",
        plots.depth(diagnosis, kept, Scale("viridis", min(0.0, float(np.nanmin(kept))))),
        "The same as the bars, by layer. An adapter that loses its early or late layers alone may "
        "be helped by scales for some modules.",
        _layers(diagnosis, kept),
    )
    size = _relative_size(diagnosis)
    yield Plot(
        "Size of the merge",
        plots.modules(diagnosis, size, Scale("viridis")),
        "‖ΔW‖ of each merged module, relative to the root mean square over its adapters. Far from "
        "1, try another scale (--scale).",
        f"Mean over the modules: {_mean(size):.2f}.",
    )
    missing = _of_merged(diagnosis, "unexplained")
    yield Plot(
        "Beyond a weighted sum",
        plots.modules(diagnosis, missing, Scale("viridis", 0.0, 1.0)),
        "Share of each merged module that no weighted sum of the adapters explains: where the rule "
        "changes most.",
        _module_extreme(diagnosis, missing),
    )


def _maps(diagnosis: Diagnosis) -> Iterator[Plot]:
    norms = np.sqrt(_row_means(diagnosis.by_adapter("norms") ** 2))
    yield Plot(
        "Size of updates",
        plots.modules(diagnosis, norms, Scale("viridis", form="#.2g")),
        "‖ΔW‖ of each module, root mean square over the adapters. Where it is large, training has "
        "changed most.",
        _module_extreme(diagnosis, norms),
    )
    if len(diagnosis.adapters) < 2:
        return
    overlap = diagnosis.pair_means("outputs")
    if not np.isnan(overlap).all():
        yield Plot(
            "Overlap of outputs by module",
            plots.modules(
                diagnosis, overlap, Scale("viridis", 0.0, _above_chance(diagnosis, overlap))
            ),
            "Mean over all pairs of adapters. Bright modules are shared ground: there, the choice "
            "of the rule matters most.",
            _module_extreme(diagnosis, overlap),
        )
        conflict = diagnosis.pair_means("conflict")
        yield Plot(
            "Sign conflict by module",
            plots.modules(diagnosis, conflict, around(0.5, conflict)),
            "Mean over all pairs of adapters, 0.5 if signs are unrelated. Lower, adapters agree "
            "and may be summed; higher, they undo each other.",
            _module_extreme(diagnosis, conflict),
        )


def _costs(diagnosis: Diagnosis) -> Iterator[Plot | Table]:
    costs = diagnosis.costs
    dearest = max(costs, key=lambda one: one.products + one.core)
    yield Plot(
        "Operations of each rule",
        plots.costs(costs),
        "Floating-point operations of a merge in core space, from shapes alone. Rules that are "
        "steps are merged with a sum.",
        f"Most: {dearest.rule}, {(dearest.products + dearest.core) / 1e9:.3g} billion.",
    )
    timed = costs[0].seconds is not None
    rows = [
        [
            one.rule,
            f"{one.products / 1e9:.3g}",
            f"{one.core / 1e9:.3g}",
            f"{one.memory / 2**20:.0f}",
            *([f"{one.seconds:.2g}"] if one.seconds is not None else []),
        ]
        for one in costs
    ]
    reading = "MiB: while the largest module is merged."
    if timed:
        reading += (
            " Seconds: expected on this machine, reading and writing included, compiling not."
        )
    columns = ["rule", "products, 10⁹", "other, 10⁹", "MiB", *(["seconds"] if timed else [])]
    yield Table("Cost of each rule", columns, rows, reading, wide=True)


# --- What stands out -----------------------------------------------------------------------


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), 1)]


def _mean(values: np.ndarray) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else 0.0


def _row_means(values: np.ndarray) -> np.ndarray:
    return np.nansum(values, axis=1) / np.maximum(np.sum(~np.isnan(values), axis=1), 1)


def _weighted_mean(diagnosis: Diagnosis, name: str) -> np.ndarray:
    """The mean over modules by their energy, for each adapter."""
    values, energy = diagnosis.by_adapter(name), diagnosis.by_adapter("norms") ** 2
    total = np.nansum(energy, axis=0)
    return np.nansum(values * energy, axis=0) / np.where(total > 0, total, 1)


def _relative_size(diagnosis: Diagnosis) -> np.ndarray:
    """Of each merged module, NaN where there is none or the adapters' updates are 0."""
    found = _of_merged(diagnosis, "norm")
    norms = np.sqrt(_row_means(diagnosis.by_adapter("norms") ** 2))
    return np.where(norms > 0, found / np.where(norms > 0, norms, 1), np.nan)


def _above_chance(diagnosis: Diagnosis, overlap: np.ndarray, field: str = "outputs") -> float:
    """The end of a scale on which what is no more than chance looks low."""
    return max(float(np.nan_to_num(overlap).max()), 3 * _chance(diagnosis, field))


def _of_merged(diagnosis: Diagnosis, name: str) -> np.ndarray:
    """A number of each merged module, NaN where there is none."""
    parts = [module.measures.contribution for module in diagnosis]
    return np.asarray([np.nan if part is None else float(getattr(part, name)) for part in parts])


def _chance(diagnosis: Diagnosis, field: str = "outputs") -> float:
    """The mean overlap of random spaces of these ranks."""
    axis = 0 if field == "outputs" else 1
    means = []
    for module in diagnosis:
        ranks = np.count_nonzero(module.measures.spectra.updates, axis=1)
        if len(ranks) > 1:
            larger = np.maximum(ranks[:, None], ranks[None, :])
            means.append(_off_diagonal(larger).mean() / module.shape[axis])
    return float(np.mean(means)) if means else 0.0


def _pair(what: str, names: Sequence[str], matrix: np.ndarray, sign: int = 1) -> str:
    """The two adapters with the highest number, or the lowest."""
    rows, columns = np.triu_indices(len(matrix), 1)
    values = matrix[rows, columns]
    if np.isnan(values).all():
        return "No two adapters have a module in common."
    best = int(np.nanargmax(sign * values))
    return f"{what}: {names[rows[best]]} and {names[columns[best]]} ({_two(values[best])})."


def _two(value: float) -> str:
    """Two digits, and no sign of zero."""
    return "–" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"


def _others(matrix: np.ndarray) -> np.ndarray:
    """The mean of each row, but for the diagonal."""
    shown = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
    return _row_means(shown)


def _highest(what: str, names: Sequence[str], values: np.ndarray) -> str:
    best = int(np.nanargmax(values))
    return f"{what}: {names[best]} ({values[best]:.2f})."


def _extremes(low: str, high: str, names: Sequence[str], values: np.ndarray) -> str:
    least, most = int(np.nanargmin(values)), int(np.nanargmax(values))
    if least == most:
        return ""
    return (
        f"{low}: {names[least]} ({values[least]:.2f}); {high}: {names[most]} ({values[most]:.2f})."
    )


def _module_extreme(diagnosis: Diagnosis, values: np.ndarray) -> str:
    if len(values) < 2 or np.isnan(values).all():
        return ""
    best = int(np.nanargmax(values))
    return f"Highest: {diagnosis.modules[best].path} ({values[best]:.3g})."


def _layers(diagnosis: Diagnosis, kept: np.ndarray) -> str:
    grid = arrange([module.path for module in diagnosis])
    if grid is None:
        return ""
    rows = np.asarray([layer for layer, _ in grid.cells])
    means = np.asarray([_mean(kept[rows == i]) for i in range(len(grid.layers))])
    low, high = means.argmin(), means.argmax()
    return (
        f"Kept least in layer {grid.layers[low]} ({means[low]:.2f}), most in layer "
        f"{grid.layers[high]} ({means[high]:.2f})."
    )
