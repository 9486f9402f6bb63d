"""Names in checkpoints and in memory: what we fold in is what peft merges and transformers saves.

The models are those whose weights transformers renames, fuses or transposes as it loads them.
"""

import warnings

import numpy as np
import pytest

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeWarning
from coremerge_jax.io.base_model.tensor_names import find_tensors
from coremerge_jax.io.module_paths import split_expert
from coremerge_jax.io.peft.writer import save_peft
from coremerge_jax.naming.pieces import fused
from coremerge_jax.naming.spelling import canonical

pytestmark = [
    pytest.mark.oracle,
    # Warnings of torch, peft and transformers themselves, none of them about the weights.
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::coremerge_jax.errors.CoreMergeWarning"),
]

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers", minversion="5")
    from safetensors.numpy import load_file
    from transformers import conversion_mapping

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
BLOCKS = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
MOE = {"num_experts_per_tok": 1, "moe_intermediate_size": 12}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "v_proj"]

# Class of the model, configuration, target_modules, target_parameters.
MODELS = {
    "qwen2_5_vl": lambda: (
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_scaling": ROPE},
            vision_config={**BLOCKS, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
        ),
        ["q_proj", "down_proj", "qkv", "lm_head"],
        [],
    ),
    "qwen3_vl": lambda: (
        transformers.Qwen3VLForConditionalGeneration,
        transformers.Qwen3VLConfig(
            text_config={**TEXT, "rope_scaling": ROPE},
            vision_config={
                **BLOCKS,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        ),
        ["q_proj", "qkv", "linear_fc1"],
        [],
    ),
    "qwen3_vl_moe": lambda: (
        transformers.Qwen3VLMoeForConditionalGeneration,
        transformers.Qwen3VLMoeConfig(
            text_config={**TEXT, **MOE, "rope_scaling": ROPE, "num_experts": 2},
            vision_config={
                **BLOCKS,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        ),
        ["q_proj", "qkv"],
        EXPERTS,
    ),
    "gemma3": lambda: (
        transformers.Gemma3ForConditionalGeneration,
        transformers.Gemma3Config(
            text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=31
        ),
        [*ATTENTION, "fc1", "up_proj"],
        [],
    ),
    "llava": lambda: (
        transformers.LlavaForConditionalGeneration,
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**VISION),
        ),
        [*ATTENTION, "fc1", "linear_1", "lm_head"],
        [],
    ),
    "mixtral": lambda: (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1),
        ATTENTION,
        EXPERTS,
    ),
    "qwen3_moe": lambda: (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(**TEXT, **MOE, num_experts=2),
        ATTENTION,
        EXPERTS,
    ),
    "deepseek_v3": lambda: (
        transformers.DeepseekV3ForCausalLM,
        transformers.DeepseekV3Config(
            **{**TEXT, "num_key_value_heads": 2},
            **MOE,
            n_routed_experts=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        ["q_a_proj", "kv_b_proj"],
        EXPERTS,
    ),
    "gpt_oss": lambda: (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1),
        ATTENTION,
        EXPERTS,
    ),
    "aria": lambda: (
        transformers.AriaForConditionalGeneration,
        transformers.AriaConfig(
            text_config={**TEXT, "moe_num_experts": 2, "moe_topk": 1},
            vision_config={**VISION, "model_type": "idefics3_vision"},
            projector_patch_to_query_dict={4: 2},
        ),
        [*ATTENTION, "fc1"],
        EXPERTS,
    ),
    "vit": lambda: (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**VISION, num_labels=3),
        [*ATTENTION, "o_proj", "fc1", "fc2"],
        [],
    ),
    "dinov2": lambda: (
        transformers.Dinov2ForImageClassification,
        transformers.Dinov2Config(**VISION, num_labels=3, use_swiglu_ffn=True),
        [*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"],
        [],
    ),
}


