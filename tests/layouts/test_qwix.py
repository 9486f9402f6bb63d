"""Models that qwix has given LoRA factors: their own forward passes are the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import dense, distance

import coremerge_jax as cm

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

WIDTH, HEADS, HEAD_DIM, EXPERTS, RANK, ALPHA = 12, 3, 5, 2, 2, 8.0
SCALE = {"alpha": ALPHA, "rank": RANK}


class Layer(nnx.Module):
    """Linear layers, einsums with several inputs and outputs, and experts that share one b."""

    def __init__(self, *, rngs):
        self.q_proj = nnx.Einsum("BD,DNH->BNH", (WIDTH, HEADS, HEAD_DIM), rngs=rngs)
        self.kv_einsum = nnx.Einsum("BD,CNDH->CBNH", (2, HEADS, WIDTH, HEAD_DIM), rngs=rngs)
        self.o_proj = nnx.Einsum("BNH,NHD->BD", (HEADS, HEAD_DIM, WIDTH), rngs=rngs)
        self.experts = nnx.Einsum("EBD,EDF->EBF", (EXPERTS, WIDTH, WIDTH), rngs=rngs)
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        k, v = self.kv_einsum(x)
        x = x + self.o_proj(jnp.tanh(self.q_proj(x) * k) + v)
        x = x + jnp.sum(self.experts(jnp.stack([x] * EXPERTS)), axis=0)
        return x + jnp.tanh(self.mlp(x))


class Model(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.List([Layer(rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def lora_model(seed, steps=3):
    """A model whose LoRA factors have been trained for a few steps; and the base model."""
    qwix = pytest.importorskip("qwix")
    base = Model(rngs=nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.standard_normal((8, WIDTH)), jnp.float32) for _ in "xy")
    model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.LoRAParam)

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
    return model


NAMES = ("q_proj", "kv_einsum", "o_proj", "experts", "mlp")
INPUTS = {"o_proj": (5, HEADS, HEAD_DIM), "experts": (EXPERTS, 5, WIDTH)}


def without_update(model):
    other = nnx.clone(model)
    nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other, nnx.LoRAParam)))
    return other


@pytest.mark.parametrize("name", NAMES)
def test_update_is_what_the_module_adds(name):
    model = lora_model(1)
    adapter = cm.from_nnx(model, **SCALE)
    assert set(adapter) == {f"layers.{i}.{name}" for i in range(2) for name in NAMES}
    shape = INPUTS.get(name, (5, WIDTH))
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    module, base = (getattr(m.layers[1], name) for m in (model, without_update(model)))
    added = np.asarray(module(jnp.asarray(x)) - base(jnp.asarray(x)))
    update = dense(adapter[f"layers.1.{name}"])  # (outputs, inputs)
    if name == "experts":
        kernels = update.T.reshape(EXPERTS, WIDTH, WIDTH)
        expected = np.einsum("ebd,edf->ebf", x, kernels)
    else:
        expected = x.reshape(5, -1) @ update.T
        if name == "kv_einsum":
            expected = expected.reshape(5, 2, HEADS, HEAD_DIM).transpose(1, 0, 2, 3)
    assert distance(expected.reshape(added.shape), added) < 1e-6


def test_a_model_with_the_merge_computes_base_plus_merged_update():
    models = [lora_model(seed) for seed in (1, 2)]
    merged = cm.merge([cm.from_nnx(model, **SCALE) for model in models], cm.tsv())
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, WIDTH)), jnp.float32)
    folded = without_update(models[0])
    params = nnx.state(folded, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    nnx.update(folded, cm.fold_tree(params, merged))
    cm.update_nnx(models[1], merged, **SCALE)
    np.testing.assert_allclose(models[1](x), folded(x), rtol=2e-5, atol=2e-5)


def test_peft_and_back_changes_no_bit(tmp_path):
    model = lora_model(1)
    adapter = cm.from_nnx(model, **SCALE)
    cm.save_peft(adapter, tmp_path / "peft")
    cm.update_nnx(model, cm.load_peft(tmp_path / "peft"), **SCALE)
    for path, lora in cm.from_nnx(model, **SCALE).items():
        np.testing.assert_array_equal(np.asarray(lora.a), np.asarray(adapter[path].a))
        np.testing.assert_array_equal(np.asarray(lora.b), np.asarray(adapter[path].b))


def test_alpha_is_asked_for():
    with pytest.raises(cm.FormatError, match=r"'qwix' scales updates by alpha / rank"):
        cm.from_nnx(lora_model(1, steps=0))
