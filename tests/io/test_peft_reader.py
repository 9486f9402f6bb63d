import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeWarning

PATHS = {"layers.0.q": (5, 4, 2), "layers.0.v": (3, 4, 2)}


def read_lazily(source):
    opened = cm.open_peft(source)
    return dict(opened), {name: np.asarray(value) for name, value in opened.extras.items()}


def refusal(source, error=cm.FormatError, refuse=cm.open_peft):
    """The message of the error, which is one line, and the same for `load_peft` and `refuse`."""
    messages = []
    for read in (cm.load_peft, refuse):
        with pytest.raises(error) as caught:
            read(source)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


@pytest.fixture(params=["load_peft", "open_peft"])
def load(request):
    """Reads an adapter, at once or lazily."""
    return getattr(cm, request.param)


P = "base_model.model."


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod." + P,
        P + "_orig_mod.",
        "module." + P,
        P + P,
        f"module.{P}_orig_mod.{P}module.",
        P,
    ],
)
def test_what_wraps_a_model_is_no_part_of_names(load, write, factors, rng, prefix):
    """torch.compile, DataParallel, FSDP, and a model that peft wrapped twice."""
    tensors = factors({"layers.0.q": (5, 4, 2)}, prefix)
    inner = factors({"layers.0._fsdp_wrapped_module.v": (3, 4, 2)}, prefix)
    head = {f"{prefix}_checkpoint_wrapped_module.score.weight": rng.random((2, 4), np.float32)}
    adapter = load(write(tensors | inner | head, modules_to_save=["score"]))
    assert sorted(adapter) == sorted(PATHS)
    assert list(adapter.extras) == ["score.weight"]
    assert adapter.metadata.prefix is None


