"""Models that qwix has given LoRA factors: their own forward passes are the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import dense, distance

import coremerge_jax as cm

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

WIDTH, HEADS, HEAD_DIM, EXPERTS, LAYERS, RANK, ALPHA = 12, 2, 5, 5, 3, 4, 8.0


class Block(nnx.Module):
    """Every way in which qwix splits a kernel, beside each other."""

    def __init__(self, rngs):
        heads = (HEADS, HEAD_DIM)
        self.q_proj = nnx.Einsum("BD,DNH->BNH", (WIDTH, *heads), rngs=rngs)
        self.kv_einsum = nnx.Einsum("BD,CNDH->CBNH", (2, HEADS, WIDTH, HEAD_DIM), rngs=rngs)
        self.o_proj = nnx.Einsum("BNH,NHD->BD", (*heads, WIDTH), rngs=rngs)
        self.flat = nnx.LinearGeneral(heads, (3, 2), axis=(-2, -1), rngs=rngs)
        self.mlp = nnx.Linear(WIDTH, 8, rngs=rngs)
        # One b for all experts, and one for each.
        self.shared = nnx.Einsum("EBD,EDF->EBF", (EXPERTS, WIDTH, 7), rngs=rngs)
        self.moe = nnx.LinearGeneral(WIDTH, 7, batch_axis={0: EXPERTS}, rngs=rngs)

    def __call__(self, x):
        heads = x[:, : HEADS * HEAD_DIM].reshape(-1, HEADS, HEAD_DIM)
        tokens = jnp.stack([jnp.roll(x, i, 0) for i in range(EXPERTS)])
        inputs = {"o_proj": heads, "flat": heads, "shared": tokens, "moe": tokens}
        return {name: getattr(self, name)(inputs.get(name, x)) for name in KERNELS}


# Axes of each kernel: i input, o output, e experts of their own.
KERNELS = {
    "q_proj": "ioo",
    "kv_einsum": "ooio",
    "o_proj": "iio",
    "flat": "iioo",
    "mlp": "io",
    "shared": "iio",
    "moe": "eio",
}


class Unrolled(nnx.Module):
    """Layers one by one."""

    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        outputs = [layer(x) for layer in self.layers]
        return jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)


class Scanned(nnx.Module):
    """The same layers as a stack, along any axis."""

    def __init__(self, rngs, axis):
        self.axis = axis

        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(out_axes=self.axes)
        def create(rngs):
            return Block(rngs)

        self.layers = create(rngs)

    @property
    def axes(self):
        return nnx.StateAxes({nnx.Param: self.axis, ...: 0})

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, self.axes), out_axes=(nnx.Carry, 0))
        def step(x, layer):
            return x, layer(x)

        return step(x, self.layers)[1]


# How to make a model; what has to be said of its tree; its kernels' axis of layers.
MODELS = {
    "unrolled": (Unrolled, {}, None),
    "scanned": (functools.partial(Scanned, axis=0), {"scan_axis": 0}, 0),
    "scanned, axis 1": (functools.partial(Scanned, axis=1), {"scan_axis": 1}, 1),
}
every_model = pytest.mark.parametrize("name", MODELS)


def lora_model(name, seed, rank=RANK):
    """A model whose LoRA factors have been trained for a few steps."""
    return nnx.clone(trained(name, seed, rank))


@functools.cache
def trained(name, seed, rank):
    qwix = pytest.importorskip("qwix")
    make, _, axis = MODELS[name]
    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=ALPHA)
    rngs = nnx.Rngs(seed) if axis is None else nnx.Rngs(seed).fork(split=LAYERS)
    x = inputs(seed)
    model = qwix.apply_lora_to_model(make(nnx.Rngs(0)), provider, x, rngs=rngs)
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    @functools.partial(nnx.grad, argnums=nnx.DiffState(0, nnx.LoRAParam))
    def gradient(model):
        return sum(jnp.mean((y - 1) ** 2) for y in jax.tree.leaves(model(x)))

    with jax.numpy_dtype_promotion("standard"):  # optax asks for it
        for _ in range(3):
            optimizer.update(model, gradient(model))
    return model


def inputs(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((6, WIDTH)), jnp.float32)


def adapter_of(model, name):
    return cm.from_nnx(model, alpha=ALPHA, **MODELS[name][1])


def kernels(name, adapter):
    """The update of each kernel, in its form, as its axes say."""
    found = {}
    for module, letters in KERNELS.items():
        layers = []
        for i in range(LAYERS):
            paths = [p for p in adapter if p.partition("[")[0] == f"layers.{i}.{module}"]
            assert len(paths) == (EXPERTS if module == "moe" else 1)
            order = sorted(range(len(letters)), key=lambda k, x=letters: "eoi".index(x[k]))
            kernel = getattr(Block(nnx.Rngs(0)), module).kernel
            update = np.stack([dense(adapter[path]) for path in paths])
            update = update.reshape([kernel.shape[k] for k in order])
            layers.append(update.transpose(np.argsort(order)).astype(np.float32))
        axis = MODELS[name][2]
        if axis is None:
            found |= {("layers", i, module, "kernel"): layers[i] for i in range(LAYERS)}
        else:
            found["layers", module, "kernel"] = np.stack(layers, axis)
    return found


def set_kernels(model, values, add=False):
    """The model with other kernels and without LoRA."""
    other = nnx.clone(model)
    state = dict(nnx.to_flat_state(nnx.state(other, nnx.Param)))
    for path, value in state.items():
        if path in values:
            value[...] = jnp.asarray(values[path]) + (value[...] if add else 0.0)
        elif isinstance(value, nnx.LoRAParam):
            value[...] = jnp.zeros_like(value[...])
    return other


@every_model
def test_update_is_what_the_module_adds(name):
    model, x = lora_model(name, 1), inputs(2)
    update = kernels(name, adapter_of(model, name))
    with_lora, without = model(x), set_kernels(model, {})(x)
    zeros = set_kernels(model, jax.tree.map(np.zeros_like, update))(x)
    ours = set_kernels(model, update)(x)
    for module in KERNELS:
        added = np.float64(with_lora[module]) - np.float64(without[module])
        assert np.abs(added).max() > 0.01
        assert distance(np.float64(ours[module]) - np.float64(zeros[module]), added) < 1e-6, module


@every_model
def test_a_model_with_the_merge_computes_base_plus_merged_update(name):
    merged = cm.merge([adapter_of(lora_model(name, seed), name) for seed in (1, 2)], cm.tsv())
    expected = set_kernels(lora_model(name, 1), kernels(name, merged), add=True)(inputs(3))
    model = lora_model(name, 2, rank=2 * RANK)
    cm.update_nnx(model, merged, alpha=ALPHA, **MODELS[name][1])
    for module, output in model(inputs(3)).items():
        assert distance(output, expected[module]) < 1e-6, module


@every_model
def test_updates_are_folded_into_kernels(name):
    def can_be_folded(path):  # stacks of layers of experts cannot
        return name == "unrolled" or "moe" not in path

    model = lora_model(name, 1)
    adapter = adapter_of(model, name)
    some = {path: lora for path, lora in adapter.items() if can_be_folded(path)}
    params = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    scan = {} if name == "unrolled" else MODELS[name][1]
    sums = cm.fold_tree(params, adapter.replace(modules=some), **scan)
    expected = nnx.state(set_kernels(model, kernels(name, adapter), add=True))
    expected = dict(nnx.to_flat_state(expected))
    for path, value in nnx.to_flat_state(sums):
        if path[-1] == "kernel" and can_be_folded(path):
            assert distance(value, expected[path]) < 1e-6, path


@every_model
def test_peft_and_back_changes_no_bit(name, tmp_path):
    adapter = adapter_of(lora_model(name, 1), name)
    cm.save_peft(adapter, tmp_path / "peft")
    model = lora_model(name, 2)
    cm.update_nnx(model, cm.load_peft(tmp_path / "peft"), alpha=ALPHA, **MODELS[name][1])
    for path, lora in adapter_of(model, name).items():
        np.testing.assert_array_equal(np.asarray(lora.a), np.asarray(adapter[path].a))
        np.testing.assert_array_equal(np.asarray(lora.b), np.asarray(adapter[path].b))


def test_a_model_keeps_the_rank_of_its_rule():
    """Its own code reshapes the factors of a linear layer to that rank."""
    name = "unrolled"
    one, two = (adapter_of(lora_model(name, seed), name) for seed in (1, 2))
    model = lora_model(name, 1)
    with pytest.raises(cm.MismatchError, match=r"has rank \d, and updates are scaled by alpha / 4"):
        cm.update_nnx(model, cm.merge([one, two], cm.mean()), alpha=ALPHA)
    smaller, _ = cm.truncate(two, rank=1)
    cm.update_nnx(model, smaller, alpha=ALPHA)
    expected = set_kernels(model, kernels(name, smaller), add=True)(inputs(3))
    for module, output in model(inputs(3)).items():
        assert distance(output, expected[module]) < 1e-6, module


def test_what_has_to_be_said():
    with pytest.raises(cm.FormatError, match=r"'qwix' scales updates by alpha / rank"):
        cm.from_nnx(lora_model("unrolled", 1))
    model = lora_model("scanned", 1)
    with pytest.raises(cm.FormatError, match=r"layers/moe: .* \(leir,lero or elir,elro: .*--axes"):
        cm.from_nnx(model, alpha=ALPHA)
    said = cm.from_nnx(model, alpha=ALPHA, axes={"*/moe": "leir,lero"})
    for path, lora in adapter_of(model, "scanned").items():
        np.testing.assert_array_equal(np.asarray(said[path].a), np.asarray(lora.a))
