"""Many merges in one batch: a base layer, plus the merge that each request asks for.

Compiled merges of one pack share their factors: each is ``x ↦ B C (A x)`` with a small C of its
own. So a batch whose requests have different merges costs as much as one with a single adapter of
rank R, and a further merge takes the memory of its C. The functions are pure: they can be jitted,
mapped over, sharded, and differentiated with respect to C.
"""

import functools
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
from coremerge_jax.lora import AdapterSource, Array
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
            none.

    Returns:
        ``(N, ..., m)``, in the dtype of x.
    """
    chosen = cores[jnp.maximum(requests, 0)].astype(x.dtype)
    chosen = jnp.where((requests >= 0)[:, None, None], chosen, 0)
    inner = jnp.matmul(x.reshape(len(x), -1, x.shape[-1]), a.T.astype(x.dtype))
    mixed = jnp.einsum("nlr,nsr->nls", inner, chosen)
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
        dtype: of the arrays.

    Returns:
        The arrays of each module, by its path.

    Raises:
        MismatchError: two adapters of one name differ.
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
    for adapter in (x for merge in merges for x in merge.adapters):
        name = adapter.metadata.name
        if not name:
            raise RecipeError("an adapter has no name; pack the adapters, which gives them names")
        if found.setdefault(name, adapter).outline.keys() != adapter.outline.keys():
            raise MismatchError(f"two adapters are named {name!r}, with other modules each")
    return found


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
        cores=jnp.asarray(cores, dtype),
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
        rows = x.reshape(*_leading(x.shape, a.shape[1]), a.shape[1])
        return y + apply(rows, a, b, self.cores[...], self.requests[...]).reshape(y.shape)


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
        MismatchError: the model has no layer of a path.
    """
    layers = {
        ".".join(map(str, path)): (path, node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    }
    for path in merges:
        if path not in layers:
            raise MismatchError(f"the model has no layer {path!r}{hint(path, layers)}")
    shared = Request(jnp.asarray(requests))
    for path, factors in merges.items():
        names, layer = layers[path]
        *parents, last = map(str, names)
        parent: Any = functools.reduce(_child, parents, model)
        merged = Merged(layer, factors, shared)
        if isinstance(parent, nnx.List):
            parent[int(last)] = merged
        else:
            setattr(parent, last, merged)
    return shared


def _child(parent: Any, name: str) -> Any:
    """Returns a part of a module or of a list of modules."""
    return parent[int(name)] if isinstance(parent, nnx.List) else getattr(parent, name)
