"""Many merges in one batch: a base layer, plus the merge that each request asks for.

Compiled merges of one pack share their factors: each is ``x ↦ B C (A x)`` with a small C of its
own. So a batch whose requests have different merges costs as much as one with a single adapter of
rank R, and a further merge takes the memory of its C. The functions are pure: they can be jitted,
mapped over, sharded, and differentiated with respect to C.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError, hint
from coremerge_jax.linalg import pytree
from coremerge_jax.lora import AdapterSource, Array, widest
from coremerge_jax.merging.compiled import Merge


def apply(
    x: Float[Array, "N *L n"],
    a: Float[Array, "R n"],
    b: Float[Array, "m R"],
    cores: Float[Array, "K R R"],
    requests: Int[Array, " N"],
) -> Float[Array, "N *L m"]:
    """Returns ``B C[request] A x``, what the merge of each request adds to a layer's output.

    Args:
        x: ``(N, ..., n)``, inputs of the layer, by request.
        a: ``(R, n)``, stacked A of the adapters.
        b: ``(m, R)``, stacked B.
        cores: ``(K, R, R)``, the matrices of K merges.
        requests: int ``(N,)``, the merge of each request: 0 to K - 1. A negative number stands for
            none, and one of K or more gives NaN.

    Returns:
        ``(N, ..., m)``, in the dtype of x.
    """
    # Adapters with nearly equal A have large entries in C, so what C multiplies is not rounded.
    wide = widest(np.dtype(np.float32), x.dtype)
    matrices = jnp.asarray(cores)
    chosen = matrices.at[jnp.maximum(requests, 0)].get(mode="fill", fill_value=jnp.nan)
    chosen = jnp.where((requests >= 0)[:, None, None], chosen.astype(wide), 0)
    rows = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    inner = jnp.matmul(rows, a.T.astype(x.dtype), preferred_element_type=wide)
    mixed = jnp.einsum("nlr,nsr->nls", inner, chosen).astype(x.dtype)
    return jnp.matmul(mixed, b.T.astype(x.dtype)).reshape(*x.shape[:-1], len(b))


@pytree
@dataclass(frozen=True)
class Factors:
    """Arrays of one module that `apply` takes.

    Attributes:
        a: ``(R, n)``, stacked A of the adapters.
        b: ``(m, R)``, stacked B.
        cores: ``(K, R, R)``, of the merges.
    """

    a: Array
    b: Array
    cores: Array


def stack(merges: Sequence[Merge], *, dtype: DTypeLike = jnp.float32) -> dict[str, Factors]:
    """Stacks merges of the same adapters, or of some of them, for `apply`.

    Adapters that no merge has are left out: their blocks would be zero.

    Args:
        merges: K of them, at least one. Adapters are told apart by their names.
        dtype: of the factors; cores are in float32, or wider if factors are.

    Returns:
        The arrays of each module, by its path.

    Raises:
        MismatchError: two adapters of one name differ, or a merge has two of one name.
        RecipeError: there is no merge; or an adapter has no name.
        UnsupportedError: a module is not linear.
    """
    if not merges:
        raise RecipeError("merges: got none; expected at least one")
    adapters = _by_name(merges)
    paths = dict.fromkeys(path for merge in merges for path in merge.cores)
    return {path: _stacked(path, merges, adapters, dtype) for path in paths}


def _by_name(merges: Sequence[Merge]) -> dict[str, AdapterSource]:
    """Returns the adapters of all merges, in the order in which they come."""
    found: dict[str, AdapterSource] = {}
    for merge in merges:
        names = [adapter.metadata.name for adapter in merge.adapters]
        for name, adapter in zip(names, merge.adapters, strict=True):
            if not name:
                raise RecipeError("an adapter has no name; pack the adapters, which names them")
            if names.count(name) > 1:
                raise MismatchError(f"two adapters of a merge are named {name!r}; name them anew")
            if not _are_same(found.setdefault(name, adapter), adapter):
                raise MismatchError(f"two adapters are named {name!r}, and differ; name them anew")
    return found


def _are_same(one: AdapterSource, other: AdapterSource) -> bool:
    """Returns True if two adapters have the same modules and factors."""
    if one is other:
        return True
    if one.outline.keys() != other.outline.keys():
        return False
    pairs = ((one[path], other[path]) for path in one)
    return all(np.array_equal(x.a, y.a) and np.array_equal(x.b, y.b) for x, y in pairs)


def _stacked(
    path: str, merges: Sequence[Merge], adapters: Mapping[str, AdapterSource], dtype: DTypeLike
) -> Factors:
    """Returns the arrays of one module."""
    loras = {name: adapter[path] for name, adapter in adapters.items() if path in adapter}
    kinds = {lora.kind.name for lora in loras.values()}
    if kinds != {"linear"}:
        raise UnsupportedError(
            f"module {path!r} is of kind {', '.join(kinds)}; merges are served of linear ones"
        )
    ends = np.cumsum([lora.rank for lora in loras.values()])
    ranks = {
        name: np.arange(end - lora.rank, end)
        for (name, lora), end in zip(loras.items(), ends, strict=True)
    }
    cores = np.zeros((len(merges), ends[-1], ends[-1]), np.float64)
    for core, merge in zip(cores, merges, strict=True):
        if path in merge.cores:
            names = [str(x.metadata.name) for x in merge.adapters if path in x]
            at = np.concatenate([ranks[name] for name in names])
            core[np.ix_(at, at)] = merge.cores[path]
    return Factors(
        a=jnp.concatenate([jnp.asarray(x.a, dtype) for x in loras.values()]),
        b=jnp.concatenate([jnp.asarray(x.b, dtype) for x in loras.values()], axis=1),
        cores=jnp.asarray(cores, widest(np.dtype(np.float32), jnp.dtype(dtype))),
    )


class Request(nnx.Variable):
    """The merge of each request in a batch, int ``(N,)``; negative for none."""


class Core(nnx.Variable):
    """The matrices of merges between the stacked factors of a module, ``(K, R, R)``."""


class Stacked(nnx.Variable):
    """Stacked factors of a module."""


class Merged(nnx.Module):
    """A layer with merges: its output, plus that of the merge of each request.

    Args:
        base: the layer.
        factors: of the merges.
        requests: shared by all layers of a model.
    """

    def __init__(self, base: nnx.Module, factors: Factors, requests: Request) -> None:
        self.base, self.requests = base, requests
        self.a, self.b = Stacked(factors.a), Stacked(factors.b)
        self.cores = Core(factors.cores)

    def __call__(self, x: jax.Array, *more: Any, **options: Any) -> jax.Array:
        """Returns the output of the layer; axes of inputs and outputs may be several."""
        y = self.base(x, *more, **options)
        a, b = self.a[...], self.b[...]
        lead = _leading(x.shape, a.shape[1])
        _check_axes(self.base, x.ndim, x.ndim - len(lead))
        if y.size != math.prod(lead) * len(b):
            raise MismatchError(f"outputs of shape {y.shape} for adapters of {len(b)} outputs")
        rows = x.reshape(*lead, a.shape[1])
        found = apply(rows, a, b, self.cores[...], self.requests[...])
        return y + found.reshape(y.shape).astype(y.dtype)


def _check_axes(layer: nnx.Module, ndim: int, count: int) -> None:
    """Refuses a layer whose inputs are not along the last axes."""
    axis = getattr(layer, "axis", range(-count, 0))
    found = {one % ndim for one in (axis if isinstance(axis, Sequence) else (axis,))}
    if found != set(range(ndim - count, ndim)):
        raise MismatchError(
            f"a layer with inputs along axes {axis}; merges are served of the last axes only"
        )


def _leading(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Returns the axes in front of the last ones, whose product is a size."""
    for count in range(1, len(shape)):
        if math.prod(shape[-count:]) == size:
            return shape[:-count]
    raise MismatchError(f"inputs of shape {shape} for adapters of {size} inputs")


