"""The model's parameters among trees with the same keys: optimizers, averages, other models."""

import numpy as np
import optax
import pytest
from flax import nnx

import coremerge_jax as cm
from coremerge_jax.trees.paths import flatten


def factors(n=4, m=3):
    return {"lora_a": np.ones((n, 2), np.float32), "lora_b": np.ones((2, m), np.float32)}


def model():
    return {"layers": {str(i): {"up": factors()} for i in range(2)}}


ADAM = [{"count": np.int32(3), "mu": model(), "nu": model()}, {}]
PLAIN = ["layers.0.up", "layers.1.up"]
STEP = {"step": np.int32(3)}


def below(prefix):
    return [f"{prefix}.{path}" for path in PLAIN]


@pytest.mark.parametrize(
    ("tree", "modules"),
    [
        ({"params": model(), "opt_state": ADAM, **STEP}, PLAIN),
        ({"params": model(), "opt": ADAM}, PLAIN),
        ({"params": model(), "opt": [{"trace": model()}]}, PLAIN),
        ({"params": model(), "adam": {"mu": model(), "nu": model()}}, PLAIN),
        (
            {"params": model(), "opt_state": {"inner_states": {"lora": {"inner_state": ADAM}}}},
            PLAIN,
        ),
        ({"params": model(), "ema_params": model(), **STEP}, PLAIN),
        ({"params": model(), "grads": model(), "count": np.int32(0)}, PLAIN),
        ({"model": model(), "ema": {"params": model()}}, below("model")),
        ({"model": model(), "optimizer": {"opt_state": ADAM, **STEP}}, below("model")),
        ({"optimizer": {"model": model(), "opt_state": ADAM, **STEP}}, below("optimizer.model")),
        ({"learner": {"params": model(), "opt": ADAM, **STEP}}, below("learner.params")),
        ({"state": {"params": model(), "opt_state": ADAM, **STEP}}, below("state.params")),
    ],
)
def test_an_optimizer_is_not_the_model(tree, modules):
    adapter = cm.from_tree(tree)
    assert list(adapter) == modules
    back = cm.to_tree(adapter.replace(modules=dict(adapter)), tree)
    assert list(cm.from_tree(back)) == modules


@pytest.mark.parametrize(
    "tree",
    [
        {"encoder": model(), "decoder": model()},
        {"generator": {"params": model()}, "discriminator": {"params": model()}},
        {"opt": model()},
        {"encoder": {"proj": factors()}, "mu": {"proj": factors()}},
        {"q": factors(), "mu": factors(), "v": factors()},
        {"model": {str(i): {"up": factors()} for i in range(2)}},
    ],
)
def test_parts_of_a_model_are_not_taken_for_copies(tree):
    leaves = [key for key in flatten(tree) if key.endswith("lora_a")]
    assert len(cm.from_tree(tree)) == len(leaves)


@pytest.mark.parametrize(
    ("tree", "left"),
    [
        ({"params": model(), "other": model()}, "other"),
        ({"params": model(), "ref_params": model()}, "ref_params"),
        ({"model": model(), "teacher": model()}, "teacher"),
        ({"model_a": model(), "model_b": model()}, "model_b"),
        ({"ema": model(), "average": model()}, "average"),
        ({"mu": model(), "nu": model()}, "nu"),
        ([model(), [{"trace": model()}]], "1/0/trace"),
    ],
)
def test_copies_of_which_none_is_the_model_for_certain_are_refused(tree, left):
    with pytest.raises(cm.FormatError, match="not certain; leave the others out with ignore"):
        cm.from_tree(tree)
    pattern = "ema/*" if left == "average" else f"{left}/*"
    assert len(cm.from_tree(tree, ignore=[pattern])) == 2


def test_an_optimizer_alone_is_refused():
    with pytest.raises(cm.FormatError, match="belongs to an optimizer's state, and so do all"):
        cm.from_tree({"opt_state": [{"mu": model()}]})


@pytest.mark.parametrize("make", [optax.adam, optax.lion, lambda rate: optax.sgd(rate, 0.9)])
def test_states_of_nnx_and_optax(make):
    module = nnx.Dict(up=nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(module, make(1e-3), wrt=nnx.LoRAParam)
    both = {"model": nnx.state(module, nnx.LoRAParam), "optimizer": nnx.state(optimizer)}
    assert list(cm.from_tree(both)) == ["model.up"]
    params = nnx.to_pure_dict(nnx.state(module, nnx.LoRAParam))
    assert list(cm.from_tree({"params": params, "opt": make(1e-3).init(params)})) == ["up"]


@pytest.mark.parametrize("other", ["velocity", "mu", "ema", "critic", "target"])
def test_all_modules_of_a_model_in_memory_are_its_own(other, tmp_path):
    def layer():
        return nnx.Dict(up=nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0)))

    model = nnx.Dict({"model": layer(), other: layer()})
    adapter = cm.from_nnx(model)
    assert set(adapter) == {"model.up", f"{other}.up"}
    cm.save_orbax(adapter, tmp_path / "own")
    assert set(cm.open_orbax(tmp_path / "own")) == set(adapter)
    doubled = {x: lora.replace(b=2 * lora.b) for x, lora in adapter.items()}
    cm.update_nnx(model, adapter.replace(modules=doubled))
    np.testing.assert_array_equal(model[other].up.lora.lora_b[...], 2 * adapter["model.up"].b.T)
    state = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    assert set(cm.from_tree(state, whole=True)) == set(adapter)
