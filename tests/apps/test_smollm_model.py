"""The model of the benchmark of generative tasks, and merges of its adapters, in other programs."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from common import packages
from flax import nnx
from helpers import distance
from scipy.special import log_softmax
from smollm import model as smollm
from smollm import quick, sources

import coremerge_jax as cm

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

TINY = quick.Tiny()
TEXTS = (
    "Hello, world! It's 12:45, 3.14 €, a naïve façade.",
    "  two  spaces\n\nnew\tlines \n",
    "日本語 emoji 🙂 don't 007",
    "<|im_start|>user\nhi<|im_end|>\n",
    "Date in French: Sunday 23 March\nAnswer:",
    " dimanche 23 mars",
)


@contextlib.contextmanager
def lenient():
    """optax and flax promote."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def _lenient():
    with lenient():
        yield


@pytest.fixture(scope="module")
def real_file(tmp_path_factory):
    """The benchmark's own model."""
    try:
        folder = packages.fetch(sources.MODEL, tmp_path_factory.mktemp("packages"))
    except RuntimeError as error:
        pytest.skip(str(error))
    return folder / sources.FILE


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A GGUF file of a tiny model, written by llama.cpp's own library."""
    gguf = pytest.importorskip("gguf")
    file, c = tmp_path_factory.mktemp("model") / "tiny.gguf", TINY.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(c.vocabulary)
    writer.add_block_count(c.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.hidden)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.epsilon)
    for name, value in TINY.tensors():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@nnx.jit
def logits(model, tokens):
    return model(tokens)


def theirs(file):
    """The model of the file in transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def expected_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def assert_same(found, expected):
    off = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"largest difference of logits: {off:.1e} of {np.abs(expected).max():.1f}")
    assert off < 1e-4


both_files = pytest.mark.parametrize(
    "which", ["small_file", pytest.param("real_file", marks=pytest.mark.nightly)]
)


@both_files
def test_logits_are_those_of_transformers(which, request):
    file = request.getfixturevalue(which)
    base = smollm.File(file)
    tokens = np.random.default_rng(0).integers(3, base.config.vocabulary, (2, 24))
    found = np.asarray(logits(smollm.load(base), tokens))
    assert_same(found, expected_logits(theirs(file), tokens))


@pytest.mark.nightly
def test_tokens_are_those_of_transformers(real_file):
    transformers = pytest.importorskip("transformers")
    tokenizer = smollm.File(real_file).tokenizer()
    other = transformers.AutoTokenizer.from_pretrained(real_file.parent, gguf_file=real_file.name)
    for text in TEXTS:
        tokens = tokenizer.encode(text).ids
        assert tokens == other(text)["input_ids"]
        assert tokenizer.decode(tokens, skip_special_tokens=False) == text


# --- A merge in memory, and what other programs make of it --------------------------------------


def trained(base, seed):
    """A model with factors as after training; here they are random."""
    model, noise = smollm.load(base, 4, smollm.LINEAR, seed), nnx.Rngs(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            leaf[...] = 0.06 * noise.normal(leaf.shape)
    return model


class Merged(NamedTuple):
    """A merge, its logits and those of the base model, and where it is."""

    base: smollm.File
    file: Path
    tokens: np.ndarray
    adapter: cm.Adapter
    logits: np.ndarray
    plain: np.ndarray
    folder: Path


@pytest.fixture(scope="module")
def merged(request, tmp_path_factory):
    """A model's file and tokens; a merge of two models of it, its logits, and its PEFT folder."""
    file = request.getfixturevalue(request.param)
    base = smollm.File(file)
    tokens = np.random.default_rng(0).integers(3, base.config.vocabulary, (4, 16))
    with lenient():
        models = [trained(base, seed) for seed in (1, 2)]
        adapters = [cm.from_nnx(model) for model in models]
        inputs = [[tokens[:2]], [tokens[2:]]]
        statistics = cm.collect(models[0], adapters, inputs, smollm.SmolLM.__call__)
        adapter = cm.merge(adapters, cm.regmean(), statistics=statistics)
        cm.update_nnx(models[0], adapter)
        found, plain = (np.asarray(logits(x, tokens)) for x in (models[0], smollm.load(base)))
    folder = tmp_path_factory.mktemp("merged") / "peft"
    cm.save_peft(cm.trees.translate(adapter, "tunix"), folder)
    return Merged(base, file, tokens, adapter, found, plain, folder)


