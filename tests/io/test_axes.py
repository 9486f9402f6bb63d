"""Axes: stored factors to matrices and back, and how they are found out."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coremerge_jax import FormatError
from coremerge_jax.trees.axes import Axes, find_axes, find_kernel_axes

EVERY = [
    Axes("ri", "or"),  # PEFT
    Axes("ir", "ro"),
    Axes("ir", "roo"),  # attention inputs
    Axes("iir", "ro"),  # attention outputs
    Axes("lir", "lro"),  # scanned, axis 0
    Axes("ilr", "rlo"),  # scanned, axis 1
    Axes("ilr", "rloo"),  # MaxText's serving form
    Axes("lliir", "llroo"),
    Axes("leir", "lero"),  # scanned layers of experts
    Axes("elir", "elro"),  # the same along axis 1
]
SIZES = {"l": (3, 2), "e": (4,), "i": (4, 5), "o": (6, 2), "r": (7,)}


def shape(letters):
    found = {letter: iter(sizes) for letter, sizes in SIZES.items()}
    return tuple(next(found[letter]) for letter in letters)


@pytest.mark.parametrize("axes", EVERY, ids=str)
def test_update_is_that_of_the_stored_factors(axes):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape(letters)) for letters in (axes.a, axes.b))
    # An einsum with a letter of its own for each axis.
    names = iter("abcdefgh")
    inputs = [next(names) for _ in range(axes.a.count("i"))]
    outputs = [next(names) for _ in range(axes.b.count("o"))]
    layers = [next(names) for _ in range(axes.a.count("l"))]
    experts = [next(names) for _ in range(axes.a.count("e"))]

    def letters(stored):
        pools = {"i": inputs, "o": outputs, "l": layers, "e": experts, "r": "r"}
        found = {letter: iter(pool) for letter, pool in pools.items()}
        return "".join(next(found[letter]) for letter in stored)

    spec = f"{letters(axes.b)},{letters(axes.a)}->{''.join(layers + experts + outputs + inputs)}"
    expected = np.einsum(spec, b, a)
    first, second = axes.matrices(a, b)
    assert first.ndim == second.ndim == 3
    np.testing.assert_allclose((second @ first).reshape(expected.shape), expected, rtol=1e-12)


@pytest.mark.parametrize("axes", EVERY, ids=str)
def test_storing_is_the_inverse_also_for_another_rank(axes):
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape(letters)) for letters in (axes.a, axes.b))
    back = axes.stored(*axes.matrices(a, b), a.shape, b.shape)
    np.testing.assert_array_equal(back[0], a)
    np.testing.assert_array_equal(back[1], b)
    (_, _, n), (count, m, _) = (x.shape for x in axes.matrices(a, b))
    wider = np.ones((count, 9, n)), np.ones((count, m, 9))
    stored = axes.stored(*wider, a.shape, b.shape)
    assert axes.rank(*(x.shape for x in stored)) == (9, 9)
    for x, y in zip(axes.matrices(*stored), wider, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("module", "a", "b", "axes"),
    [
        ("layers/0/attn/q_proj", (32, 2), (2, 4, 8), "ir,roo"),
        ("layers/0/attn/o_proj", (4, 8, 2), (2, 32), "iir,ro"),
        ("layers/0/attn/kv_einsum", (32, 2), (2, 2, 2, 8), "ir,rooo"),
        ("layers/0/moe", (3, 16, 2), (3, 2, 6), "lir,lro"),
        ("moe", (3, 16, 2), (2, 6), "iir,ro"),
        ("decoder/layers/self_attention/query", (8, 3, 2), (2, 3, 4, 8), "ilr,rloo"),
        ("decoder/layers/mlp/wi_0", (3, 8, 2), (3, 2, 8), "lir,lro"),
        ("decoder/layers/mlp/wi_0", (3, 8, 3), (3, 3, 8), "lir,lro"),  # as many layers as ranks
        ("decoder/layers_3/mlp/wi_0", (8, 2), (2, 8), "ir,ro"),
        # MaxText's scans over blocks of a few layers, each of which has a number.
        ("decoder/layers/layers_0/self_attention/query", (16, 3, 4), (4, 3, 32), "ilr,rlo"),
        ("decoder/layers/layers/0/self_attention/query", (16, 3, 4), (4, 3, 32), "ilr,rlo"),
        ("decoder/scanned_blocks/layers_0/mlp/wi_0", (16, 3, 4), (4, 3, 32), "ilr,rlo"),
        ("decoder/layers/layers_0/self_attention/query", (3, 16, 4), (3, 4, 32), "lir,lro"),
        ("decoder/layers/layers_0/self_attention/query", (16, 3, 4), (4, 3, 2, 8), "ilr,rloo"),
        ("decoder/layers/layers_0/self_attention/out", (2, 3, 8, 4), (4, 3, 16), "ilir,rlo"),
        ("decoder/layers/layers_0/self_attention/query", (16, 4), (4, 32), "ir,ro"),
        ("decoder/moe_layers/self_attention/query", (16, 3, 4), (4, 3, 32), "ilr,rlo"),
    ],
)
def test_axes_that_shapes_and_names_show(module, a, b, axes):
    found = find_axes(module, a, b, "auto")
    assert f"{found.a},{found.b}" == axes


@pytest.mark.parametrize("module", ["layers/0/dense", "decoder/stack/layers_0/dense", "dense"])
def test_what_may_be_one_module_or_a_stack_is_asked_for(module):
    """A number does not show that nothing is scanned above it."""
    shapes = (8, 3, 2), (2, 3, 8)
    with pytest.raises(FormatError, match=r"several ways .*iir,roo or ilr,rlo.*--scan-axis"):
        find_axes(module, *shapes, "auto")
    assert find_axes(module, *shapes, None) == Axes("iir", "roo")
    assert find_axes(module, *shapes, 1) == Axes("ilr", "rlo")
    assert find_axes(module, *shapes, "auto", (None,)) == Axes("iir", "roo")
    assert find_axes(module, *shapes, "auto", (0, 1)) == Axes("ilr", "rlo")


def test_what_a_checkpoint_tells_counts_where_shapes_fit_it():
    shapes = (2, 2, 2), (2, 2, 8)
    with pytest.raises(FormatError, match=r"\(lir,lro or ilr,rlo: "):
        find_axes("layers/x", *shapes, "auto", (0, 1))
    assert find_axes("layers/x", *shapes, "auto", (1,)) == Axes("ilr", "rlo")
    assert find_axes("layers/x", (3, 8, 2), (3, 2, 6), "auto", (1,)) == Axes("lir", "lro")


def test_a_scan_axis_that_cannot_be_told_is_asked_for():
    shapes = (2, 2, 2), (2, 2, 8)
    with pytest.raises(FormatError, match=r"several ways .*lir,lro.*--scan-axis"):
        find_axes("decoder/layers/wi", *shapes, "auto")
    for axis, axes in (
        (0, Axes("lir", "lro")),
        (1, Axes("ilr", "rlo")),
        (None, Axes("iir", "roo")),
    ):
        assert find_axes("decoder/layers/wi", *shapes, axis) == axes


def test_layers_of_experts_are_asked_for():
    """Where these are stacked does not show, nor do experts if there are as many as ranks."""
    shapes = (3, 2, 16, 2), (3, 2, 2, 6)
    with pytest.raises(FormatError, match=r"\(liir,lroo or leir,lero or elir,elro: .*--axes"):
        find_axes("layers/moe", *shapes, "auto")
    assert find_axes("layers/moe", *shapes, 1) == Axes("elir", "elro")
    assert find_axes("layers/moe", (3, 4, 16, 2), (3, 4, 2, 6), 0) == Axes("leir", "lero")
    assert find_axes("moe", (3, 4, 16, 2), (3, 4, 2, 6), "auto") == Axes("leir", "lero")


@pytest.mark.parametrize(
    ("a", "b", "axis"),
    [((8, 2), (3, 8), "auto"), ((8,), (2, 8), "auto"), ((3, 8, 2), (4, 2, 8), 0)],
)
def test_shapes_that_are_not_of_two_factors(a, b, axis):
    with pytest.raises(FormatError, match=r"expected \(inputs, r\) and \(r, outputs\)"):
        find_axes("x", a, b, axis)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_what_is_found_fits(layers, n, m, r, first):
    at = 0 if first else 1
    a, b = [n, r], [r, m]
    a.insert(at, layers)
    b.insert(at, layers)
    axes = find_axes("x/layers/y", tuple(a), tuple(b), at)
    outline = jax.eval_shape(axes.matrices, *(jax.ShapeDtypeStruct(x, np.float32) for x in (a, b)))
    assert [x.shape for x in outline] == [(layers, r, n), (layers, m, r)]


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(2, 4),
    st.sampled_from([None, 0, 1]),
)
def test_kernels_have_their_inputs_first(inputs, outputs, layers, at):
    shape = [*inputs, *outputs]
    if at is not None:
        shape.insert(at, layers)
    sizes = {"i": math.prod(inputs), "o": math.prod(outputs)}
    (found,) = find_kernel_axes("x", tuple(shape), (sizes["o"], sizes["i"]), (), [at])
    if at is not None:
        assert shape.index(layers) <= at or found[at] == "l"
        sizes["l"] = layers
    for letter, size in sizes.items():
        axes = [n for n, x in zip(shape, found, strict=True) if x == letter]
        assert math.prod(axes) == size
    order = [x for n, x in zip(shape, found, strict=True) if n > 1 and x != "l"]
    assert order == sorted(order)
