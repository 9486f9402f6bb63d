"""Updates folded into parameters in memory."""

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
from flax import nnx
from helpers import dense, random_adapters
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import coremerge_jax as cm
from coremerge_jax.trees import fold as addition


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


@pytest.mark.parametrize("on_device", [False, True])
def test_axes_that_shapes_do_not_tell(on_device):
    """gemma's query: 2 heads of 4 are as wide as the 8 inputs."""
    (adapter,) = random_adapters({"layer.0.attn.q_einsum": (8, 8)}, [2], dtype="float32")
    kernel = params({"x": (2, 8, 4)})["x"]["w"]
    tree = {"layer_0": {"attn": {"q_einsum": {"w": jnp.asarray(kernel) if on_device else kernel}}}}
    with pytest.raises(cm.FormatError, match=r"is not clear; say which with axes \(--axes\)"):
        cm.fold_tree(tree, adapter)
    folded = cm.fold_tree(tree, adapter, axes={"*/q_einsum": "oio"})
    update = dense(adapter["layer.0.attn.q_einsum"]).reshape(2, 4, 8).swapaxes(1, 2)
    found = folded["layer_0"]["attn"]["q_einsum"]["w"]
    np.testing.assert_allclose(found, kernel + update, rtol=1e-5, atol=1e-5)
    for letters, message in (
        ("io", "axes 'io' for kernel"),
        ("xio", "expected a letter an axis"),
        ("ioo", "does not fit an update of 8 outputs, 8 inputs"),
    ):
        with pytest.raises(cm.CoreMergeError, match=message):
            cm.fold_tree(tree, adapter, axes={"*/q_einsum": letters})


