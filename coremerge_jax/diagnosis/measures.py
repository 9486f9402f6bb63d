"""Measures of the adapters of one module: pure functions of arrays.

All measures are functions of the updates ΔW_t = B_t A_t: how these are split into factors does
not matter. The largest matrices are the stacked factors, one core, and a few rows of all cores.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from coremerge_jax.linalg import (
    accumulate,
    in_range,
    inverse,
    lapack,
    matmul,
    orthonormal_factors,
)
from coremerge_jax.lora import Array, LoRA, widest
from coremerge_jax.rules.rule import side_by_side
from coremerge_jax.spaces import Projection, core

# The leading directions of the merged update leave this error; the value of arXiv 2502.04959.
_ERROR = 0.05

_ROWS = 16  # rows of all cores that are in memory at once


@flax.struct.dataclass
class Spectra:
    """Descending singular values; rounding errors are set to 0.

    Attributes:
        stack_b: ``(p,)``, of [B_1 … B_T], each ΔW_t split evenly: B_tᵀ B_t = A_t A_tᵀ.
        stack_a: ``(q,)``, of [A_1; …; A_T], split likewise.
        updates: ``(T, r)``, of each ΔW_t, which its core has too.
        total: ``(k,)``, of the sum of all ΔW_t.
        merged: of the merged update, if there is one.
    """

    stack_b: Array
    stack_a: Array
    updates: Array
    total: Array
    merged: Array | None = None


@flax.struct.dataclass
class Pairs:
    """Relations of every two adapters, as symmetric matrices ``(T, T)``.

    Attributes:
        outputs: overlap of the column spaces, which they write to: see `overlap`.
        inputs: overlap of the row spaces, which they read from.
        cosine: ⟨ΔW_s, ΔW_t⟩ / (‖ΔW_s‖ ‖ΔW_t‖); 0 where one of them is 0.
        conflict: share of their common weight at entries of opposite sign: see `signs`.
        opposed: share of entries of opposite sign among those where neither is 0.
    """

    outputs: Array
    inputs: Array
    cosine: Array
    conflict: Array
    opposed: Array


@flax.struct.dataclass
class Contribution:
    """Shares of the adapters in a merged update ΔW; see `contribution` and `alignment`.

    Attributes:
        norm: ``()``, ‖ΔW‖.
        kept: ``(T,)``.
        share: ``(T,)``, of the merged update's energy ‖ΔW‖².
        unexplained: ``()``, the share of that energy that no weighted sum of the adapters has.
        alignment: ``(T,)``.
    """

    norm: Array
    kept: Array
    share: Array
    unexplained: Array
    alignment: Array


@flax.struct.dataclass
class Measures:
    """All measures of one module.

    Attributes:
        norms: ``(T,)``, Frobenius norms of the updates.
        spectra: singular values.
        pairs: relations of every two adapters.
        outvoted: ``(T,)``, the share of each adapter's energy at entries of its core whose sign is
            not that of the sum of all cores: what electing signs, as TIES does, would drop.
        contribution: shares of the adapters in the merged update, if there is one.
    """

    norms: Array
    spectra: Spectra
    pairs: Pairs
    outvoted: Array
    contribution: Contribution | None = None


def measure(
    a: jax.Array,
    b: jax.Array,
    merged: LoRA | None = None,
    *,
    ranks: tuple[int, ...],
    dtype: DTypeLike | None = None,
    given: DTypeLike | None = None,
) -> Measures:
    """Measures one module.

    Args:
        a: ``(R, n)``, the A factors of all adapters below each other.
        b: ``(m, R)``, the B factors side by side.
        merged: the merged update, in the whole space.
        ranks: ranks of the adapters, static.
        dtype: dtype to compute in; by default that of the factors.
        given: dtype to whose precision the factors are known; by default that of A.
    """
    dtype, given = dtype or widest(a.dtype, b.dtype), jnp.dtype(given or a.dtype)
    rtol = math.sqrt(len(a)) * float(jnp.finfo(widest(given, jnp.dtype("float32"))).eps)
    projection = core(gauge="balanced").project(a, b, ranks, dtype=dtype, given=given)
    cores = projection.factors
    assert isinstance(cores, LoRA)
    a, b = jnp.asarray(cores.a), jnp.asarray(cores.b)
    left, s, right = _decompose(b, a, rtol)
    inner = inner_products(cores, cores)
    total = matmul(side_by_side(b), a.reshape(-1, a.shape[-1]))
    conflict, opposed, outvoted = signs(cores, total, rtol)
    norms = jnp.sqrt(jnp.diagonal(inner))
    measured = Measures(
        norms=norms,
        spectra=Spectra(
            stack_b=jnp.linalg.norm(side_by_side(b), axis=1),
            stack_a=jnp.linalg.norm(a, axis=(0, 1)),
            updates=s,
            total=_clean(lapack.singular_values(total), rtol),
        ),
        pairs=Pairs(
            outputs=overlap(left),
            inputs=overlap(right),
            cosine=_ratio(inner, jnp.outer(norms, norms)),
            conflict=conflict,
            opposed=opposed,
        ),
        outvoted=outvoted,
    )
    if merged is None:
        return measured
    return _with_merged(measured, projection, inner, merged, rtol)


def _with_merged(
    measured: Measures, projection: Projection, inner: jax.Array, merged: LoRA, rtol: float
) -> Measures:
    cores = projection.factors
    assert isinstance(cores, LoRA)
    ma, mb = (jnp.asarray(x).astype(cores.a.dtype) for x in (merged.a, merged.b))
    left, s, _ = _decompose(mb[None], ma[None], rtol)
    u, v = projection.u, projection.v
    assert u is not None
    assert v is not None
    in_core = LoRA(a=matmul(ma, v)[None], b=matmul(u.T, mb)[None])
    with_merged = inner_products(cores, in_core)[:, 0]
    energy = jnp.sum(s**2)
    kept, share = contribution(inner, with_merged, energy)
    found = Contribution(
        norm=jnp.sqrt(energy),
        kept=kept,
        share=share,
        unexplained=jnp.where(energy > 0, 1 - jnp.sum(share), 0),
        alignment=alignment(cores, matmul(u.T, left[0]), s[0]),
    )
    spectra = dataclasses.replace(measured.spectra, merged=s[0])
    return dataclasses.replace(measured, spectra=spectra, contribution=found)


def overlap(frames: jax.Array) -> jax.Array:
    """Returns ‖P_sᵀ P_t‖²_F / min(r_s, r_t) for every two spaces: the mean cos² of their angles.

    It is 1 if one space is in the other, and 0 if they are orthogonal (or one is {0}); of random
    spaces of equal rank, r / m on average. Equation 4 of the LoRA paper (arXiv 2106.09685, section
    7.2).

    Args:
        frames: ``(T, m, r)``, orthonormal columns P_t, with columns of zeros behind the rank r_t.

    Returns:
        ``(T, T)``.
    """
    columns = side_by_side(frames)
    shared = _by_adapter(matmul(columns.T, columns) ** 2, len(frames), len(frames))
    ranks = jnp.diagonal(shared)
    return _ratio(shared, jnp.minimum(ranks[:, None], ranks[None, :]))


def inner_products(x: LoRA, y: LoRA) -> jax.Array:
    """Returns ⟨X_s, Y_t⟩ = Σ (B_sᵀ B_t) ∘ (A_s A_tᵀ) for stacks of updates, ``(S, T)``."""
    b = matmul(side_by_side(jnp.asarray(x.b)).T, side_by_side(jnp.asarray(y.b)))
    rows = [z.a.reshape(-1, z.a.shape[-1]) for z in (x, y)]
    return _by_adapter(b * matmul(rows[0], rows[1].T), len(x.a), len(y.a))


def signs(cores: LoRA, total: jax.Array, rtol: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares the signs of the adapters' cores, entry by entry.

    Cores are in the coordinates that elementwise rules see, with balanced factors. Entries up to
    ``rtol`` times the norm of the core count as 0.

    Args:
        cores: factors ``(T, p, r)`` and ``(T, r, q)``.
        total: ``(p, q)``, the sum of the cores.
        rtol: see above.

    Returns:
        Conflict ``(T, T)``: for every two adapters, Σ |x_s x_t| over the entries of opposite sign
        as a share of that over all entries; 0.5 if their signs are unrelated. Opposed ``(T, T)``:
        the same for the number of entries. Outvoted ``(T,)``: for each adapter, the share of
        Σ x_t² at entries whose sign is not that of the total.
    """
    b, a = jnp.asarray(cores.b), jnp.asarray(cores.a)
    tasks, p, width = b.shape
    size = min(_ROWS, p)
    blocks = -(-p // size)
    fill = blocks * size - p
    norms = jnp.sqrt(jnp.diagonal(inner_products(cores, cores)))

    def split(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.pad(x, ((0, fill), *[(0, 0)] * (x.ndim - 1))).reshape(blocks, size, *shape)

    def sums(row: tuple[jax.Array, jax.Array]) -> tuple:
        rows, elected = row
        x = matmul(jnp.swapaxes(rows, 0, 1), a)
        x = jnp.where(jnp.abs(x) > rtol * norms[:, None, None], x, 0).reshape(tasks, -1)
        against = jnp.where(x * elected.reshape(1, -1) < 0, x, 0)
        grams = [matmul(y, y.T) for y in (x, jnp.abs(x), jnp.sign(x), jnp.abs(jnp.sign(x)))]
        return *grams, jnp.sum(x**2, axis=1), jnp.sum(against**2, axis=1)

    rows = split(jnp.swapaxes(b, 0, 1), (tasks, width)), split(total, total.shape[1:])
    products, weights, agreeing, entries, energy, against = accumulate(sums, rows)
    conflict, opposed = weights - products, entries - agreeing
    return _ratio(conflict, 2 * weights), _ratio(opposed, 2 * entries), _ratio(against, energy)


def contribution(
    inner: jax.Array, with_merged: jax.Array, energy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the shares of the adapters in a merged update ΔW.

    kept_t = ⟨ΔW_t, ΔW⟩ / ‖ΔW_t‖² is the length of ΔW along ΔW_t: 1 if the adapter is kept in full,
    0 if nothing of it is (the s_i of SVC, arXiv 2602.05536, are the same for each direction).
    share_t = c_t ⟨ΔW_t, ΔW⟩ / ‖ΔW‖², where Σ_t c_t ΔW_t is the weighted sum nearest to ΔW: these
    shares of the energy ‖ΔW‖² add up to that of the weighted sum. If adapters depend linearly on
    each other, the c_t ‖ΔW_t‖ of least norm are taken.

    Args:
        inner: ``(T, T)``, ⟨ΔW_s, ΔW_t⟩.
        with_merged: ``(T,)``, ⟨ΔW_t, ΔW⟩.
        energy: ‖ΔW‖².

    Returns:
        kept and share, ``(T,)`` each.
    """
    norms = jnp.sqrt(jnp.diagonal(inner))
    values, vectors = lapack.eigh(_ratio(inner, jnp.outer(norms, norms)))
    along = with_merged * inverse(norms)
    cutoff = float(jnp.finfo(values.dtype).eps) ** 0.5 * jnp.max(values)
    scaled = matmul(vectors, inverse(values, cutoff) * matmul(vectors.T, along))
    return along * inverse(norms), _ratio(scaled * along, jnp.broadcast_to(energy, along.shape))


def alignment(cores: LoRA, frame: jax.Array, s: jax.Array) -> jax.Array:
    """Returns ‖P Pᵀ ΔW_t‖ / ‖ΔW_t‖, with P the leading left singular vectors of the merged update.

    P has as many as leave an error of at most 5 % of its norm. This is the subspace alignment
    ratio of arXiv 2502.04959.

    Args:
        cores: factors ``(T, p, r)`` and ``(T, r, q)``.
        frame: ``(p, k)``, the left singular vectors, in the basis of the cores.
        s: ``(k,)``, descending.

    Returns:
        ``(T,)``.
    """
    before = jnp.cumsum(s**2) - s**2
    leading = before < (1 - _ERROR**2) * jnp.sum(s**2)
    kept = jnp.where(leading[None, :], frame, 0)
    seen = LoRA(a=cores.a, b=jax.vmap(lambda b: matmul(kept.T, b))(jnp.asarray(cores.b)))
    squares = [jnp.diagonal(inner_products(x, x)) for x in (seen, cores)]
    return jnp.sqrt(_ratio(*squares))


def _decompose(b: jax.Array, a: jax.Array, rtol: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns u, s and v of the products ``(T, p, r) @ (T, r, q)``; rounding noise is set to 0."""
    left, right, inner = orthonormal_factors(b, a)
    u, s, v = jax.vmap(lapack.svd)(inner)
    s = jax.vmap(lambda s: _clean(s, rtol))(s)
    live = (s > 0)[:, None, :]
    return jnp.where(live, matmul(left, u), 0), s, jnp.where(live, matmul(right, v), 0)


def _clean(s: jax.Array, rtol: float) -> jax.Array:
    return jnp.where(in_range(s, rtol), s, 0)


def _by_adapter(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Returns the sums of the blocks of a matrix, ``(rows, columns)``."""
    return jnp.sum(x.reshape(rows, len(x) // rows, columns, -1), axis=(1, 3))


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns ``x / y``, and 0 where ``y`` is 0."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)