def randomized(model):
    """Trained parameters are random, of few bits, so that their products are exact."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randint(-8, 9, parameter.shape) / 64)
    return model


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", MODELS)
def test_what_peft_merges_and_transformers_saves(tmp_path, case):
    kind, config, modules, parameters = MODELS[case]()
    torch.manual_seed(0)
    model = kind(config).float()
    model.save_pretrained(tmp_path / "base")
    options = {"target_parameters": parameters} if parameters else {}
    if case in ("vit", "dinov2"):
        options = {"modules_to_save": ["classifier"], "bias": "all" if case == "vit" else "none"}
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, **options)
    model = randomized(peft.get_peft_model(model, settings))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    adapter = cm.open_peft(tmp_path / "adapter")
    cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "out")
    before, ours, theirs = (tensors(tmp_path / x) for x in ("base", "out", "peft"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)
    changed = [name for name, value in theirs.items() if not np.array_equal(value, before[name])]
    assert len(changed) >= len({path.partition("[")[0] for path in adapter})


SEGFORMER = {
    "depths": [1] * 4,
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 3,
}

# Model and configuration, and what is trained beside the queries, whose names are the same in all
# releases or not.
BESIDE = {
    "mixtral": (MODELS["mixtral"]()[:2], {"modules_to_save": ["gate"]}),
    "vit": (MODELS["vit"]()[:2], {"modules_to_save": ["mlp"]}),
    "segformer": (
        (
            transformers.SegformerForSemanticSegmentation,
            transformers.SegformerConfig(**SEGFORMER),
        ),
        {"bias": "all"},
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_weights_that_are_trained_beside_an_adapter(tmp_path, case):
    (kind, config), options = BESIDE[case]
    torch.manual_seed(0)
    model = kind(config).float()
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], **options)
    model = randomized(peft.get_peft_model(model, settings))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    cm.apply_adapter(cm.open_peft(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)


LAYER = "layers.1.self_attn.q_proj.weight"
DISK = {
    "mixtral": [f"model.layers.1.block_sparse_moe.{x}.weight" for x in ("gate", "experts.3.w1")],
    "minimax_m2": ["model.layers.1.block_sparse_moe.experts.3.w2.weight"],
    "phimoe": [f"model.layers.1.block_sparse_moe.{x}.weight" for x in ("gate", "experts.3.w3")],
    "qwen2_moe": [
        *(f"model.layers.1.mlp.experts.3.{x}_proj.weight" for x in ("gate", "up", "down")),
        "model.layers.1.mlp.shared_experts.up_proj.weight",
    ],
    "jamba": [f"model.layers.1.feed_forward.experts.3.{x}_proj.weight" for x in ("up", "down")],
    "lfm2_moe": [f"model.layers.1.feed_forward.experts.3.w{i}.weight" for i in (1, 2, 3)],
    "nemotron_h": [
        *(f"backbone.layers.1.mixer.experts.3.{x}_proj.weight" for x in ("up", "down")),
        "backbone.embeddings.weight",
    ],
    "granitemoe": [
        f"model.layers.1.block_sparse_moe.{x}.weight"
        for x in ("input_linear", "output_linear", "router.layer")
    ],
    "Qwen2VLForConditionalGeneration": [
        f"model.{LAYER}",
        f"model.language_model.{LAYER}",
        "visual.blocks.1.attn.qkv.bias",
        "lm_head.weight",
    ],
    "llava": [
        f"language_model.model.{LAYER}",
        "language_model.lm_head.weight",
        f"vision_tower.vision_model.encoder.{LAYER}",
        "multi_modal_projector.linear_1.weight",
    ],
    "mllama": [f"language_model.model.{LAYER}", f"vision_model.transformer.{LAYER}"],
    "qwen2_audio": [f"language_model.model.{LAYER}", f"audio_tower.{LAYER}"],
    "ViTModel": [
        f"encoder.layer.1.{x}.weight"
        for x in (
            *(f"attention.attention.{x}" for x in ("query", "key", "value")),
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
            "layernorm_before",
        )
    ],
    "Dinov2Model": [
        f"encoder.layer.1.{x}.weight"
        for x in ("attention.attention.query", "attention.output.dense", "mlp.weights_out")
    ],
    "swin": [
        f"swin.encoder.layers.1.blocks.0.{x}.weight"
        for x in ("attention.self.query", "attention.output.dense", "output.dense")
    ],
    "SegformerModel": [
        f"encoder.{x}.weight"
        for x in (
            "block.0.1.attention.self.query",
            "block.0.1.attention.self.sr",
            "block.0.1.mlp.dense1",
            "patch_embeddings.0.proj",
        )
    ],
    "DetrModel": [
        f"{x}.weight"
        for x in (
            "model.encoder.layers.1.self_attn.out_proj",
            "model.decoder.layers.1.fc1",
            "backbone.conv_encoder.model.layer1.0.conv1",
        )
    ],
}


@pytest.mark.parametrize("case", DISK)
def test_names_in_memory_have_the_same_canonical_form(case):
    transforms = conversion_mapping.get_checkpoint_conversion_mapping(case)
    for disk in DISK[case]:
        memory = disk
        for transform in transforms:
            memory = transform.rename_source_key(memory)[0]
        key = canonical(disk)
        if key.endswith("].weight"):  # a layer of an expert, which is part of a parameter now
            parameter = key.removesuffix(".weight")
            whole, *_ = fused(parameter) or (parameter,)
            keys = [name.partition("[")[0] for name in (parameter, whole)]
        else:
            keys = [key]
        assert canonical(memory) in keys, (disk, memory)
        assert canonical(key) == key


LAYERS = {
    "mixtral": ("block_sparse_moe", {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}),
    "qwen3_moe": ("mlp", {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", ["llava", "vit"])
def test_peft_loads_a_merge_with_an_older_adapter_in_any_order(tmp_path, case, order):
    kind, config, *_ = MODELS[case]()
    torch.manual_seed(0)
    kind(config).float().save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = kind.from_pretrained(tmp_path / "base")
    randomized(peft.get_peft_model(model, settings)).save_pretrained(tmp_path / "new")
    queries = ("q_proj.weight", "query.weight")
    old = {
        name.removesuffix(".weight"): cm.LoRA(np.ones((4, 16), "f"), np.ones((16, 4), "f"))
        for name in tensors(tmp_path / "base")
        if name.endswith(queries)
    }
    adapters = [cm.open_peft(tmp_path / "new"), cm.Adapter(old)][::order]
    with pytest.warns(CoreMergeWarning, match="names the same modules in another way"):
        merged = cm.merge(adapters, cm.task_arithmetic(), scale=1.0)
    assert len(merged) == len(old)
    save_peft(merged, tmp_path / "merged")
    model = peft.PeftModel.from_pretrained(
        kind.from_pretrained(tmp_path / "base"), tmp_path / "merged"
    )
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    before, theirs = tensors(tmp_path / "base"), tensors(tmp_path / "peft")
    changed = [name for name in before if not np.array_equal(before[name], theirs[name])]
    assert {name.removesuffix(".weight") for name in changed} == old.keys()


@pytest.mark.parametrize("case", LAYERS)
def test_peft_loads_a_merge_of_adapters_of_two_releases(tmp_path, case):
    kind, config, modules, parameters = MODELS[case]()
    torch.manual_seed(0)
    kind(config).float().save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=modules, target_parameters=parameters)
    model = kind.from_pretrained(tmp_path / "base")
    randomized(peft.get_peft_model(model, settings)).save_pretrained(tmp_path / "new")
    block, shapes = LAYERS[case]
    rng = np.random.default_rng(0)
    old = {
        f"model.layers.{layer}.{block}.experts.{e}.{name}": cm.LoRA(
            a=rng.standard_normal((4, n), np.float32), b=rng.standard_normal((m, 4), np.float32)
        )
        for layer in range(2)
        for e in range(2)
        for name, (m, n) in shapes.items()
    }
    old["model.layers.0.self_attn.q_proj"] = cm.LoRA(
        a=np.ones((4, 16), np.float32), b=np.ones((16, 4), np.float32)
    )
    adapters = [cm.open_peft(tmp_path / "new"), cm.Adapter(old)]
    with pytest.warns(CoreMergeWarning, match="names the same modules in another way"):
        merged = cm.merge(adapters, cm.task_arithmetic(), scale=1.0)
    assert not any(path.endswith("]") for path in merged)
    save_peft(merged, tmp_path / "merged")
    model = kind.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "merged").merge_and_unload()
    model.save_pretrained(tmp_path / "peft")
    cm.apply_adapter(adapters[0], tmp_path / "base", tmp_path / "once")
    cm.apply_adapter(adapters[1], tmp_path / "once", tmp_path / "both")
    ours, theirs = tensors(tmp_path / "both"), tensors(tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-4, err_msg=name)


FEW = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"),
    "experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
}
TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION")


def shrink(config):
    """Leaves a model two layers and four experts, as far as its configuration has usual fields."""
    for value in vars(config).values():
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
    for count, fields in ((2, FEW["layers"]), (4, FEW["experts"])):
        for field in fields:
            if isinstance(getattr(config, field, None), int):
                setattr(config, field, min(count, getattr(config, field)))
    return config


def numbered(model):
    """Its tensors as it has and as it saves them: small ones, of numbers that occur only once."""
    memory = {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        shape = [size if size <= 64 else size // 64 for size in tensor.shape]
        memory[name] = torch.arange(int(np.prod(shape))).reshape(shape) + (i << 32)
    saved = transformers.core_model_loading.revert_weight_conversion(model, dict(memory))
    return memory, saved


def adapted(model):
    """Kind of each module that an adapter can have, and the tensor with its weight."""
    kinds = {torch.nn.Linear: cm.Kind(), torch.nn.Embedding: cm.Kind("embedding", transposed=True)}
    for path, module in model.named_modules():
        if type(module) in kinds:
            yield path, kinds[type(module)], f"{path}.weight"
        for name, value in module.named_parameters(recurse=False):
            if value.ndim == 3 and path.endswith("experts"):
                for e in range(min(len(value), 64)):
                    yield f"{path}.{name}[{e}]", cm.Kind("expert"), f"{path}.{name}"


def families():
    modeling = transformers.models.auto.modeling_auto
    mappings = [getattr(modeling, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS]
    for model_type in transformers.CONFIG_MAPPING:
        for mapping in (*mappings, modeling.MODEL_MAPPING_NAMES):
            if isinstance(mapping.get(model_type), str):
                yield model_type, mapping[model_type]


def built(model_type, name):
    """Its modules that adapters can have, and its tensors; None if it needs other libraries."""
    try:
        config = shrink(transformers.CONFIG_MAPPING[model_type]())
        with torch.device("meta"):
            model = getattr(transformers, name)(config)
        return {path: (kind, weight) for path, kind, weight in adapted(model)}, *numbered(model)
    except Exception:
        return None


def found(kinds, saved):
    """The tensors of each module, by its path; none if they are refused."""
    try:
        with warnings.catch_warnings(action="ignore"):
            sites = find_tensors(kinds, saved, "base")[1]
    except cm.MismatchError:
        return {}
    return {path: [site.tensor for site in there] for path, there in sites.items()}


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(8))
def test_no_module_of_any_model_is_taken_for_another(part):
    # Each is found where transformers saves it, alone and with all others, or refused.
    models = [(name, built(model_type, name)) for model_type, name in [*families()][part::8]]
    models = [(name, *model) for name, model in models if model is not None]
    assert len(models) > 50
    for name, modules, memory, saved in models:
        kinds = {path: kind for path, (kind, _) in modules.items()}
        for wanted in (kinds, *({path: kind} for path, kind in kinds.items())):
            for path, there in found(wanted, saved).items():
                value = memory[modules[path][1]]
                value = value[split_expert(path)[1]] if path.endswith("]") else value
                for tensor in there if value.numel() else ():
                    assert torch.isin(saved[tensor], value).any(), (name, path, tensor)
