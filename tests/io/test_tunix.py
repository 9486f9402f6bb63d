"""Tunix: its models, its LoRA, its checkpoints; transformers and peft are the oracle."""

import contextlib
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import distance

import coremerge_jax as cm
from coremerge_jax.trees.families import translate

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 48, 2, 4, 2, 8
RANK, ALPHA = 2, 8.0
OURS = {
    "num_layers": LAYERS,
    "embed_dim": WIDTH,
    "hidden_dim": HIDDEN,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
}
THEIRS = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-6,
}
# Tunix rotates with base 1,000,000, whatever its configuration says.
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
QWEN = {"vocab_size": VOCABULARY, "rope_theta": 1_000_000, "norm_eps": 1e-6}
# Model class of transformers and what it is told, folder and loader of Tunix's and what its
# configuration is told, names.
FAMILIES = {
    "llama": ("Llama", ROPE, "llama3", "params", QWEN, "tunix"),
    "qwen": ("Qwen3", ROPE, "qwen3", "params", QWEN, "tunix"),
    "gemma": (
        "Gemma3",
        {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 64},
        "gemma3",
        "params_safetensors",
        {"num_embed": VOCABULARY, "sliding_window_size": 64, "param_dtype": jnp.float32},
        "tunix-gemma",
    ),
}
MODULES = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|einsum)"


@contextlib.contextmanager
def as_tunix_asks():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@dataclasses.dataclass
class Trained:
    """What is at hand after training.

    Attributes:
        family: of `FAMILIES`.
        folder: holds the base model of transformers (``base``) and the checkpoints.
        checkpoints: two folders of steps that Tunix has written.
        logits: of the model that the second checkpoint is of.
        theirs: the base model.
    """

    family: str
    folder: Path
    checkpoints: list[Path]
    logits: np.ndarray
    theirs: Any

    @property
    def names(self):
        return FAMILIES[self.family][-1]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    pytest.importorskip("tunix")
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    theirs = hugging_face(family)
    theirs.save_pretrained(folder / "base")
    with as_tunix_asks():
        model = with_lora(load(family, folder / "base"))
        assert distance(logits(model), expected_logits(theirs)) < 1e-4
        for seed in (1, 2):
            optimizer = train(model, seed)
            saving = manager(folder / str(seed))
            saving.save(3, model, optimizer, save_only_lora_params=True, force=True)
            saving.close()
        return Trained(family, folder, [folder / "1", folder / "2"], logits(model), theirs)


def hugging_face(family):
    """A small base model of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, told, *_ = FAMILIES[family]
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config)(**THEIRS, **told)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def load(family, folder):
    """The same in Tunix, with its own loader."""
    _, _, name, loader, told, _ = FAMILIES[family]
    config = importlib.import_module(f"tunix.models.{name}.model").ModelConfig(**OURS, **told)
    params = importlib.import_module(f"tunix.models.{name}.{loader}")
    return params.create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)


def with_lora(model, rank=RANK, alpha=ALPHA, seed=0):
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(module_path=MODULES, rank=rank, alpha=alpha)
    return qwix.apply_lora_to_model(model, provider, *arguments(IDS), rngs=nnx.Rngs(seed))


IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 10))


def arguments(ids):
    batch, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    return jnp.asarray(ids), positions, None, mask


def logits(model):
    return np.asarray(model(*arguments(IDS))[0], np.float64)


def expected_logits(theirs, adapter=None):
    """Those of transformers, with an adapter that peft loads."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    if adapter is not None:
        theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        found = theirs(torch.from_numpy(IDS)).logits.double().numpy()
    if adapter is not None:
        theirs.unload()
    return found


def train(model, seed, steps=3):
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, IDS.shape)

    @nnx.jit
    def gradient(model):
        def loss(model):
            scores = model(*arguments(ids))[0][:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:]).mean()

        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

    for _ in range(steps):
        optimizer.update(model, gradient(model))
    return optimizer


def manager(folder):
    return importlib.import_module("tunix.sft.checkpoint_manager").CheckpointManager(str(folder))


def test_what_tunix_has_trained_is_what_peft_loads(trained, tmp_path):
    adapter = cm.open_orbax(trained.checkpoints[1], alpha=ALPHA)
    cm.save_peft(translate(adapter, trained.names), tmp_path / "peft")
    expected = expected_logits(trained.theirs, tmp_path / "peft")
    assert distance(trained.logits, expected) < 1e-4
    assert distance(expected_logits(trained.theirs), expected) > 0.01


@pytest.mark.parametrize("way", ["like", "to"])
def test_tunix_restores_a_merge(trained, tmp_path, way):
    merged = cm.merge([cm.open_orbax(x, alpha=ALPHA) for x in trained.checkpoints], cm.tsv())
    theirs = translate(merged, trained.names)
    cm.save_peft(theirs, tmp_path / "peft")
    if way == "like":
        cm.save_orbax(merged, tmp_path / "steps" / "1", like=trained.checkpoints[0])
    else:
        cm.save_orbax(theirs, tmp_path / "steps" / "1", to=trained.names, head_dim=HEAD_DIM)
    rank = cm.open_orbax(tmp_path / "steps").metadata.rank
    with as_tunix_asks():
        base = load(trained.family, trained.folder / "base")
        model = with_lora(base, rank=rank, alpha=rank, seed=3)
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
        restoring = manager(tmp_path / "steps")
        step, metadata = restoring.maybe_restore(model, optimizer, restore_only_lora_params=True)
        restoring.close()
        assert (step, metadata["lora"]["lora_rank"]) == (1, rank)
        assert distance(logits(model), expected_logits(trained.theirs, tmp_path / "peft")) < 1e-4