def attach(model: nnx.Module, merges: Mapping[str, Factors], requests: Int[Array, " N"]) -> Request:
    """Puts merges into an NNX model.

    Args:
        model: its layers with adapters are replaced by `Merged`.
        merges: what `stack` returns, by paths as `from_nnx` gives them.
        requests: int ``(N,)``, as in `apply`.

    Returns:
        The variable with the requests, which all these layers share. Set it for each batch:
        ``found[...] = requests``.

    Raises:
        MismatchError: the model has no layer of a path, or has it in a plain dict, list or tuple.
    """
    layers = {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    }
    for path in merges:
        if path not in layers:
            raise MismatchError(f"the model has no layer {path!r}{hint(path, layers)}")
    there = [(x, parent, name) for parent in layers.values() for name, x in vars(parent).items()]
    places = {path: [(y, name) for x, y, name in there if x is layers[path]] for path in merges}
    for path, found in places.items():
        if not found:
            raise MismatchError(
                f"layer {path!r} is the model itself, or in a plain dict, list or tuple, where it "
                "cannot be replaced; use nnx.Dict or nnx.List"
            )
    shared = Request(jnp.asarray(requests))
    for path, factors in merges.items():
        merged = Merged(layers[path], factors, shared)
        for parent, name in places[path]:  # several, if the layer is shared
            if isinstance(parent, nnx.List):
                parent[int(name)] = merged
            else:
                setattr(parent, name, merged)
    return shared
