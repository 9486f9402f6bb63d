"""Modules that gemma's peft has given LoRA factors: their own forward passes are the oracle."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import distance

import coremerge_jax as cm

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

WIDTH, HEADS, HEAD_DIM, RANK = 12, 3, 5, 2


@pytest.fixture
def peft():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield pytest.importorskip("gemma.peft")


class Layer(nn.Module):
    """The kernels of gemma's attention."""

    @nn.compact
    def __call__(self, x):
        heads = (HEADS, WIDTH, HEAD_DIM)
        q = nn.Einsum(heads, "BTD,NDH->BTNH", use_bias=False, name="q_einsum")(x)
        k, v = nn.Einsum((2, *heads), "BSD,CKDH->CBSKH", use_bias=False, name="kv_einsum")(x)
        kernel, equation = (HEADS, HEAD_DIM, WIDTH), "BTNH,NHD->BTD"
        out = nn.Einsum(kernel, equation, use_bias=False, name="attn_vec_einsum")(
            jnp.tanh(q * k) + v
        )
        return x + nn.Dense(WIDTH, name="mlp")(out)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Layer(name=f"layer_{i}")(x)
        return x


def with_lora(peft):
    """The model with LoRA in all its kernels, random parameters, and an input."""

    def replace(module):
        if isinstance(module, nn.Dense):
            return peft.LoRADense(rank=RANK, dtype=jnp.float32, wrapped=module)
        return (
            peft.LoRAEinsum(rank=RANK, dtype=jnp.float32, wrapped=module)
            if isinstance(module, nn.Einsum)
            else module
        )

    class Adapted(nn.Module):
        @nn.compact
        def __call__(self, x):
            with peft.ModuleInterceptor(replace):
                return Model(name="model")(x)

    x = jax.random.normal(jax.random.key(0), (2, 4, WIDTH))
    params = Adapted().init(jax.random.key(1), x)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [
        0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return Adapted(), jax.tree.unflatten(structure, noise), x


def test_folded_model_computes_the_same(peft):
    model, params, x = with_lora(peft)
    base, factors = peft.split_params(params)
    adapter = cm.from_tree(factors)
    names = ("q_einsum", "kv_einsum", "attn_vec_einsum", "mlp")
    assert set(adapter) == {f"model.layer.{i}.{name}" for i in range(2) for name in names}
    folded = cm.fold_tree(base, adapter)
    nothing = jax.tree.map(jnp.zeros_like, factors)
    expected = model.apply({"params": params}, x)
    found = model.apply({"params": peft.merge_params(folded, nothing)}, x)
    assert distance(np.asarray(found), np.asarray(expected)) < 1e-5


def test_peft_and_back_changes_no_bit(peft, tmp_path):
    _, params, _ = with_lora(peft)
    _, factors = peft.split_params(params)
    cm.save_peft(cm.from_tree(factors), tmp_path / "peft")
    back = cm.to_tree(cm.load_peft(tmp_path / "peft"), factors)
    jax.tree.map(np.testing.assert_array_equal, back, factors)
