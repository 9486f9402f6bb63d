"""Models of flax NNX: their LoRA factors out, merged, and back in."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import dense, distance

import coremerge_jax as cm

WIDTH, RANK, LAYERS = 12, 3, 2


class Block(nnx.Module):
    """Both LoRA modules of flax."""

    def __init__(self, *, rngs):
        self.up = nnx.LoRALinear(WIDTH, 2 * WIDTH, lora_rank=RANK, rngs=rngs)
        down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.down = nnx.LoRA(2 * WIDTH, RANK, WIDTH, base_module=down, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Model(nnx.Module):
    """A few blocks one after another."""

    def __init__(self, *, rngs):
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Scanned(nnx.Module):
    """The same blocks as one stack."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return Block(rngs=rngs)

        self.blocks = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return forward(self.blocks, x)


def trained(kind, seed, steps=3):
    """A model of which only the LoRA factors have moved."""
    model = kind(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.standard_normal((16, WIDTH)), jnp.float32) for _ in "xy")
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.LoRAParam)

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(model, nnx.grad(loss, argnums=wrt)(model))

    with jax.numpy_dtype_promotion("standard"):  # optax asks for it
        for _ in range(steps):
            step(model, optimizer)
    return model


@pytest.mark.parametrize("kind", [Model, Scanned])
def test_update_is_what_the_module_adds(kind):
    model = trained(kind, 1)
    adapter = cm.from_nnx(model, name="one")
    assert set(adapter) == {f"blocks.{i}.{name}" for i in range(LAYERS) for name in ("up", "down")}
    assert all(lora.rank == RANK and np.any(lora.b) for lora in adapter.values())
    x = np.random.default_rng(2).standard_normal((5, WIDTH)).astype(np.float32)
    blocks = [model.blocks[i] for i in range(LAYERS)] if kind is Model else unstacked(model)
    for i, block in enumerate(blocks):
        base = x @ np.asarray(block.up.kernel[...]) + np.asarray(block.up.bias[...])
        added = np.asarray(block.up(jnp.asarray(x))) - base
        assert distance(x @ dense(adapter[f"blocks.{i}.up"]).T, added) < 1e-6


def unstacked(model):
    """The blocks of a stack."""
    graph, state = nnx.split(model.blocks)
    layers = [jax.tree.map(operator.itemgetter(i), state) for i in range(LAYERS)]
    return [nnx.merge(graph, layer) for layer in layers]


@pytest.mark.parametrize("kind", [Model, Scanned])
def test_a_model_with_the_merge_computes_base_plus_merged_update(kind):
    models = [trained(kind, seed) for seed in (1, 2)]
    merged = cm.merge([cm.from_nnx(model) for model in models], cm.tsv())
    assert {lora.rank for lora in merged.values()} == {2 * RANK}
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, WIDTH)), jnp.float32)
    expected = folded(models[0], merged)(x)
    cm.update_nnx(models[0], merged)
    np.testing.assert_allclose(models[0](x), expected, rtol=1e-5, atol=1e-5)
    again = cm.from_nnx(models[0])
    for path in merged:
        np.testing.assert_array_equal(np.asarray(again[path].b), np.asarray(merged[path].b))


def folded(model, merged):
    """Another model, whose kernels hold the updates and whose LoRA factors are zero."""
    other = nnx.clone(model)
    blocks = [other.blocks] if isinstance(model, Scanned) else list(other.blocks)
    for i, block in enumerate(blocks):
        for name, kernel in (("up", block.up.kernel), ("down", block.down.base_module.kernel)):
            updates = [dense(merged[f"blocks.{j}.{name}"]).T for j in range(LAYERS)]
            update = np.stack(updates) if isinstance(model, Scanned) else updates[i]
            kernel[...] = kernel[...] + jnp.asarray(update, jnp.float32)
    nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other, nnx.LoRAParam)))
    return other


def test_merge_inside_a_jitted_function():
    models = [trained(Model, seed) for seed in (1, 2)]
    x = jnp.ones((1, WIDTH), jnp.float32)

    @nnx.jit
    def merged_output(models, x):
        merged = cm.merge([cm.from_nnx(model) for model in models], cm.mean())
        cm.update_nnx(models[0], merged)
        return models[0](x)

    expected = folded(models[0], cm.merge([cm.from_nnx(model) for model in models], cm.mean()))(x)
    np.testing.assert_allclose(merged_output(models, x), expected, rtol=1e-5, atol=1e-5)


def test_peft_and_back_changes_no_bit(tmp_path):
    adapter = cm.from_nnx(trained(Model, 1))
    cm.save_peft(adapter, tmp_path / "peft")
    model = trained(Model, 2)
    cm.update_nnx(model, cm.load_peft(tmp_path / "peft"))
    again = cm.from_nnx(model)
    assert set(again) == set(adapter)
    for path, lora in adapter.items():
        np.testing.assert_array_equal(np.asarray(again[path].a), np.asarray(lora.a))
        np.testing.assert_array_equal(np.asarray(again[path].b), np.asarray(lora.b))


def test_what_does_not_belong_is_refused():
    model = trained(Model, 1)
    adapter = cm.from_nnx(model)
    fewer = adapter.replace(modules={p: m for p, m in adapter.items() if p != "blocks.0.up"})
    with pytest.raises(cm.MismatchError, match=r"no module 'blocks\.0\.up'; nearest"):
        cm.update_nnx(model, fewer)
    more = adapter.replace(modules={**adapter, "head": adapter["blocks.0.up"]})
    with pytest.raises(cm.MismatchError, match=r"no place for module 'head'"):
        cm.update_nnx(model, more)
    swapped = adapter.replace(modules={**adapter, "blocks.0.up": adapter["blocks.0.down"]})
    with pytest.raises(cm.MismatchError, match=r"\(12, 24\) \(m, n\) in the adapter"):
        cm.update_nnx(model, swapped)
    with pytest.raises(cm.FormatError, match="does not scale"):
        cm.from_nnx(model, alpha=16)
    with pytest.raises(cm.FormatError, match="no LoRA factors"):
        cm.from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_convolutions_with_groups_are_refused():
    class Grouped(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=nnx.Rngs(0))
            self.conv.kernel_lora_a = nnx.LoRAParam(jnp.ones((3, 2, 2)))
            self.conv.kernel_lora_b = nnx.LoRAParam(jnp.ones((2, 4)))

    with pytest.raises(cm.UnsupportedError, match=r"'conv' is a convolution with 2 groups"):
        cm.from_nnx(Grouped(), alpha=2)