def test_keys_without_pefts_prefix_are_written_without_it(load, write, factors, tmp_path):
    tensors = factors({"diffusion_model.blocks.0.q": (5, 4, 2)}, prefix="")
    adapter = load(write(tensors))
    cm.save_peft(cm.merge([adapter, adapter], cm.mean()), tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(tensors)


def test_two_tensors_of_one_name_are_refused(write, factors):
    both = factors({"layers.0.q": (5, 4, 2)}) | factors({"layers.0.q": (5, 4, 2)}, "_orig_mod." + P)
    assert "are both 'layers.0.q.lora_A.weight'" in refusal(write(both))


@pytest.mark.parametrize(
    ("saved", "names"),
    [
        ("classifier", ["classifier.weight", "pre_classifier.bias", "classifier.out.weight"]),
        ("norm", ["norm.weight", "layers.0.input_layernorm.weight", "layers.0.norm.bias"]),
        ("mlp.fc", ["layers.0.mlp.fc.weight"]),
    ],
)
def test_modules_to_save_are_matched_by_the_end_of_their_path(load, write, factors, saved, names):
    heads = {P + name: np.ones(3, np.float32) for name in names}
    folder = write(factors(PATHS) | heads, modules_to_save=["other", saved])
    assert sorted(load(folder).extras) == sorted(names)
    other = {f"{P}{saved}s.weight": np.ones(3, np.float32)}
    assert "not account for" in refusal(write(factors(PATHS) | other, "2", modules_to_save=[saved]))


def test_a_bias_of_a_saved_module_is_read_once(load, write, factors):
    """With bias="all", peft writes it by its own name, and twice by those of its wrapper."""
    biases = {
        f"{P}head.bias": np.ones(3, np.float32),
        f"{P}head.modules_to_save.default.bias": np.ones(3, np.float32),
        f"{P}head.original_module.bias": np.zeros(3, np.float32),
        f"{P}z.modules_to_save.default.bias": np.ones(2, np.float32),
    }
    folder = write(factors(PATHS) | biases, bias="all", modules_to_save=["head", "z"])
    extras = load(folder).extras
    assert sorted(extras) == ["head.bias", "z.bias"]
    assert np.all(np.asarray(extras["head.bias"]) == 1)


def test_names_of_parameters_alone_are_of_experts(load, write, factors, rng):
    """As peft writes them for target_modules of models whose experts transformers fuses."""
    experts = packed_pair(*stacks(rng, 3, 2, PAIRS["gated"]).values())
    layers = factors({"mlp.shared_expert.down_proj": (4, 5, 2), "attn.q_proj": (4, 4, 2)})
    folder = write(experts | layers, target_parameters=["down_proj", "gate_up_proj"])
    adapter = load(folder)
    assert {"mlp.shared_expert.down_proj", "attn.q_proj"} < set(adapter)
    assert len(adapter) == 2 + 2 * 3


def test_tied_embeddings_may_be_saved_but_have_no_update(load, write, factors):
    head = {
        P + name + ".weight": np.ones((7, 4), np.float32) for name in ("embed_tokens", "lm_head")
    }
    folder = write(
        factors(PATHS) | head, ensure_weight_tying=True, modules_to_save=["embed_tokens"]
    )
    adapter = load(folder)
    assert set(adapter.extras) == {"embed_tokens.weight", "lm_head.weight"}
    assert adapter.metadata.config["ensure_weight_tying"]
    tied = write(factors({"lm_head": (7, 4, 2)}), "tied", ensure_weight_tying=True)
    assert "'lm_head' with ensure_weight_tying" in refusal(tied, cm.UnsupportedError)


def test_a_configuration_of_rank_and_alpha_alone(load, write, factors):
    fields = dict.fromkeys(("peft_type", "base_model_name_or_path", "task_type", "target_modules"))
    assert list(load(write(factors(PATHS), **fields))) == list(PATHS)


def test_the_newest_checkpoint_of_a_trainer_counts(write, factors, tmp_path):
    (tmp_path / "run").mkdir()
    for step in (500, 1000, 90):
        write(factors(PATHS), f"run/checkpoint-{step}")
    write(factors(PATHS), "run/checkpoint-2000")
    (tmp_path / "run/checkpoint-2000/adapter_model.safetensors").unlink()  # cut off
    with pytest.warns(CoreMergeWarning, match="newest of its 3 checkpoints, checkpoint-1000"):
        adapter = cm.open_peft(tmp_path / "run")
    assert adapter.metadata.name == "run"
    assert adapter.folders == (tmp_path / "run/checkpoint-1000",)
    assert cm.open_adapter(write(factors(PATHS), "run/own")).metadata.name == "own"


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_are_read_as_one_file(load, write, factors, indexed):
    tensors = factors(PATHS)
    folder = write(tensors)
    whole = cm.load_peft(folder)
    (folder / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    weight_map = dict(zip(sorted(tensors), [names[0], names[1], names[1], names[0]], strict=True))
    for name in names:
        save_file({k: v for k, v in tensors.items() if weight_map[k] == name}, folder / name)
    if indexed:
        index = folder / "adapter_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    adapter = load(folder)
    for path, lora in whole.items():
        assert np.array_equal(adapter[path].a, lora.a)
        assert np.array_equal(adapter[path].b, lora.b)
    assert not adapter.metadata.beside
    (folder / names[1]).unlink()
    assert (f"{names[1]}: missing" if indexed else "number 2 of the 2 files") in refusal(folder)
    if indexed:
        index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
        assert "is not the name of a file" in refusal(folder)


def test_scaling_is_folded_into_b_and_a_is_untouched(load, write, factors):
    tensors = factors(PATHS)
    adapter = load(write(tensors))
    assert list(adapter) == list(PATHS)
    for path, lora in adapter.items():
        a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        assert np.array_equal(lora.a, a)
        assert np.array_equal(lora.b, (b.astype(np.float64) * 3).astype(np.float32))
        assert lora.a.dtype == lora.b.dtype == np.float32
        assert lora.kind == cm.Kind()


def test_metadata_is_the_configurations(load, write, factors):
    folder = write(factors(PATHS), "my-task")
    metadata = load(folder).metadata
    assert metadata == cm.Metadata(
        name="my-task",
        base_model="owner/base",
        task_type="CAUSAL_LM",
        rank=2,
        alpha=6,
        dtype="float32",
    )
    assert load(str(folder), name="other").metadata.name == "other"


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default", ".my_task", ".default.default"])
def test_keys_of_files_and_of_raw_state_dicts(load, write, factors, prefix, infix):
    adapter = load(write(factors(PATHS, prefix, infix)))
    assert list(adapter) == list(PATHS)


def test_rank_stabilized_scaling(load, write, factors):
    tensors = factors(PATHS)
    scaled = load(write(tensors, use_rslora=True))
    b = tensors["base_model.model.layers.0.q.lora_B.weight"].astype(np.float64)
    assert np.array_equal(scaled["layers.0.q"].b, (b * (6 / math.sqrt(2))).astype(np.float32))


def test_the_first_matching_pattern_counts(load, write, factors):
    modules = {"layers.0.q": (5, 4, 3), "layers.1.q": (5, 4, 1), "layers.1.v": (5, 4, 2)}
    tensors = factors(modules)
    folder = write(
        tensors,
        rank_pattern={r"layers\.0\.q": 3, "q": 1},
        alpha_pattern={"^layers.*v": 1, "v": 100},
    )
    with pytest.warns(CoreMergeWarning, match=r"'v' \(100\) for module 'layers.1.v'"):
        adapter = load(folder)
    for path, scale in (("layers.0.q", 2), ("layers.1.q", 6), ("layers.1.v", 0.5)):
        b = tensors[f"base_model.model.{path}.lora_B.weight"].astype(np.float64)
        assert np.array_equal(adapter[path].b, (b * scale).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_become_float32_before_scaling(load, write, factors, dtype):
    tensors = {k: v.astype(jnp.dtype(dtype)) for k, v in factors(PATHS).items()}
    adapter = load(write(tensors))
    assert adapter.metadata.dtype == dtype
    b = tensors["base_model.model.layers.0.q.lora_B.weight"].astype(np.float64)
    assert np.array_equal(adapter["layers.0.q"].b, (b * 3).astype(np.float32))


def test_vera_becomes_plain_factors(load, write, rng):
    tensors = {
        "base_model.vera_A": rng.standard_normal((2, 4), np.float32),
        "base_model.vera_B": rng.standard_normal((5, 2), np.float32),
        "base_model.model.q.vera_lambda_b": rng.standard_normal(3, np.float32),
        "base_model.model.q.vera_lambda_d": rng.standard_normal(2, np.float32),
    }
    lora = load(write(tensors, peft_type="VERA"))["q"]
    shared_a, shared_b, rows, inner = tensors.values()
    assert np.array_equal(lora.a, shared_a * inner[:, None])
    assert np.array_equal(lora.b, shared_b[:3] * rows[:, None])
    without = {k: v for k, v in tensors.items() if k != "base_model.vera_A"}
    assert "vera_A" in refusal(write(without, "without", peft_type="VERA"))


def test_tensors_that_are_not_updates_become_extras(load, write, factors, rng):
    extra = {
        "layers.0.q.base_layer.bias": "layers.0.q.bias",
        "norm.bias": "norm.bias",
        "score.weight": "score.weight",
        "embed_tokens.weight": "embed_tokens.weight",
        "embed.token_adapter.trainable_tokens_delta": "embed.token_adapter.trainable_tokens_delta",
        "layers.0.q.lora_B.bias": "layers.0.q.lora_B.bias",
    }
    values = {key: rng.standard_normal(5, np.float32) for key in extra}
    fields = {"bias": "all", "modules_to_save": ["score"], "trainable_token_indices": [0, 1]}
    tensors = factors(PATHS) | {f"base_model.model.{k}": v for k, v in values.items()}
    adapter = load(write(tensors, lora_bias=True, **fields))
    assert set(adapter.extras) == set(extra.values())
    for key, name in extra.items():
        scale = 3 if "lora_B" in key else 1
        assert np.array_equal(adapter.extras[name], values[key] * np.float32(scale))
    assert adapter.metadata.config == fields


def test_biases_that_peft_saves_twice_are_read_once(load, write, factors):
    names = ["score.bias", "score.modules_to_save.bias", "score.original_module.bias"]
    extras = {f"base_model.model.{name}": np.ones(3, np.float32) for name in names}
    fields = {"bias": "all", "modules_to_save": ["score"]}
    adapter = load(write(factors(PATHS) | extras, **fields))
    assert set(adapter.extras) == {"score.bias"}


@pytest.mark.parametrize("method", ["LOHA", "LOKR"])
def test_products_of_matrices_become_plain_factors(load, write, rng, method):
    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    if method == "LOHA":
        parts = {
            f"hada_w{i}_{x}": draw(*s) for i in (1, 2) for x, s in (("a", (9, 2)), ("b", (2, 8)))
        }
        w = [parts[f"hada_w{i}_a"].astype(float) @ parts[f"hada_w{i}_b"] for i in (1, 2)]
        expected, rank = w[0] * w[1], 4
    else:
        parts = {"lokr_w1": draw(3, 2), "lokr_w2_a": draw(3, 2), "lokr_w2_b": draw(2, 4)}
        w2 = parts["lokr_w2_a"].astype(float) @ parts["lokr_w2_b"]
        expected, rank = np.kron(parts["lokr_w1"], w2), 4
    tensors = {f"{P}layers.0.q.{name}": value for name, value in parts.items()}
    fields = {"peft_type": method, "alpha": 6, "lora_alpha": None, "module_dropout": 0.0}
    adapter = load(write(tensors, **fields))
    assert adapter.metadata.alpha == 6
    assert adapter["layers.0.q"].rank == rank
    np.testing.assert_allclose(adapter["layers.0.q"].dense(), 3 * expected, rtol=1e-5, atol=1e-5)
    assert "no alpha" in refusal(write(tensors, "without", **fields | {"alpha": None}))


def stacks(rng, count, rank, shapes):
    """Factors of all experts, (count, r, n) and (count, m, r), by the name of a layer."""
    return {
        name: (
            rng.standard_normal((count, rank, n), np.float32),
            rng.standard_normal((count, m, rank), np.float32),
        )
        for name, (m, n) in shapes.items()
    }


PAIRS = {
    "gated": {"gate_up_proj": (10, 4), "down_proj": (4, 5)},
    "Llama 4's, stored as (inputs, outputs)": {"gate_up_proj": (4, 10), "down_proj": (5, 4)},
    "NemotronH's": {"up_proj": (5, 4), "down_proj": (4, 5)},
}


def packed_pair(first, second):
    """Tensors as peft packs two parameters, of which the first is defined first."""
    return {
        f"mlp.experts{level}.lora_{part}.weight": tensor
        for level, (a, b) in ((".base_layer", first), ("", second))
        for part, tensor in (
            ("A", a.reshape(-1, a.shape[2])),
            ("B", np.moveaxis(b, 0, 2).reshape(b.shape[1], -1)),
        )
    }


@pytest.mark.parametrize("shapes", PAIRS.values(), ids=PAIRS)
def test_experts_are_modules(load, write, rng, tmp_path, shapes):
    factors = stacks(rng, 3, 2, shapes)
    targets = [f"experts.{name}" for name in sorted(factors)]
    adapter = load(write(packed_pair(*factors.values()), target_parameters=targets, lora_alpha=2))
    assert len(adapter) == 2 * 3
    for name, (a, b) in factors.items():
        for e in range(3):
            lora = adapter[f"mlp.experts.{name}[{e}]"]
            assert lora.kind.name == "expert"
            assert np.array_equal(lora.a, a[e])
            assert np.array_equal(lora.b, b[e])
    cm.save_peft(adapter, tmp_path / "out")
    again = cm.load_peft(tmp_path / "out")
    assert all(np.array_equal(again[path].dense(), lora.dense()) for path, lora in adapter.items())


@pytest.mark.parametrize("name", ["Llama 4's, stored as (inputs, outputs)", "NemotronH's"])
def test_a_pair_that_an_old_release_may_have_swapped_is_refused(write, rng, name):
    factors = stacks(rng, 3, 2, PAIRS[name])
    targets = [f"experts.{name}" for name in factors]
    folder = write(packed_pair(*factors.values()), target_parameters=targets, peft_version="0.18.1")
    assert "written by peft 0.18.1" in refusal(folder, cm.UnsupportedError)


STACKED = {
    "Tinker's": ({"w1": (5, 4), "w3": (5, 4), "w2": (4, 5)}, "{owner}.{e}.{layer}"),
    "SkyRL's": ({"gate_proj": (5, 4), "down_proj": (4, 5)}, "{owner}.{e}.{layer}"),
    "fused": ({"gate_up_proj": (10, 4), "down_proj": (4, 5)}, "{owner}.{layer}[{e}]"),
}
LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.mark.parametrize("shared", [None, "A", "B"])
@pytest.mark.parametrize(("shapes", "path"), STACKED.values(), ids=STACKED)
def test_stacked_factors_are_experts(load, write, rng, shapes, path, shared):
    """Along a first axis, which may have one entry for all experts in one of the factors."""
    owner, tensors = "layers.0.mlp.experts", {}
    factors = stacks(rng, 3, 2, shapes)
    for name, (a, b) in factors.items():
        factors[name] = a, b = (a[:1] if shared == "A" else a), (b[:1] if shared == "B" else b)
        tensors[f"{P}{owner}.{name}.lora_A.weight"] = a
        tensors[f"{P}{owner}.{name}.lora_B.weight"] = b
    for part in "AB":
        tensors[f"{P}layers.1.mlp.experts.w3.lora_{part}.weight"] = np.zeros(0, np.float32)
    adapter = load(write(tensors, lora_alpha=2))
    assert len(adapter) == 3 * len(shapes)
    for name, (a, b) in factors.items():
        for e in range(3):
            lora = adapter[path.format(owner=owner, e=e, layer=LAYERS.get(name, name))]
            assert np.array_equal(lora.a, a[e % len(a)])
            assert np.array_equal(lora.b, b[e % len(b)])


@pytest.mark.parametrize("shapes", [((1, 2, 4), (1, 5, 2)), ((3, 2, 4), (2, 5, 2))])
def test_stacks_of_unknown_length_are_refused(write, shapes):
    tensors = {
        f"{P}experts.w1.lora_{part}.weight": np.ones(shape, np.float32)
        for part, shape in zip("AB", shapes, strict=True)
    }
    assert "expected (experts, r, inputs)" in refusal(write(tensors))


def test_an_embedding_stored_transposed_and_tinkers_name_of_the_head(load, write, factors, rng):
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((30, 2), (2, 8)))
    tensors = factors({"model.unembed_tokens": (30, 8, 2)})
    tensors[P + "embed_tokens.lora_A.weight"] = a
    tensors[P + "embed_tokens.lora_B.weight"] = b
    adapter = load(write(tensors, lora_alpha=2))
    assert sorted(adapter) == ["embed_tokens", "lm_head"]
    assert adapter["embed_tokens"].kind == cm.Kind("embedding", transposed=True)
    np.testing.assert_allclose(adapter["embed_tokens"].dense(), (a @ b).T, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "version", "reason"),
    [
        (["experts.w1", "experts.w2"], "0.21.2", "does not tell"),
        (["experts.gate_up_proj", "experts.down_proj"], "0.21.2", "does not tell"),
        (["experts.w1"], "0.21.2", "does not tell"),
    ],
)
def test_uncertain_experts_are_refused(write, factors, targets, version, reason):
    tensors = factors({"experts": (5, 4, 6), "experts.base_layer": (5, 4, 6)})
    folder = write(tensors, target_parameters=targets, peft_version=version)
    assert reason in refusal(folder, cm.UnsupportedError)


@pytest.mark.parametrize("version", [None, "0.18.1", "0.17.0"])
def test_one_parameter_needs_a_known_layout(write, factors, version):
    tensors = factors({"experts": (5, 4, 6)})
    folder = write(tensors, target_parameters=["experts.w1"], peft_version=version)
    assert "0.19.0" in refusal(folder, cm.UnsupportedError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("alora_invocation_tokens", [1]),
        ("kasa_config", {"beta": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("arrow_config", {"top_k": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"a": 1}),
        ("a_field_of_the_future", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("peft_type", "ADALORA"),
        ("save_projection", False),
    ],
)
def test_what_is_more_than_low_rank_is_refused_by_name(write, factors, field, value):
    vera = {"peft_type": "VERA"} if field == "save_projection" else {}
    message = refusal(write(factors(PATHS), **vera, **{field: value}), cm.UnsupportedError)
    assert field in message
    assert "adapter_config.json" in message


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_keep_the_base_weights(write, factors, init):
    assert len(cm.load_peft(write(factors(PATHS), init_lora_weights=init))) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": None}, "no r"),
        ({"r": 0}, "positive integer"),
        ({"r": "2"}, "positive integer"),
        ({"lora_alpha": math.inf}, "finite"),
        ({"r": 3}, "'layers.0.q' has rank 2, but adapter_config.json says 3"),
        ({"rank_pattern": {"v": 1}}, "'layers.0.v' has rank 2, but adapter_config.json says 1"),
        ({"rank_pattern": {"(": 2}}, "broken pattern '('"),
        ({"rank_pattern": [2]}, "expected an object"),
        ({"alpha_pattern": {"v": "big"}}, "alpha_pattern['v'] is \"big\""),
        ({"bias": "some"}, "'some'"),
        ({"peft_type": None, "r": None}, "peft_type is None"),
    ],
)
def test_inconsistent_configurations(write, factors, changes, expected):
    message = refusal(write(factors(PATHS), **changes))
    assert expected in message
    assert "adapter_" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("layers.0.q.lora_A.weight", None, "'layers.0.q' has lora_B.weight only"),
        ("layers.0.q.lora_B.weight", None, "'layers.0.q' has lora_A.weight only"),
        ("layers.0.q.lora_B.weight", np.ones((5, 3)), "B has shape (5, 3)"),
        ("layers.0.q.lora_A.weight", np.ones((0, 4)), "A has shape (0, 4)"),
        ("layers.0.q.lora_C.weight", np.ones(2), "'layers.0.q.lora_C.weight' is nearest to"),
        ("layers.0.q.lora_B.bias", np.ones(5), "lora_bias is false"),
        ("norm.weight", np.ones(5), "does not account for: 'norm.weight'"),
    ],
)
def test_inconsistent_tensors(write, factors, name, value, expected):
    tensors = factors(PATHS)
    tensors.pop("base_model.model." + name, None)
    if value is not None:
        tensors["base_model.model." + name] = value.astype(np.float32)
    message = refusal(write(tensors))
    assert expected in message
    assert "adapter_model.safetensors" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("layers.0.q.lora_A.weight", np.float32(np.nan), "lora_A.weight' has NaN or infinite"),
        ("layers.0.q.lora_B.weight", np.float32(np.inf), "lora_B.weight' has NaN or infinite"),
        ("layers.0.q.lora_B.weight", np.float32(3e38), "'layers.0.q': B times the scaling 3"),
        ("layers.0.q.lora_A.weight", 1e200, "'layers.0.q'.*overflows float32"),
        ("layers.0.q.bias", np.float32(np.nan), "q.bias' has NaN or infinite"),
        ("layers.0.q.bias", 1e200, "q.bias' overflows float32"),
    ],
)
def test_values_are_checked_when_they_are_read(write, factors, name, value, expected):
    tensors = factors(PATHS) | {"base_model.model.layers.0.q.bias": np.ones(4, np.float32)}
    shape = tensors[f"base_model.model.{name}"].shape
    tensors[f"base_model.model.{name}"] = np.full(shape, value)
    message = refusal(write(tensors, bias="all"), refuse=read_lazily)
    assert re.search(expected, message)
    assert "adapter_model.safetensors" in message


