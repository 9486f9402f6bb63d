"""Many merges in one batch: a base layer, plus the merge that each request asks for.

Compiled merges of one pack share their factors: each is ``x ↦ B C (A x)`` with a small C of its
own. So a batch whose requests have different merges costs as much as one with a single adapter of
rank R, and a further merge takes the memory of its C. The functions are pure: they can be jitted,
mapped over, sharded, and differentiated with respect to C.
"""

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError, hint
from coremerge_jax.linalg import pytree
from coremerge_jax.lora import AdapterSource, Array, widest
from coremerge_jax.merging.compiled import Merge
from coremerge_jax.merging.mesh import with_automatic_axes


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
        ``(N, ..., m)``, in the dtype of x. Products are computed in that of the factors if it is
        wider.
    """
    spec = PartitionSpec(*jax.typeof(x).sharding.spec[:-1], None)
    return with_automatic_axes(_apply, x, a, b, cores, requests, spec=spec)


def _apply(x: Array, a: Array, b: Array, cores: Array, requests: Array) -> jax.Array:
    # Adapters with nearly equal factors have large entries in C, of opposite signs. So neither what
    # C multiplies is rounded, nor what it gives.
    factors = widest(a.dtype, b.dtype, x.dtype)
    wide = widest(np.dtype(np.float32), factors)
    product = partial(jnp.einsum, precision="highest", preferred_element_type=wide)
    matrices = jnp.asarray(cores)
    chosen = matrices.at[jnp.maximum(requests, 0)].get(mode="fill", fill_value=jnp.nan)
    chosen = jnp.where((requests >= 0)[:, None, None], chosen.astype(wide), 0)
    rows = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    inner = product("nli,ri->nlr", rows.astype(factors), a.astype(factors))
    mixed = product("nlr,nsr->nls", inner, chosen).astype(factors)
    found = product("nls,os->nlo", mixed, b.astype(factors)).astype(x.dtype)
    return found.reshape(*x.shape[:-1], len(b))


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
        dtype: of the factors; cores are in float32, or wider if factors are. bfloat16 is faster on
            accelerators, and loses digits where the factors of adapters are nearly equal.

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
        if hasattr(self.base, "einsum_str"):
            texts = (one for one in (*more, *options.values()) if isinstance(one, str))
            inputs, count, outputs = _einsum_axes(self.base.einsum_str or next(texts), x.ndim)
        else:
            count = _count_inputs(self.base, x.shape, a.shape[1])
            inputs, outputs = list(range(x.ndim)), list(range(y.ndim))
        x = x.transpose(inputs)
        lead, sizes = x.shape[: x.ndim - count], x.shape[x.ndim - count :]
        if math.prod(sizes) != a.shape[1]:
            raise MismatchError(f"inputs of shape {x.shape} for adapters of {a.shape[1]} inputs")
        if y.size != math.prod(lead) * len(b):
            raise MismatchError(f"outputs of shape {y.shape} for adapters of {len(b)} outputs")
        rows = x.reshape(*lead, a.shape[1])
        found = apply(rows, a, b, self.cores[...], self.requests[...])
        found = found.reshape([y.shape[axis] for axis in outputs]).transpose(np.argsort(outputs))
        return y + found.astype(y.dtype)


def _count_inputs(layer: nnx.Module, shape: tuple[int, ...], size: int) -> int:
    """Returns the number of axes that a layer contracts, the last ones.

    Raises:
        MismatchError: they are others, or have not the size of the adapters' inputs.
    """
    axis = getattr(layer, "axis", None)
    axes = [x for x in (axis if isinstance(axis, Sequence) else [axis]) if isinstance(x, int)]
    if axes:  # else names of a mesh's axes, or none
        last = range(len(shape) - len(axes), len(shape))
        if {one % len(shape) for one in axes} != set(last):
            raise MismatchError(
                f"a layer with inputs along axes {axis}; merges are served of the last axes only"
            )
        return len(axes)
    for count in range(1, len(shape)):
        if math.prod(shape[-count:]) == size:
            return count
    raise MismatchError(f"inputs of shape {shape} for adapters of {size} inputs")


def _einsum_axes(equation: str, ndim: int) -> tuple[list[int], int, list[int]]:
    """Returns the order of axes in which a layer with an equation is a plain one.

    Args:
        equation: of inputs and kernel, as ``"BTD,NDH->BTNH"``.
        ndim: the number of axes of the inputs.

    Returns:
        Axes of the inputs, with the contracted ones last; how many these are; and axes of the
        outputs. Both begin with what is neither contracted nor made, and go on as the kernel does.

    Raises:
        MismatchError: the equation is no such product, or requests are not along the first axis.
    """
    text = equation.replace(" ", "")
    spare = [x for x in string.ascii_letters if x not in text][: max(ndim - text.find(",") + 3, 0)]
    x, kernel, y = [*re.split(",|->", text.replace("...", "".join(spare))), "", ""][:3]
    inputs, outputs = ([one for one in kernel if one in place] for place in (x, y))
    lead = [one for one in x if one not in inputs]
    fits = sorted(x) == sorted(lead + inputs) and sorted(y) == sorted(lead + outputs)
    if not fits or sorted(kernel) != sorted(inputs + outputs) or x[0] in inputs:
        raise MismatchError(
            f"a layer with the equation {equation!r}; merges are served of products of a kernel "
            "alone, for requests along the first axis"
        )
    return [x.index(o) for o in lead + inputs], len(inputs), [y.index(o) for o in lead + outputs]


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
