"""What we fold in is what peft's `merge_and_unload` makes, read again by transformers.

Bit for bit, if the products in `b @ a` are exact, so that their order in the sum does not matter,
and the scaling of B does not round. Else libraries differ in that order, by their kernels and the
shapes, and results by the rounding errors of the update.
"""

import json
import warnings

import numpy as np
import pytest

import coremerge_jax as cm

pytestmark = [
    pytest.mark.oracle,
    # Warnings of torch, peft and transformers themselves, none of them about the weights.
    pytest.mark.filterwarnings("default"),
]

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    from test_peft_oracle import CASES, base_model, lora, trained

TOKENS = torch.arange(14).reshape(2, 7)
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "hidden_size": 32, "intermediate_size": 48}
MODELS = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **WIDE),
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    ),
    "llama embeddings": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=False, **WIDE),
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "task_type": "CAUSAL_LM"},
    ),
    "bert": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(num_labels=3, **WIDE),
        {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS", "bias": "all"},
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_positions=16, n_inner=80, **SIZES),
        {
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "fan_in_fan_out": True,
            "task_type": "CAUSAL_LM",
        },
    ),
    "gpt2 with its head": (  # which is no Conv1D, and for which peft sets fan_in_fan_out to False
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_positions=16, tie_word_embeddings=False, **SIZES),
        {"target_modules": ["c_attn", "c_proj", "lm_head"], "task_type": "CAUSAL_LM"},
    ),
    "experts": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(
            num_local_experts=3, num_experts_per_tok=2, num_key_value_heads=2, head_dim=8, **WIDE
        ),
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "task_type": "CAUSAL_LM",
        },
    ),
    "tokens": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **WIDE),
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5], "task_type": "CAUSAL_LM"},
    ),
}


