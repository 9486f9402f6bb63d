"""The model's parameters in a tree that holds other trees by the same keys beside them.

An optimizer's moments, gradients and averages have the keys and shapes of the parameters.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

from coremerge_jax.errors import FormatError
from coremerge_jax.trees.layouts import Factor
from coremerge_jax.trees.paths import container, is_numbered


def _names(*patterns: str) -> re.Pattern[str]:
    """Returns the pattern of names, matched in whole and without regard to case."""
    return re.compile("|".join(patterns), re.IGNORECASE)


# The state of an optimizer. Its trees never are the model's, and no module has such a name.
_OPTIMIZER = _names(r"(.*_)?(opt|optim|optimizer|tx)s?_?(states?)|(.*_)?optimizers?|optim")

# The other sorts of trees. Modules can have these names too, so they count only for factors that
# stand in several trees by the same keys.
_SORTS = {
    # What an optimizer, or training code beside one, keeps for each parameter.
    "moments": _names(
        r"opt|mu|nu|trace|(first_|second_)?moments?|momentums?|exp_avg(_sq)?",
        r"v_row|v_col|velocit(y|ies)",
        r"adam(w|ax)?|sgd|lion|lamb|muon|adafactor|adagrad|rmsprop|slots?",
        r"(acc(umulated)?_?)?grad(ient)?s?|inner_states?",
    ),
    # Averages of the model over time: some may want these, but they are not what was trained.
    "average": _names(r"(.*_)?(ema|avg|average|averages|averaged|polyak|swa|shadow)(_.*)?"),
    # Other models: which of them is wanted is not certain, so they are refused beside the model.
    "other": _names(
        r"((.*_)?(teacher|student|target|reference|ref|backup|copy|snapshot|frozen|actor|critic)"
        r"|online|base|orig|original|merged|old|new|init|initial|best|prev|previous|last)"
        r"(_(params|model|state|network|net))?"
    ),
    # The model itself.
    "model": _names(
        r"(train_?|model_?|lora_?|trainable_?)*"
        r"(params|parameters|model|state|variables|lora|weights)(_?[a-z0-9])?"
    ),
}

# Names above the numbers of a chain of transformations, which are no numbers of layers.
_CHAIN = _names(_OPTIMIZER.pattern, r"opt|adam\w*|sgd|lion|inner_states?")

_COUNTERS = ("step", "count", "global_step", "gradient_step", "mini_step")


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place of a factor.

    Attributes:
        key: of the factor.
        sorts: of the trees that it is in, but for the model's.
        root: the path of the tree that is not the model's; of moments, the outermost.
        tail: the module's path in the innermost tree, and the factor.
        inner: the tail, and before it the path above all trees; it is the same in copies.
        trees: names of the trees that it is in.
    """

    key: str
    sorts: frozenset[str]
    root: str
    tail: tuple[str, ...]
    inner: tuple[str, ...]
    trees: tuple[str, ...]

    @property
    def is_parameter(self) -> bool:
        """True if a tree that holds it is called parameters."""
        return any("param" in name.lower() for name in self.trees)


def other_trees(factors: Mapping[str, Factor], keys: Collection[str]) -> set[str]:
    """Returns the keys of a tree that are an optimizer's, or belong to an average of the model.

    Args:
        factors: the LoRA factors by key.
        keys: all keys of the tree.

    Raises:
        FormatError: several trees have the same factors, and which is the model's is not certain;
            or all factors belong to an optimizer.
    """
    places = [_place(key, factor) for key, factor in factors.items()]
    roots = {place.root for place in places if "optimizer" in place.sorts}
    groups: dict[tuple[str, ...], list[_Place]] = {}
    for place in places:
        groups.setdefault(place.inner, []).append(place)
    for group in groups.values():
        group = [place for place in group if "optimizer" not in place.sorts]
        if len(group) > 1:
            model = _model(group)
            roots |= {place.root for place in group if place is not model}
    kept = [place for place in places if not _is_below(place.key, roots)]
    if places and not kept:
        raise FormatError(
            f"{places[0].key!r} belongs to an optimizer's state, and so do all LoRA factors; give "
            "the model's parameters"
        )
    _refuse_unknown_copies(kept)
    found = {
        key for key in keys if _is_below(key, roots) or "optimizer" in _sorts(key.split("/"))[:-1]
    }
    # What else a train state holds beside its parameters, such as counters, is not the model's.
    train_state = bool(found) or {"step", "opt_state"} & {key.split("/")[0] for key in keys}
    if train_state and any(place.key.startswith("params/") for place in kept):
        found |= {key for key in keys if not key.startswith("params/")}
    if found:
        found |= {key for key in keys if key.rpartition("/")[2] in _COUNTERS}
    return found