def of(*names):
    """Parametrizes over the files; the real one is for the night."""
    marks = {"real_file": pytest.mark.nightly}
    found = [pytest.param(x, marks=marks.get(x, ())) for x in names]
    return pytest.mark.parametrize("merged", found, indirect=True, scope="module")


each_merge = of("small_file", "real_file")


@each_merge
def test_a_merge_changes_the_model_as_it_does_in_transformers_with_peft(merged):
    peft = pytest.importorskip("peft")
    other = peft.PeftModel.from_pretrained(theirs(merged.file), merged.folder)
    assert_same(merged.logits, expected_logits(other, merged.tokens))
    assert distance(merged.plain, merged.logits) > 0.05


@of("small_file")
def test_a_merge_does_the_same_from_an_orbax_checkpoint(merged, tmp_path):
    cm.save_orbax(merged.adapter, tmp_path / "checkpoint")
    model = smollm.load(merged.base, 4, smollm.LINEAR)
    cm.update_nnx(model, cm.open_orbax(tmp_path / "checkpoint"))
    assert distance(np.asarray(logits(model, merged.tokens)), merged.logits) < 1e-4


def convert(merged, out):
    """Writes a file for llama.cpp, as a user would."""
    options = ["--to", "gguf", "--base-config", merged.file]
    words = ["convert", merged.folder, "-o", out, *options]
    subprocess.run([sys.executable, "-m", "coremerge_jax", *map(str, words)], check=True)
    return out / f"{out.name}.gguf"


@each_merge
def test_a_merge_does_the_same_as_gguf_on_the_gguf_base(merged, tmp_path):
    """Here the update is added to the weights; llama.cpp adds it to outputs."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(convert(merged, tmp_path / "out"))
    alpha = reader.fields["adapter.lora.alpha"].contents()
    factors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    tensors = dict(merged.base.tensors())
    for name in {key.rpartition(".lora_")[0] for key in factors}:
        b, a = factors.pop(f"{name}.lora_b"), factors.pop(f"{name}.lora_a")
        tensors[name] = tensors[name] + alpha / len(a) * (b @ a)
    assert not factors
    model = smollm.with_weights(merged.base.config, tensors)
    assert distance(np.asarray(logits(model, merged.tokens)), merged.logits) < 1e-4


@of("real_file")
def test_llama_cpp_itself_computes_the_same(merged, tmp_path):
    """It rounds activations to 8 bits, so its likelihoods are near, and not equal."""
    llama = pytest.importorskip("xllamacpp")
    adapter = llama.CommonAdapterLoraInfo(str(convert(merged, tmp_path / "out")), 1.0)
    options = llama.CommonParams()
    options.model.path, options.lora_adapters = str(merged.file), [adapter]
    options.n_ctx, options.n_parallel, options.warmup = 128, 1, False
    options.cpuparams.n_threads = 2
    server = llama.Server(options)
    differences = []
    for row, *ours in zip(merged.tokens, merged.logits, merged.plain, strict=True):
        request = {"prompt": row.tolist(), "max_tokens": 1, "temperature": 0, "logprobs": 20}
        (choice,) = server.handle_completions(request)["choices"]
        likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
        tokens, told = zip(*((x["id"], x["logprob"]) for x in likeliest), strict=True)
        assert len(tokens) == 20
        differences.append([np.subtract(told, log_softmax(x[-1])[list(tokens)]) for x in ours])
    near, far = np.abs(differences).mean(axis=(0, 2))
    print(f"mean difference of log-likelihoods: {near:.3f}, without the adapter {far:.3f}")
    assert near < 0.2 * far


def test_parameters_have_the_names_and_shapes_of_tunix():
    llama = pytest.importorskip("tunix.models.llama3.model")
    c = TINY.config
    config = llama.ModelConfig(
        num_layers=c.layers,
        vocab_size=c.vocabulary,
        embed_dim=c.width,
        hidden_dim=c.hidden,
        num_heads=c.heads,
        head_dim=c.head_dim,
        num_kv_heads=c.kv_heads,
        rope_theta=int(c.rope_base),
        norm_eps=c.epsilon,
        weight_tying=True,
    )
    models = (llama.Llama3(config, rngs=nnx.Rngs(0)), smollm.load(TINY))
    trees = (nnx.to_flat_state(nnx.state(model, nnx.Param)) for model in models)
    first, second = ({path: leaf.shape for path, leaf in tree} for tree in trees)
    assert first == second