@pytest.mark.parametrize(
    "name", ["layers.0.q.lora_magnitude_vector", "layers.0.q.lora_E", "layers.0.q.lora_diag"]
)
def test_tensors_of_other_methods_are_refused(write, factors, name):
    tensors = factors(PATHS) | {f"base_model.model.{name}": np.ones(5, np.float32)}
    assert name in refusal(write(tensors), cm.UnsupportedError)


def test_paths_that_are_the_same_without_prefix(write, factors):
    tensors = factors(PATHS) | factors(PATHS, prefix="")
    assert "'base_model.model.layers.0.q.lora_A.weight'" in refusal(write(tensors))


def test_no_factors(write):
    assert "no LoRA factors" in refusal(write({}))


@pytest.mark.parametrize(
    ("shapes", "error", "expected"),
    [
        (((4, 3, 2, 2), (6, 2, 1, 1)), cm.UnsupportedError, "2 groups"),
        (((2, 3, 5), (6, 2, 1)), cm.UnsupportedError, "two-dimensional"),
        (((2, 3, 2, 2), (6, 2, 2, 2)), cm.FormatError, "1 x 1"),
    ],
)
def test_other_convolutions(write, shapes, error, expected):
    keys = "conv.lora_A.weight", "conv.lora_B.weight"
    tensors = {key: np.ones(shape, np.float32) for key, shape in zip(keys, shapes, strict=True)}
    assert expected in refusal(write(tensors, r=shapes[0][0]), error)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(write, factors, size):
    folder = write(factors(PATHS))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"r": 2'])