def _place(key: str, factor: Factor) -> _Place:
    parts = factor.module.split("/")
    sorts = _sorts(parts)
    # Names of trees are above all numbers and lists of layers, and a module's own name is none.
    end = next((i for i, part in enumerate(parts) if _is_inside(parts[:i], part)), len(parts) - 1)
    first = next((i for i in range(end) if sorts[i]), end)
    last = first
    while last < end and (sorts[last] or parts[last].isdigit()):
        last += 1
    found = {sort for sort in sorts[first:last] if sort}
    if "optimizer" in sorts:
        found.add("optimizer")
    if "optimizer" in found:
        depth = max(i for i, sort in enumerate(sorts) if sort == "optimizer") + 1
    else:
        depth = next((i + 1 for i in range(first, last) if sorts[i] not in ("model", None)), last)
    return _Place(
        key,
        frozenset(found - {"model"}),
        "/".join(parts[:depth]),
        (*parts[last:], factor.param, factor.factor),
        (*parts[:first], *parts[last:], factor.param, factor.factor),
        tuple(parts[first:last]),
    )


def _is_inside(above: list[str], part: str) -> bool:
    """Returns True if a part of a path is certainly inside the model."""
    if part.isdigit():  # else a place in a chain of transformations
        names = [name for name in above if not name.isdigit()]
        return bool(names) and not _CHAIN.fullmatch(names[-1])
    return container(part) is not None or is_numbered(part)


def _sorts(parts: Sequence[str]) -> list[str | None]:
    """Returns the sort of tree that each part of a path names; None for a module's name."""
    sorts = []
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if _OPTIMIZER.fullmatch(part):
            # Optimizers of flax before 0.11 hold the model itself.
            sort: str | None = "model" if following == "model" else "optimizer"
        else:
            sort = next((sort for sort, names in _SORTS.items() if names.fullmatch(part)), None)
        sorts.append(sort)
    return sorts


def _model(group: list[_Place]) -> _Place:
    """Returns the place in the model, of several with the same factor.

    Raises:
        FormatError: it is not certain.
    """
    models = [place for place in group if not place.sorts]
    named = len(models) == 1 and models[0].trees
    if not named or any("other" in place.sorts for place in group):
        raise _uncertain(*(models + [place for place in group if place not in models])[:2])
    return models[0]


def _refuse_unknown_copies(places: list[_Place]) -> None:
    """Refuses factors that may be copies: in trees of unknown names, or below other names."""
    params = {place.inner: place for place in places if place.is_parameter and not place.sorts}
    ends = {}
    for place in places:
        numbers = next(i for i, part in enumerate(place.inner) if not part.isdigit())
        starts = range(len(place.inner) - 2 if place.trees else numbers + 1)
        ends.update({place.inner[i:]: place for i in starts if not place.sorts})
    for place in places:
        tails = (place.inner[i:] for i in range(1, len(place.inner) - 2))
        found = next((params[tail] for tail in tails if tail in params), None)
        if found is not None and not place.is_parameter:
            raise _uncertain(found, place)
        if place.sorts and place.tail in ends:
            raise _uncertain(ends[place.tail], place)


def _uncertain(one: _Place, two: _Place) -> FormatError:
    return FormatError(
        f"{one.key!r} and {two.key!r} are one factor in two trees, and which of them is the "
        "model's is not certain; leave the others out with ignore (coremerge convert --ignore "
        f"'{two.root or two.key.split('/')[0]}/*'), or take all of them as modules of one model "
        "with whole (--whole)"
    )


def _is_below(key: str, roots: Collection[str]) -> bool:
    return any(key.startswith(f"{root}/") for root in roots if root)