@pytest.mark.parametrize("on_device", [False, True])
def test_layers_of_experts(on_device):
    shapes = {f"layers.{i}.moe.wi[{e}]": (6, 8) for i in range(2) for e in range(3)}
    (adapter,) = random_adapters(shapes, [2], dtype="float32")
    kernel = params({"x": (3, 2, 8, 6)})["x"]["w"]
    tree = {"layers": {"moe": {"wi": jnp.asarray(kernel) if on_device else kernel}}}
    with pytest.raises(cm.MismatchError, match="no kernel for 6 of 6 modules"):
        cm.fold_tree(tree, adapter)
    # Of two stacks the first is that of layers.
    tree = jax.tree.map(lambda x: x.swapaxes(0, 1), tree)
    folded = cm.fold_tree(tree, adapter, axes={"layers/moe": "llio"})["layers"]["moe"]["wi"]
    for i in range(2):
        for e in range(3):
            expected = kernel[e, i] + dense(adapter[f"layers.{i}.moe.wi[{e}]"]).T
            np.testing.assert_allclose(folded[i, e], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_stack_with_layers_that_are_not_changed(on_device):
    (one,) = random_adapters({"layers.1.x": (6, 8)}, [2], dtype="float32")
    (two,) = random_adapters({"layers.3.x": (6, 8)}, [3], seed=1, dtype="float32")
    adapter = cm.Adapter({**one, **two})
    kernel = params({"x": (4, 8, 6)})["x"]["w"]
    tree = {"layers": {"x": {"kernel": jnp.asarray(kernel) if on_device else kernel}}}
    folded = cm.fold_tree(tree, adapter)["layers"]["x"]["kernel"]
    np.testing.assert_array_equal(folded[::2], kernel[::2])
    for i in (1, 3):
        expected = kernel[i] + dense(adapter[f"layers.{i}.x"]).T
        np.testing.assert_allclose(folded[i], expected, rtol=1e-5, atol=1e-5)


def test_kernels_on_the_host_are_changed_by_blocks(monkeypatch):
    monkeypatch.setattr(addition, "BLOCK", 10)
    (adapter,) = random_adapters({f"layers.{i}.x": (12, 8) for i in range(2)}, [2])
    kernel = params({"x": (3, 2, 8, 4)}, dtype="float64")["x"]["w"]
    tree = {"layers": {"x": {"kernel": kernel}}}
    folded = cm.fold_tree(tree, adapter, axes={"*": "olio"})["layers"]["x"]["kernel"]
    for i in range(2):
        update = dense(adapter[f"layers.{i}.x"]).reshape(3, 4, 8).swapaxes(1, 2)
        np.testing.assert_allclose(folded[:, i], kernel[:, i] + update, rtol=1e-5, atol=1e-5)


def test_the_first_axes_are_the_inputs_where_that_fits():
    (adapter,) = random_adapters({"x": (8, 8)}, [2], dtype="float32")
    tree = params({"x": (2, 4, 1, 8)})
    folded = cm.fold_tree(tree, adapter)
    expected = tree["x"]["w"] + dense(adapter["x"]).T.reshape(2, 4, 1, 8)
    np.testing.assert_allclose(folded["x"]["w"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("traced", ["params", "adapter", "scale"])
def test_inside_jit(traced):
    (adapter,) = random_adapters({"x": (6, 8)}, [2], dtype="float32")
    given = {"params": params({"x": (8, 6)}), "adapter": adapter, "scale": np.float32(0.5)}
    rest = {name: value for name, value in given.items() if name != traced}
    folded = jax.jit(lambda value: cm.fold_tree(**rest, **{traced: value}))(given[traced])
    expected = given["params"]["x"]["w"] + 0.5 * dense(adapter["x"]).T
    np.testing.assert_allclose(folded["x"]["w"], expected, rtol=1e-5, atol=1e-5)


def test_kernels_of_one_shape_are_one_program(caplog):
    (adapter,) = random_adapters({f"layers.{i}.x": (7, 9) for i in range(3)}, [2], dtype="float32")
    tree = {"layers": {str(i): {"x": {"kernel": jnp.ones((9, 7))}} for i in range(3)}}
    with jax.log_compiles():
        cm.fold_tree(tree, adapter)
    assert caplog.text.count("Compiling jit(fold)") == 1


def test_what_a_tree_has_no_place_for():
    (adapter,) = random_adapters({"x": (6, 8)}, [2], dtype="float32")
    tree = params({"x": (8, 6)})
    with pytest.raises(cm.UnsupportedError, match="'score'"):
        cm.fold_tree(tree, adapter.replace(extras={"score": np.ones(3)}))
    with pytest.raises(cm.UnsupportedError, match="x/w: dtype int8, so it is quantized"):
        cm.fold_tree(params({"x": (8, 6)}, dtype="int8"), adapter)
    conv = cm.LoRA(adapter["x"].a, adapter["x"].b, cm.Kind("conv2d", kernel=(2, 2, 2)))
    with pytest.raises(cm.UnsupportedError, match="'x' is a convolution"):
        cm.fold_tree(params({"x": (2, 2, 2, 6)}), cm.Adapter({"x": conv}))
    with pytest.raises(cm.FormatError, match="'x/kernel' and 'x/w' are both of module 'x'"):
        cm.fold_tree({"x": {"kernel": tree["x"]["w"], **tree["x"]}}, adapter)
    layers = random_adapters({f"layers.{i}.x": (8, 3) for i in range(3)}, [2], dtype="float32")
    stacks = {"layers": {"x": {"kernel": np.ones((3, 3, 8), np.float32)}}}
    with pytest.raises(cm.FormatError, match=r"stacked along axis 0 or 1; .* \(--scan-axis\)"):
        cm.fold_tree(stacks, layers[0])
    one, two = (cm.fold_tree(stacks, layers[0], scan_axis=axis) for axis in (0, 1))
    assert not np.array_equal(*(x["layers"]["x"]["kernel"] for x in (one, two)))


def test_what_does_not_fit():
    (adapter,) = random_adapters({"x": (6, 8)}, [2], dtype="float32")
    with pytest.raises(
        cm.MismatchError, match=r"no kernel for 1 of 1 modules: 'x' .6, 8.; nearest is 'y/w .8, 6.'"
    ):
        cm.fold_tree(params({"y": (8, 6)}), adapter)
    with pytest.raises(cm.MismatchError, match=r"x/w: kernel \(8, 7\) does not fit"):
        cm.fold_tree(params({"x": (8, 7)}), adapter)
    (square,) = random_adapters({"x": (24, 2)}, [2], dtype="float32")
    with pytest.raises(cm.FormatError, match="which axes of kernel"):
        cm.fold_tree(params({"x": (3, 2, 2, 4)}), square)


@pytest.mark.usefixtures("all_devices")
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("where", ["uncommitted", "another", "fewer", "host"])
def test_factors_on_other_devices_than_the_kernel(rng, mode, where):
    four, two = (many_devices.mesh(n, mode=mode) for n in (4, 2))
    a, b, kernel = (rng.standard_normal(shape, np.float32) for shape in ((2, 8), (8, 2), (8, 8)))
    expected = kernel + (b @ a).T
    spread = (
        NamedSharding(four, PartitionSpec(None, "modules")),
        NamedSharding(four, PartitionSpec("modules")),
    )
    a, b = map(jax.device_put, (a, b), spread)
    kernel = {
        "uncommitted": lambda: jnp.asarray(kernel),
        "another": lambda: jax.device_put(kernel, jax.devices()[1]),
        "fewer": lambda: jax.device_put(kernel, NamedSharding(two, PartitionSpec("modules"))),
        "host": lambda: kernel,
    }[where]()
    folded = cm.fold_tree({"up": {"kernel": kernel}}, cm.Adapter({"up": cm.LoRA(a=a, b=b)}))
    np.testing.assert_allclose(folded["up"]["kernel"], expected, rtol=1e-5, atol=1e-5)
    if where != "host":
        assert folded["up"]["kernel"].sharding.device_set == kernel.sharding.device_set