def randomized(model, exact=True):
    """Trainable parameters are random; where exact, few bits of them."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and exact:
                parameter.copy_(torch.randint(-8, 9, parameter.shape) / 64)
            elif parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def make(folder, case, alpha=8, dtype=torch.float32, exact=True):
    """A base and an adapter in files."""
    kind, config, options = MODELS[case]
    torch.manual_seed(0)
    kind(config).to(dtype).save_pretrained(folder / "base", max_shard_size="30KB")
    model = kind.from_pretrained(folder / "base", dtype=dtype)
    options = {"r": 4, "lora_alpha": alpha, **options}
    model = randomized(peft.get_peft_model(model, peft.LoraConfig(**options)), exact)
    model.save_pretrained(folder / "adapter")
    return kind, folder / "base", folder / "adapter"


def merged(kind, base, adapter, dtype=torch.float32, **options):
    model = kind.from_pretrained(base, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, adapter, **options).merge_and_unload().eval()


def assert_equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("case", MODELS)
def test_float32_bit_for_bit(tmp_path, case):
    kind, base, adapter = make(tmp_path, case)
    assert (base / "model.safetensors.index.json").exists()
    cm.apply_adapter(cm.open_peft(adapter), base, tmp_path / "out")
    ours, theirs = kind.from_pretrained(tmp_path / "out").eval(), merged(kind, base, adapter)
    assert_equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
        assert not torch.equal(
            ours(TOKENS).logits, kind.from_pretrained(base).eval()(TOKENS).logits
        )


@pytest.mark.parametrize(("rank", "exact"), [(1, True), (1, False), (16, True), (100, True)])
def test_float32_bit_for_bit_at_any_rank(tmp_path, rank, exact):
    config = transformers.LlamaConfig(
        **{**WIDE, "hidden_size": 512, "intermediate_size": 1030, "num_hidden_layers": 1}
    )
    kind = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), options)
    randomized(model, exact).save_pretrained(tmp_path / "adapter")
    cm.apply_adapter(cm.open_peft(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    theirs = merged(kind, tmp_path / "base", tmp_path / "adapter")
    assert_equal(kind.from_pretrained(tmp_path / "out"), theirs)


@pytest.mark.parametrize(("alpha", "exact"), [(8, False), (3.7, True), (3.7, False)])
@pytest.mark.parametrize("case", ["llama", "bert", "gpt2", "experts"])
def test_sums_and_scalings_that_round(tmp_path, case, alpha, exact):
    kind, base, adapter = make(tmp_path, case, alpha, exact=exact)
    cm.apply_adapter(cm.open_peft(adapter), base, tmp_path / "out")
    ours = kind.from_pretrained(tmp_path / "out").state_dict()
    theirs = merged(kind, base, adapter).state_dict()
    for name, value in ours.items():
        # Of 4 products each of A and B below 1: scaling, products and sums round.
        assert torch.allclose(value, theirs[name], rtol=2**-23, atol=10 * 2**-24), name


@pytest.mark.parametrize("case", ["llama", "bert", "gpt2", "experts"])
def test_bfloat16_rounds_once(tmp_path, case):
    kind, base, adapter = make(tmp_path, case, dtype=torch.bfloat16)
    cm.apply_adapter(cm.open_peft(adapter), base, tmp_path / "out")
    ours = kind.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    # The update in float32, rounded with the sum only; not of experts, whose update peft rounds.
    theirs = merged(kind, base, adapter, torch.bfloat16)
    if case != "experts":
        assert_equal(ours, theirs)
    # In float32, then rounded.
    exact = merged(kind, base, adapter, torch.float32).to(torch.bfloat16)
    assert_equal(ours, exact)
    # With the factors in bfloat16 peft rounds twice.
    options = {"autocast_adapter_dtype": False}
    twice = merged(kind, base, adapter, torch.bfloat16, **options).state_dict()
    before = kind.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    for name, value in ours.state_dict().items():
        size = before[name].float().abs() + (value.float() - before[name].float()).abs()
        assert ((value.float() - twice[name].float()).abs() <= 2**-7 * size).all(), name


@pytest.mark.parametrize("module", ["lm_head", "down_proj"])
def test_a_module_that_one_adapter_adapts_and_another_has_whole(tmp_path, module):
    kind, config, _ = MODELS["llama"]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "base")
    options = {
        "adapted": {"target_modules": ["q_proj", module]},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": [module]},
    }
    for name, more in options.items():
        options = peft.LoraConfig(r=4, lora_alpha=8, **more)
        model = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), options)
        randomized(model).save_pretrained(tmp_path / name)
    adapters = [cm.open_peft(tmp_path / name) for name in ("adapted", "whole")]
    result = cm.merge(adapters, cm.task_arithmetic(), scale=1.0, extras="keep=whole")
    cm.save_peft(result, tmp_path / "merged")
    again = cm.open_peft(tmp_path / "merged")
    assert set(again.extras) == set(result.extras)
    cm.apply_adapter(again, tmp_path / "base", tmp_path / "out")
    ours = kind.from_pretrained(tmp_path / "out").eval()
    expected = kind.from_pretrained(tmp_path / "base").state_dict()
    expected |= {name: torch.tensor(np.asarray(x)) for name, x in result.extras.items()}
    for path, lora in result.items():
        expected[f"{path}.weight"] += torch.tensor(np.asarray(lora.b) @ np.asarray(lora.a))
    theirs = merged(kind, tmp_path / "base", tmp_path / "merged").state_dict()
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
        assert torch.allclose(theirs[name], expected[name], atol=1e-6), name


NAMES = {"unwrapped": ("GPT2LMHeadModel", "GPT2Model"), "wrapped": ("BertModel", "BertForMaskedLM")}


@pytest.mark.parametrize("case", NAMES)
def test_bases_whose_names_lack_or_add_a_prefix(tmp_path, case):
    adapted, saved = (getattr(transformers, name) for name in NAMES[case])
    config = MODELS["gpt2" if case == "unwrapped" else "bert"][1]
    torch.manual_seed(0)
    saved(config).save_pretrained(tmp_path / "base")
    targets = ["c_attn"] if case == "unwrapped" else ["query"]
    options = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=case == "unwrapped"
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(adapted.from_pretrained(tmp_path / "base"), options)
    randomized(model).save_pretrained(tmp_path / "adapter")
    cm.apply_adapter(cm.open_peft(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    torch.manual_seed(0)  # a head that the base does not have is random
    theirs = merged(adapted, tmp_path / "base", tmp_path / "adapter")
    torch.manual_seed(0)
    assert_equal(adapted.from_pretrained(tmp_path / "out"), theirs)


@pytest.mark.parametrize("base", ["BertModel", "BertForMaskedLM"])
def test_a_new_head(tmp_path, base):
    kind, config, _ = MODELS["bert"]
    torch.manual_seed(0)
    getattr(transformers, base)(config).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    model = kind.from_pretrained(tmp_path / "base", num_labels=3)
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS")
    randomized(peft.get_peft_model(model, options)).save_pretrained(tmp_path / "adapter")
    adapter = cm.open_peft(tmp_path / "adapter")
    report = cm.apply_adapter(adapter, tmp_path / "base", tmp_path / "out")
    assert report.appended == ["classifier.bias", "classifier.weight"]
    ours = kind.from_pretrained(tmp_path / "out", num_labels=3).eval()
    model = kind.from_pretrained(tmp_path / "base", num_labels=3)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().eval()
    theirs = {name: value for name, value in theirs.state_dict().items() if "pooler" not in name}
    ours = {name: value for name, value in ours.state_dict().items() if "pooler" not in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# peft adds the update of an attention's out_proj twice, see test_peft_oracle.
@pytest.mark.parametrize(
    "case", [case for case in CASES if "attention" not in str((case, CASES[case]))]
)
def test_every_kind_of_module(tmp_path, case):
    (tmp_path / "base").mkdir()
    save_file(base_model().state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    model = trained(lora(case))
    model.save_pretrained(tmp_path / "adapter")
    cm.apply_adapter(cm.open_peft(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.allclose(value, theirs[name], rtol=1e-6, atol=1e-6), name
