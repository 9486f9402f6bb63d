"""Updates folded into parameters in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import dense, random_adapters

import coremerge_jax as cm


def params(shapes, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {name: {"w": rng.standard_normal(shape).astype(dtype)} for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 6), "oi->io"),
        ((8, 2, 3), "(ab)i->iab"),
        ((2, 4, 6), "o(ab)->abo"),
        ((2, 8, 3), "(ab)i->aib"),  # heads, inputs, size of a head
        ((2, 2, 8, 3), "(abc)i->abic"),  # key and value, heads, inputs, size of a head
    ],
)
@pytest.mark.parametrize("on_device", [False, True])
def test_kernel_plus_update_in_its_own_axes(shape, spec, on_device):
    (adapter,) = random_adapters({"x": (12 if len(shape) == 4 else 6, 8)}, [2], dtype="float32")
    tree = params({"x": shape})
    kernel = tree["x"]["w"]
    folded = cm.fold_tree(jax.tree.map(jnp.asarray, tree) if on_device else tree, adapter)
    left, right = spec.split("->")
    names, sizes = left.replace("(", "").replace(")", ""), dict(zip(right, shape, strict=True))
    update = dense(adapter["x"]).reshape([sizes[letter] for letter in names])
    expected = kernel + np.einsum(f"{names}->{right}", update)
    np.testing.assert_allclose(folded["x"]["w"], expected, rtol=1e-5, atol=1e-5)
    assert isinstance(folded["x"]["w"], jax.Array if on_device else np.ndarray)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers(axis):
    (adapter,) = random_adapters({f"layers.{i}.x": (6, 8) for i in range(3)}, [2], dtype="float32")
    shape = (3, 8, 6) if axis == 0 else (8, 3, 6)
    kernel = params({"x": shape})["x"]["w"]
    folded = cm.fold_tree({"layers": {"x": {"kernel": kernel}}}, adapter)["layers"]["x"]["kernel"]
    update = np.stack([dense(adapter[f"layers.{i}.x"]).T for i in range(3)], axis)
    np.testing.assert_allclose(folded, kernel + update, rtol=1e-5, atol=1e-5)


def test_one_rounding_in_bfloat16():
    (adapter,) = random_adapters({"x": (6, 8)}, [2], dtype="float32")
    tree = params({"x": (8, 6), "norm": (8,)}, dtype=jnp.bfloat16)
    folded = cm.fold_tree(tree, adapter, scale=0.5)
    lora = adapter["x"]
    exact = tree["x"]["w"].astype(np.float32) + ((lora.b * np.float32(0.5)) @ lora.a).T
    np.testing.assert_array_equal(folded["x"]["w"], exact.astype(jnp.bfloat16))
    assert folded["norm"]["w"] is tree["norm"]["w"]


def test_a_state_of_nnx():
    model = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 4, rngs=nnx.Rngs(1)))
    (adapter,) = random_adapters({"layers.0": (6, 8), "layers.1": (4, 6)}, [2], dtype="float32")
    x = jnp.ones((1, 8))
    weights = [
        np.asarray(model.layers[i].kernel[...]) + dense(adapter[f"layers.{i}"]).T for i in (0, 1)
    ]
    nnx.update(model, cm.fold_tree(nnx.state(model), adapter))
    np.testing.assert_allclose(model(x), x @ weights[0] @ weights[1], rtol=1e-5)


def test_what_does_not_fit():
    (adapter,) = random_adapters({"x": (6, 8)}, [2], dtype="float32")
    with pytest.raises(
        cm.MismatchError, match=r"no kernel for 1 of 1 modules: 'x'; nearest is 'y/"
    ):
        cm.fold_tree(params({"y": (8, 6)}), adapter)
    with pytest.raises(cm.MismatchError, match=r"x/w: kernel \(8, 7\) does not fit"):
        cm.fold_tree(params({"x": (8, 7)}), adapter)
    (square,) = random_adapters({"x": (24, 2)}, [2], dtype="float32")
    with pytest.raises(cm.FormatError, match="which axes of kernel"):
        cm.fold_tree(params({"x": (3, 2, 2, 4)}), square)