def test_broken_configuration(write, factors, text):
    folder = write(factors(PATHS))
    (folder / "adapter_config.json").write_text(text)
    assert str(folder / "adapter_config.json") in refusal(folder)


def test_missing_files(write, factors, tmp_path):
    folder = write(factors(PATHS))
    (folder / "adapter_model.safetensors").rename(tmp_path / "moved")
    assert "no adapter_model.safetensors" in refusal(folder)
    (folder / "adapter_model.bin").touch()
    assert "pickle" in refusal(folder, cm.UnsupportedError)
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refusal(folder)
    assert str(folder) in refusal(folder)


def test_sources_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for source in (
        "nothing",
        "./owner/name",
        "/no/such",
        "here/nothing",
        "here/b/c",
        tmp_path / "x",
    ):
        assert refusal(source) == f"{source}: no such folder"
    (tmp_path / "file").touch()
    assert "is a file" in refusal("file")


def test_hub_ids_come_from_the_cache_and_offline_fails_at_once(
    load, monkeypatch, tmp_path, factors
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "cannot be reached" in refusal("owner/no-such-adapter")

    folder = tmp_path / "models--owner--task"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (snapshot / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors(PATHS), snapshot / "adapter_model.safetensors")
    for source in ("owner/task", "owner/task@main"):
        adapter = load(source)
        assert adapter.metadata.name == "task"
        assert list(adapter) == list(PATHS)
    assert "cannot be reached" in refusal("owner/task@other")

    (snapshot / "final" / "best").mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / file).rename(snapshot / "final" / "best" / file)
    assert load("owner/task/final/best@main").metadata.name == "best"
    assert "cannot be reached" in refusal("owner/task/other")
