"""The table of docs/serving.md, cell by cell: adapters as each tool writes them, in each format."""

import functools
import json
import re
import warnings

import numpy as np
import pytest
from kinds import update
from pages import DOCS
from safetensors.numpy import save_file

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeError, CoreMergeWarning
from coremerge_jax.io.formats import find_target
from coremerge_jax.naming.spelling import canonical
from coremerge_jax.recipe import Recipe
from coremerge_jax.run import run_merge
from coremerge_jax.trees import translate

HEAD_DIM = 4
M, N, R = 16, 8, 2  # rows, columns and rank of every linear layer, so that merges share a program

LAYER = "model.layers.0"
ATTENTION = [f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj"]
LINEAR = dict.fromkeys(ATTENTION, (M, N))
BASE = {
    "num_hidden_layers": 1,
    "num_attention_heads": M // HEAD_DIM,
    "num_key_value_heads": M // HEAD_DIM,
    "head_dim": HEAD_DIM,
    "hidden_size": N,
}


# --- Files of each tool ---------------------------------------------------------------------
class Tool:
    """A folder to write one adapter into, as a tool does."""

    def __init__(self, folder, seed):
        self.folder, self.rng, self.seed = folder, np.random.default_rng(seed), seed
        folder.mkdir(parents=True)

    def draw(self, *shape):
        return self.rng.standard_normal(shape, np.float32)

    def pair(self, path, m=M, n=N, *, ends=("lora_A.weight", "lora_B.weight")):
        a, b = ((R, *n), (m, R, 1, 1)) if isinstance(n, tuple) else ((R, n), (m, R))
        return {f"{path}.{ends[0]}": self.draw(*a), f"{path}.{ends[1]}": self.draw(*b)}

    def pairs(self, modules, prefix="", **options):
        return {
            key: tensor
            for path, sizes in modules.items()
            for key, tensor in self.pair(prefix + path, *sizes, **options).items()
        }

    def write(self, tensors, file, notes=None, subfolder="", **config):
        folder = self.folder / subfolder
        folder.mkdir(exist_ok=True)
        save_file({k: np.array(v, order="C") for k, v in tensors.items()}, folder / file, notes)
        if config:
            (folder / "adapter_config.json").write_text(json.dumps(config))

    def peft(self, tensors, subfolder="", **fields):
        config = {
            "base_model_name_or_path": "owner/base",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "lora_alpha": 4,
            "lora_dropout": 0.05,
            "modules_to_save": None,
            "peft_type": "LORA",
            "peft_version": "0.21.2",
            "r": R,
            "rank_pattern": {},
            "target_modules": ["q_proj", "k_proj"],
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
            **fields,
        }
        config = {name: value for name, value in config.items() if value is not ...}
        named = {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}
        self.write(named, "adapter_model.safetensors", {"format": "pt"}, subfolder, **config)

    def add(self, name, content="{}"):
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(content)

    def mlx(self, shapes, file="adapters.safetensors", **config):
        tensors = {key: self.draw(*shape) for key, shape in shapes.items()}
        lora = {"rank": R, "scale": 20.0, "dropout": 0.0}
        config = config or {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": lora}
        self.write(tensors, file, {"format": "mlx"}, **config)

    def kohya(self, modules, prefix="lora_unet_"):
        tensors = self.pairs(modules, prefix, ends=("lora_down.weight", "lora_up.weight"))
        stems = {key.partition(".")[0] for key in tensors}
        alphas = {f"{stem}.alpha": np.float32(1) for stem in stems}
        self.write(tensors | alphas, "last.safetensors", {"ss_network_module": "networks.lora"})


# A language model, by trainers that write PEFT folders.
def peft(tool):
    tool.peft(tool.pairs(LINEAR))


def trl(tool):
    tool.peft(tool.pairs(LINEAR), use_qalora=False, target_parameters=None)
    tool.add("training_args.bin")
    tool.add("tokenizer.json")


def axolotl(tool):
    tool.peft(tool.pairs(LINEAR), loftq_config={}, megatron_config=None)
    tool.add("config.json")
    tool.add("checkpoint-8/trainer_state.json")


def llama_factory(tool):
    tool.peft(tool.pairs(LINEAR), target_modules=["k_proj", "q_proj"], eva_config=None)
    tool.add("trainer_log.jsonl")
    tool.add("all_results.json")


def unsloth(tool):
    mapping = {"base_model_class": "Qwen3ForCausalLM", "unsloth_fixed": True}
    target = r"(?:.*?(?:self_attn).*?(?:q_proj|k_proj))"
    base = "unsloth/qwen3-bnb-4bit"
    fields = {"auto_mapping": mapping, "target_modules": target, "base_model_name_or_path": base}
    tool.peft(tool.pairs(LINEAR), **fields, peft_version="0.18.0", use_bdlora=None)


def swift(tool):
    tool.peft(tool.pairs(LINEAR), "checkpoint-20", modules_to_save=[])
    tool.add("checkpoint-20/additional_config.json")
    tool.add("checkpoint-20/args.json")


def torchtune(tool):
    config = {"r": R, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"], "peft_type": "LORA"}
    tensors = tool.pairs(LINEAR, "base_model.model.")
    tool.write(tensors, "adapter_model.safetensors", base_model_name_or_path="owner/base", **config)


def megatron(tool):
    fields = {"exclude_modules": [], "canonical_mapping": {}, "base_model_name_or_path": ""}
    tool.peft(tool.pairs(LINEAR), **fields, peft_version=..., alpha_pattern={})


def tinker(tool):
    tensors = tool.pairs(LINEAR)
    tool.peft(tensors, peft_type=..., peft_version=..., target_modules="all-linear")


def skyrl(tool):
    tool.peft(tool.pairs(LINEAR), target_modules="all-linear", peft_version=...)


# Other models, by the same.
def embedding(tool):
    table = {"lora_embedding_A": (R, N), "lora_embedding_B": (M, R)}
    tensors = {f"model.embed_tokens.{end}": tool.draw(*shape) for end, shape in table.items()}
    tool.peft(tool.pairs(LINEAR) | tensors)


def fused(tool, **fields):
    experts, parts = f"{LAYER}.mlp.experts", {".base_layer": (2 * N, N), "": (N, N)}
    tensors = {}
    for level, (m, n) in parts.items():
        tensors[f"{experts}{level}.lora_A.weight"] = tool.draw(2 * R, n)
        tensors[f"{experts}{level}.lora_B.weight"] = tool.draw(m, 2 * R)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    tool.peft(tensors, target_modules=[], target_parameters=names, **fields)


def layers(tool):
    names = [f"{LAYER}.mlp.experts.{e}.{x}_proj" for e in range(2) for x in ("up", "down")]
    tool.peft(tool.pairs(dict.fromkeys(names, (M, N))))


def stacked(tool, names=("w1", "w3"), **fields):
    tensors = {}
    for name in names:
        stem = f"{LAYER}.mlp.experts.{name}"
        tensors |= {
            f"{stem}.lora_A.weight": tool.draw(2, R, N),
            f"{stem}.lora_B.weight": tool.draw(2, M, R),
        }
    tool.peft(tensors, peft_version=..., target_modules="all-linear", **fields)


def language_part(tool, subfolder=""):
    names = [path.replace("model.", "model.language_model.", 1) for path in ATTENTION]
    tool.peft(tool.pairs(dict.fromkeys(names, (M, N))), subfolder)


def all_parts(tool, subfolder=""):
    names = ["model.language_model.layers.0.self_attn.q_proj", "model.visual.blocks.0.attn.qkv"]
    tool.peft(tool.pairs(dict.fromkeys(names, (M, N))), subfolder)


def vision(tool):
    names = [f"vit.encoder.layer.0.attention.attention.{x}" for x in ("query", "value")]
    tool.peft(tool.pairs(dict.fromkeys(names, (M, N))), task_type=None)


# mlx-lm and mlx-vlm.
def mlx(tool):
    tool.mlx({f"{p}.lora_{x}": s for p in ATTENTION for x, s in (("a", (N, R)), ("b", (R, M)))})


def mlx_experts(tool):
    stem = f"{LAYER}.mlp.switch_mlp.up_proj"
    tool.mlx({f"{stem}.lora_a": (2, R, N), f"{stem}.lora_b": (2, M, R)})


def mlx_vlm(tool):
    names = [f"language_model.{path}" for path in ATTENTION]
    shapes = {f"{p}.{x}": s for p in names for x, s in (("A", (N, R)), ("B", (R, M)))}
    tool.mlx(shapes, rank=R, alpha=0.1, dropout=0.1)


# Images and video.
UNET = "down_blocks.0.attentions.0"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
FLUX = {"double_blocks.0.img_attn.qkv": (M, N), "single_blocks.0.linear1": (M, N)}
WAN = {"blocks.0.self_attn.q": (M, N), "blocks.0.ffn.0": (M, N)}
DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": (M, N),
    "single_transformer_blocks.0.attn.to_k": (M, N),
}


def flat(modules):
    return {path.replace(".", "_"): sizes for path, sizes in modules.items()}


def kohya_unet(tool):
    block = f"{UNET}.transformer_blocks.0.attn1"
    unet = {f"{UNET}.proj_in": (M, (N, 1, 1)), f"{block}.to_q": (M, N)}
    names = {f"lora_unet_{path}": sizes for path, sizes in flat(unet).items()}
    tool.kohya(
        names | {f"lora_te_{path}": sizes for path, sizes in flat({TEXT: (M, N)}).items()}, ""
    )


def kohya_sdxl(tool):
    block = "input_blocks_4_1_transformer_blocks_0"
    names = [f"lora_unet_{block}_{x}" for x in ("attn1_to_q", "ff_net_0_proj")]
    names += [f"lora_te{i}_{TEXT.replace('.', '_')}" for i in (1, 2)]
    tool.kohya(dict.fromkeys(names, (M, N)), "")


def kohya_flux(tool):
    tool.kohya(flat(FLUX))


def musubi(tool):
    tool.kohya(flat(WAN))


def onetrainer(tool):
    tool.kohya(flat(DIFFUSERS), "lora_transformer_")


def loha(tool):
    stem, tensors = "lora_unet_input_blocks_1_0_in_layers_2", {}
    for half in ("hada_w1", "hada_w2"):
        tensors[f"{stem}.{half}_a"] = tool.draw(R, M)
        tensors[f"{stem}.{half}_b"] = tool.draw(R, N)
        tensors[f"{stem}.{half.replace('w', 't')}"] = tool.draw(R, R, 3, 3)
    tool.write(tensors | {f"{stem}.alpha": np.float32(1)}, "loha.safetensors")


def lokr(tool):
    shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (M // 2, R), "lokr_w2_b": (R, N // 2)}
    tensors = {
        f"lora_unet_{stem}.{name}": tool.draw(*shape)
        for stem in flat(FLUX)
        for name, shape in shapes.items()
    }
    alphas = {f"lora_unet_{stem}.alpha": np.float32(1) for stem in flat(FLUX)}
    tool.write(tensors | alphas, "lokr.safetensors")


def scripts_unet(tool):
    block = f"unet.{UNET}.transformer_blocks.0.attn1"
    modules = {f"{block}.to_q": (M, N), f"{block}.to_out.0": (M, N)}
    tool.write(tool.pairs(modules), "pytorch_lora_weights.safetensors", {"format": "pt"})


def scripts_transformer(tool):
    notes = {"transformer.r": R, "transformer.lora_alpha": 4, "transformer.use_rslora": False}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(notes)}
    tensors = tool.pairs(DIFFUSERS, "transformer.")
    tool.write(tensors, "pytorch_lora_weights.safetensors", header)


def diffusion_pipe(tool):
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": ["q"]}
    tensors = tool.pairs(WAN, "diffusion_model.")
    tool.write(tensors, "adapter_model.safetensors", {"format": "pt"}, **config)


def ai_toolkit(tool):
    tool.write(tool.pairs(WAN, "diffusion_model."), "style.safetensors", {"name": "style"})


# JAX.
def checkpoint(tool, to=None):
    path = [*ATTENTION, f"{LAYER}.self_attn.v_proj"] if to else ATTENTION
    adapter = cm.Adapter({x: update(tool.rng, shape=(M, N)) for x in path})
    cm.save_orbax(adapter, tool.folder / "1", to=to, head_dim=HEAD_DIM if to else None)


PEFT_FOLDERS = "PEFT, TRL, Axolotl, LLaMA-Factory, Unsloth, ms-swift"
in_checkpoint = functools.partial(functools.partial, subfolder="checkpoint-20")

# What the tools of each row write, by the first two cells; tools in their order.
TOOLS = {
    (PEFT_FOLDERS, "language model"): (peft, trl, axolotl, llama_factory, unsloth, swift),
    ("PEFT", "language model, with its embedding"): (embedding,),
    ("PEFT", "experts in one parameter"): (fused,),
    ("PEFT", "experts in layers of their own"): (layers,),
    ("PEFT, ms-swift", "language part of a model for images (Gemma 3)"): (
        language_part,
        in_checkpoint(language_part),
    ),
    ("PEFT, ms-swift", "model for images and text, all of it"): (
        all_parts,
        in_checkpoint(all_parts),
    ),
    ("PEFT", "vision transformer"): (vision,),
    ("torchtune, Megatron-Bridge", "language model"): (torchtune, megatron),
    ("Megatron-Bridge", "experts in one parameter"): (
        functools.partial(fused, exclude_modules=[], canonical_mapping={}),
    ),
    ("Tinker, SkyRL", "language model"): (tinker, skyrl),
    ("Tinker, SkyRL", "experts, stacked"): (
        functools.partial(stacked, peft_type=...),
        functools.partial(stacked, names=("gate_proj", "up_proj")),
    ),
    ("mlx-lm", "language model"): (mlx,),
    ("mlx-lm", "experts, stacked"): (mlx_experts,),
    ("mlx-vlm", "language part of a model for images (Gemma 3)"): (mlx_vlm,),
    ("sd-scripts", "UNet of Stable Diffusion 1.5"): (kohya_unet,),
    ("sd-scripts", "UNet of SDXL"): (kohya_sdxl,),
    ("sd-scripts, musubi-tuner", "diffusion transformer"): (kohya_flux, musubi),
    ("OneTrainer", "diffusion transformer"): (onetrainer,),
    ("LyCORIS (LoHa)", "UNet of SDXL"): (loha,),
    ("LyCORIS (LoKr)", "diffusion transformer"): (lokr,),
    ("diffusers' scripts", "UNet of Stable Diffusion 1.5"): (scripts_unet,),
    ("diffusers' scripts", "diffusion transformer"): (scripts_transformer,),
    ("diffusion-pipe, ai-toolkit", "diffusion transformer"): (diffusion_pipe, ai_toolkit),
    (
        "Tunix (--names tunix), MaxText (--names maxtext-llama3.1), flax NNX",
        "language model",
    ): (
        functools.partial(checkpoint, to="tunix"),
        functools.partial(checkpoint, to="maxtext-llama3.1"),
        checkpoint,
    ),
}

# The base model of each kind, by the first words of its cell; others have no such class.
MODELS = {
    "language model": "Qwen3ForCausalLM",
    "experts": "Qwen3MoeForCausalLM",
    "language part": "Gemma3ForConditionalGeneration",
    "model for images and text": "Qwen2_5_VLForConditionalGeneration",
    "vision transformer": "ViTForImageClassification",
}


# --- The table ------------------------------------------------------------------------------
PAGE = (DOCS / "serving.md").read_text(encoding="utf-8")


def cells(line):
    return [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


HEADER, _, *LINES = [cells(line) for line in PAGE.splitlines() if line.startswith("|")]
TARGETS = [re.findall(r"--to (\w+)", cell) for cell in HEADER[2:]]
TABLE = {
    (tools, model): dict(zip(map(tuple, TARGETS), row, strict=True)) for tools, model, *row in LINES
}
REASONS = {
    letter: " ".join(words.split())
    for letter, words in re.findall(r'^- \*\*(\w)\*\*:[^"]*\("([^"]*)"\)', PAGE, re.MULTILINE)
}


def test_the_table_has_a_row_for_what_is_here():
    assert list(TABLE) == list(TOOLS)
    assert {cell for row in TABLE.values() for cell in row.values()} == {"yes", "kept", *REASONS}
    for (tools, _), makers in TOOLS.items():
        assert len(tools.split(", ")) == len(makers)


@pytest.fixture(autouse=True)
def _no_warnings():
    """Notes name the newest checkpoint, and ranks that were filled up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoreMergeWarning)
        yield


def by_canonical_name(adapter):
    return {canonical(path): lora for path, lora in adapter.read(adapter).items()}


def assert_same(ours, theirs):
    ours, theirs = by_canonical_name(ours), by_canonical_name(theirs)
    assert ours.keys() == theirs.keys()
    for path, lora in theirs.items():
        a, b = np.asarray(ours[path].a), np.asarray(ours[path].b)
        assert np.array_equal(a[: lora.rank], lora.a), path
        assert np.array_equal(b[:, : lora.rank], lora.b), path
        assert not a[lora.rank :].any(), path
        assert ours[path].kind == lora.kind, path


def convert(adapter, out, targets, options):
    """Writes an adapter in the first format that takes it; returns the refusals of the others."""
    refusals = []
    for to in targets:
        try:
            find_target(to).save(adapter, out, to=to, **(options if to == "gguf" else {}))
        except CoreMergeError as error:
            refusals.append(str(error))
            assert not out.exists()
        else:
            return refusals, to
    return refusals, None


def check(adapter, row, folder, columns, options):
    """Compares what becomes of an adapter with the cells of a row."""
    for targets in columns:
        cell, out = TABLE[row][targets], folder / targets[0]
        refusals, to = convert(adapter, out, targets, options)
        if cell not in ("yes", "kept"):
            assert to is None, (targets, cell)
            assert any(REASONS[cell] in refusal for refusal in refusals), refusals
            assert all("\n" not in refusal for refusal in refusals)
        else:
            assert to is not None, refusals
            if to != "gguf":
                assert_same(cm.open_adapter(out), adapter)


def base_config(model, folder):
    name = next((name for kind, name in MODELS.items() if model.startswith(kind)), None)
    config = {"architectures": [name]} if name else {"_class_name": "FluxTransformer2DModel"}
    (folder / "config.json").write_text(json.dumps(BASE | config))
    return {"base_config": folder / "config.json"}


def hugging_face(adapter, tool):
    """The adapter as ``coremerge convert --names`` gives it."""
    names = re.search(r"--names ([\w.-]+)", tool)
    return translate(adapter, names[1], head_dim=HEAD_DIM) if names else adapter


@pytest.mark.parametrize("row", TOOLS, ids=" | ".join)
def test_a_row(row, tmp_path):
    tools, model = row
    options = base_config(model, tmp_path)
    columns = [column for column in TABLE[row] if column != ("gguf",) or has_gguf()]
    quick = [column for column in columns if column != ("orbax",)]
    for i, (tool, make) in enumerate(zip(tools.split(", "), TOOLS[row], strict=True)):
        make(Tool(tmp_path / f"{i}", i))
        adapter = hugging_face(cm.open_adapter(tmp_path / f"{i}"), tool)
        check(adapter, row, tmp_path / f"{i}-served", quick, options)
    make(Tool(tmp_path / "another", 9))
    sources = (str(tmp_path / f"{i}"), str(tmp_path / "another"))
    run_merge(Recipe(adapters=sources).resolve(), tmp_path / "merged")
    merged = hugging_face(cm.open_adapter(tmp_path / "merged"), tool)
    assert by_canonical_name(merged).keys() == by_canonical_name(adapter).keys()
    check(merged, row, tmp_path / "merged-served", columns, options)


def has_gguf():
    try:
        import gguf  # noqa: F401
    except ImportError:
        return False
    return True


GGUF = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}


@pytest.mark.oracle
@pytest.mark.parametrize(
    "row", [row for row in TOOLS if TABLE[row]["gguf",] == "yes"], ids=" | ".join
)
def test_gguf_files_have_the_same_updates(row, tmp_path):
    import gguf

    tools, model = row
    make, tool = TOOLS[row][0], tools.split(", ")[0]
    make(Tool(tmp_path / "source", 0))
    adapter = hugging_face(cm.open_adapter(tmp_path / "source"), tool)
    convert(adapter, tmp_path / "out", ["gguf"], base_config(model, tmp_path))
    reader = gguf.GGUFReader(tmp_path / "out" / "out.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == R
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for path, lora in adapter.read(adapter).items():
        if (end := path.partition(".layers.0.")[2]) in GGUF:
            name = f"blk.0.{GGUF[end]}.weight"
            assert np.array_equal(tensors.pop(f"{name}.lora_a"), lora.a)
            assert np.array_equal(tensors.pop(f"{name}.lora_b"), lora.b)
    assert all("attn_v" in name for name in tensors)
