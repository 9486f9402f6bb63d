"""The report: plots, how to read them, and what stands out. Needs the plot extra."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from importlib import resources

import numpy as np

from coremerge_jax import __version__
from coremerge_jax.diagnosis import plots
from coremerge_jax.diagnosis import sentences as findings
from coremerge_jax.diagnosis.plots import Scale, around
from coremerge_jax.diagnosis.results import Results
from coremerge_jax.errors import UnsupportedError
from coremerge_jax.text import display

_LONG = 1000  # letters of a name or sentence

# Marks a file as a page of ours, which may be replaced.
MARK = b'<meta name="generator" content="coremerge-jax">'
try:
    import jinja2
except ImportError as error:
    raise UnsupportedError("reports need jinja2: pip install 'coremerge-jax[plot]'") from error


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure and its text.

    Attributes:
        title: name of what it shows.
        svg: the image.
        reading: a sentence on how to read it.
        finding: a sentence on what stands out.
    """

    title: str
    svg: str
    reading: str
    finding: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; all columns but the first hold numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    reading: str = ""
    wide: bool = False


def render(diagnosis: Results) -> str:
    """Returns the page as HTML text."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: display(value, _LONG) if type(value) is str else value,
    )
    template = resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        diagnosis=diagnosis,
        mark=MARK.decode(),
        version=__version__,
        facts=list(_facts(diagnosis)),
        adapters=_adapters(diagnosis),
        sections=[(title, list(items(diagnosis))) for title, items in _SECTIONS.items()],
    )


# --- Top of the page ----------------------------------------------------------------------
def _facts(diagnosis: Results) -> Iterator[tuple[str, str]]:
    """Yields the main numbers and their names."""
    several = len(diagnosis.adapters) > 1
    yield f"{len(diagnosis.adapters)}", "adapters" if several else "adapter"
    yield f"{len(diagnosis)}", "modules" if len(diagnosis) > 1 else "module"
    if several:
        overlap, conflict = (
            findings.mean(findings.off_diagonal(diagnosis.pairs(x)))
            for x in ("outputs", "conflict")
        )
        chance = findings.chance_overlap(diagnosis)
        yield f"{overlap:.2f}", f"mean overlap ({chance:.2f} by chance)"
        yield f"{conflict:.0%}", "sign conflict (50% by chance)"
    update = "merged" if diagnosis.merged else "total"
    what = "the merge" if diagnosis.merged else "the sum"
    yield f"{diagnosis.rank_for(0.9, update)}", f"rank for 90% of {what}"
    if diagnosis.merged:
        yield f"{findings.mean(diagnosis.totals()['kept']):.0%}", "of each adapter kept, on average"


def _adapters(diagnosis: Results) -> Table:
    norms = np.sqrt(np.nansum(diagnosis.by_adapter("norms") ** 2, axis=0))
    totals = diagnosis.totals()
    overlap = findings.means_with_others(diagnosis.pairs("outputs"))
    outvoted = findings.weighted_mean(diagnosis, "outvoted")
    columns = ["adapter", "modules", "rank", "‖ΔW‖"]
    columns += ["kept", "aligned"] if totals else []
    columns += ["overlap", "outvoted"] if len(norms) > 1 else []
    rows = []
    for t, name in enumerate(diagnosis.adapters):
        own = [x for x in diagnosis if t in x.adapters]
        ranks = [x.ranks[x.adapters.index(t)] for x in own]
        row = [name, f"{len(own)}", _range(ranks), f"{norms[t]:.2f}"]
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
def _spectra(diagnosis: Results) -> Iterator[Plot | Table]:
    yield Plot(
        "Stacks of all adapters",
        plots.stacks(diagnosis),
        "Singular values of all B side by side and of all A below each other, largest = 1; bands "
        "hold 8 of 10 modules. The faster a line falls, the more directions the adapters share.",
        findings.stack_directions(diagnosis),
    )
    yield Plot(
        "Updates of the adapters",
        plots.updates(diagnosis),
        "Singular values of each ΔW (those of its core), largest = 1, in the middle of all "
        "modules. A line that falls fast belongs to an adapter of fewer effective ranks.",
        findings.fewest_directions(diagnosis),
    )
    what = "the merged update and of the sum" if diagnosis.merged else "the sum"
    yield Plot(
        "Energy within a rank",
        plots.energy(diagnosis),
        f"Share of ‖ΔW‖² of {what} that is left when every module is cut to a rank (--rank). "
        "Dots: 90% and 99%.",
        findings.ranks_needed(diagnosis),
    )


def _relations(diagnosis: Results) -> Iterator[Plot | Table]:
    names = diagnosis.adapters
    if len(names) < 2:
        return
    for field, what, spaces in (
        ("outputs", "Overlap of outputs", "column spaces of two adapters, which they write to"),
        ("inputs", "Overlap of inputs", "row spaces of two adapters, which they read from"),
    ):
        values, chance = diagnosis.pairs(field), findings.chance_overlap(diagnosis, field)
        highest = findings.above_chance(diagnosis, findings.off_diagonal(values), field)
        yield Plot(
            what,
            plots.pairs(names, values, Scale("viridis", 0.0, highest)),
            f"Mean cos² of the angles between the {spaces}: 1 if these are the same, 0 if they "
            "are orthogonal. Adapters far above chance share directions, and can help or disturb "
            "each other.",
            f"{findings.pair('Highest', names, values)} By chance: {chance:.2f}.",
        )
    cosine = diagnosis.pairs("cosine")
    yield Plot(
        "Cosine of updates",
        plots.pairs(names, cosine, around(0.0, findings.off_diagonal(cosine))),
        "1: the same change; 0: unrelated; −1: the opposite. Below 0, adapters undo each other "
        "in a sum.",
        findings.pairs(names, cosine),
    )
    conflict = diagnosis.pairs("conflict")
    yield Plot(
        "Sign conflict",
        plots.pairs(names, conflict, around(0.5, findings.off_diagonal(conflict))),
        "Share of two adapters' common weight at core entries where their signs differ: 0.5 is "
        "what unrelated adapters have, more is worse. Rules that elect signs (ties) act on this.",
        findings.pairs(names, conflict),
    )
    outvoted = findings.weighted_mean(diagnosis, "outvoted")
    yield Plot(
        "Outvoted",
        plots.bars(names, outvoted),
        "Share of an adapter's energy at core entries where its sign is not that of the sum: "
        "what an election of signs would drop of it.",
        findings.highest("Most outvoted", names, outvoted),
    )
    yield _closest(diagnosis)


def _closest(diagnosis: Results) -> Table:
    outputs, inputs, cosine, conflict = (
        diagnosis.pairs(x) for x in ("outputs", "inputs", "cosine", "conflict")
    )
    rows, columns = np.triu_indices(len(outputs), 1)
    order = np.argsort(-np.nan_to_num(outputs[rows, columns], nan=-1), kind="stable")[:10]
    shown = []
    for i, j in zip(rows[order], columns[order], strict=True):
        names = " and ".join(plots.clip(diagnosis.adapters[t]) for t in (i, j))
        numbers = (x[i, j] for x in (outputs, inputs, cosine, conflict))
        shown.append([names, *map(findings.two_digits, numbers)])
    return Table(
        "Closest pairs",
        ["pair", "outputs", "inputs", "cosine", "conflict"],
        shown,
        "By overlap of outputs; means over the modules that both have.",
    )


def _merge(diagnosis: Results) -> Iterator[Plot | Table]:
    totals, names = diagnosis.totals(), diagnosis.adapters
    if not totals:
        return
    yield Plot(
        "Kept of each adapter",
        plots.bars(names, totals["kept"], 1.0),
        "⟨ΔWₜ, ΔW⟩ / ‖ΔWₜ‖²: 1 (dashed) means that the merge moves along the adapter as far as "
        "the adapter alone, 0 that nothing of it is left, below 0 that it is undone.",
        findings.extremes("Least kept", "most", names, totals["kept"]),
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
        findings.first_direction(diagnosis),
    )
    kept = diagnosis.by_adapter("kept")
    yield Plot(
        "Kept by layer",
        plots.depth(diagnosis, kept, Scale("viridis", min(0.0, float(np.nanmin(kept))))),
        "The same as the bars, by layer. An adapter that loses its early or late layers alone may "
        "be helped by scales for some modules.",
        findings.layers(diagnosis, kept),
    )
    size, count = findings.relative_size(diagnosis), len(diagnosis.adapters)
    yield Plot(
        "Size of the merge",
        plots.modules(diagnosis, size, Scale("viridis")),
        "‖ΔW‖ of each merged module, relative to the root mean square over its adapters. If these "
        f"are unrelated, their sum has {count**0.5:.1f} and their mean {count**-0.5:.1f}: far "
        "beyond, try another scale (--scale).",
        f"Mean over the modules: {findings.mean(size):.2f}.",
    )
    missing = findings.of_merged(diagnosis, "unexplained")
    yield Plot(
        "Beyond a weighted sum",
        plots.modules(diagnosis, missing, Scale("viridis", 0.0, 1.0)),
        "Share of each merged module that no weighted sum of the adapters explains: where the rule "
        "changes most.",
        findings.extreme_module(diagnosis, missing),
    )


def _maps(diagnosis: Results) -> Iterator[Plot | Table]:
    norms = np.sqrt(findings.row_means(diagnosis.by_adapter("norms") ** 2))
    yield Plot(
        "Size of updates",
        plots.modules(diagnosis, norms, Scale("viridis", form="#.2g")),
        "‖ΔW‖ of each module, root mean square over the adapters. Where it is large, training has "
        "changed most.",
        findings.extreme_module(diagnosis, norms),
    )
    if len(diagnosis.adapters) < 2:
        return
    overlap = diagnosis.pair_means("outputs")
    if not np.isnan(overlap).all():
        yield Plot(
            "Overlap of outputs by module",
            plots.modules(
                diagnosis, overlap, Scale("viridis", 0.0, findings.above_chance(diagnosis, overlap))
            ),
            "Mean over all pairs of adapters. Bright modules are shared ground: there, the choice "
            "of the rule matters most.",
            findings.extreme_module(diagnosis, overlap),
        )
        conflict = diagnosis.pair_means("conflict")
        yield Plot(
            "Sign conflict by module",
            plots.modules(diagnosis, conflict, around(0.5, conflict)),
            "Mean over all pairs of adapters, 0.5 if signs are unrelated. Lower, adapters agree "
            "and may be summed; higher, they undo each other.",
            findings.extreme_module(diagnosis, conflict, "Lowest", -1),
        )


def _costs(diagnosis: Results) -> Iterator[Plot | Table]:
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
            f"{one.products / 1e9:.2f}",
            f"{one.core / 1e9:.2f}",
            f"{one.memory / 2**20:.0f}",
            *([f"{one.seconds:.2f}"] if one.seconds is not None else []),
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


_SECTIONS: dict[str, Callable[[Results], Iterator[Plot | Table]]] = {
    "Spectra": _spectra,
    "How the adapters relate": _relations,
    "What the merge has of each adapter": _merge,
    "Module by module": _maps,
    "What a merge costs": _costs,
}
