"""GGUF adapters, as llama.cpp loads them."""

import json
import re
import struct
import sys

import numpy as np
import pytest
from kinds import update

import coremerge_jax as cm
from coremerge_jax.io.formats import find_target, hash_source

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, SIZE, WIDTH, INNER = 4, 2, 6, 10, 14
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": SIZE,
    "hidden_size": WIDTH,
    "tie_word_embeddings": False,
}
# Modules of one layer, by their names in llama.cpp.
LINEAR = {
    "attn_q": ("self_attn.q_proj", HEADS * SIZE, WIDTH),
    "attn_k": ("self_attn.k_proj", KV_HEADS * SIZE, WIDTH),
    "attn_v": ("self_attn.v_proj", KV_HEADS * SIZE, WIDTH),
    "attn_output": ("self_attn.o_proj", WIDTH, HEADS * SIZE),
    "ffn_gate": ("mlp.gate_proj", INNER, WIDTH),
    "ffn_up": ("mlp.up_proj", INNER, WIDTH),
    "ffn_down": ("mlp.down_proj", WIDTH, INNER),
}


def modules(rng, prefix="model.layers.1."):
    """A layer's modules, of several ranks."""
    return {
        f"{prefix}{path}": update(rng, shape=(m, n), rank=1 + i % 3)
        for i, (path, m, n) in enumerate(LINEAR.values())
    }


@pytest.fixture
def save(tmp_path):
    def write(adapter, config=(), **options):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **dict(config)}))
        out = tmp_path / "out"
        save = find_target("gguf").save
        return out, save(adapter, out, to="gguf", base_config=tmp_path, **options)

    return write


def read(folder):
    """The file's fields, and its tensors with rows first."""
    reader = gguf.GGUFReader(folder / f"{folder.name}.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def in_our_order(b, heads):
    """Rows of B with the even rows of each head first, then the odd ones."""
    head = b.reshape(heads, -1, b.shape[1])
    return np.concatenate([head[:, ::2], head[:, 1::2]], axis=1).reshape(b.shape)


@pytest.mark.oracle
def test_the_update_is_ours_as_llama_cpp_applies_it(rng, save):
    adapter = cm.Adapter({**modules(rng), "lm_head": update(rng, shape=(21, WIDTH))})
    out, written = save(adapter)
    fields, tensors = read(out)
    assert set(written.ranks.values()) == {3}
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    names = {f"blk.1.{name}": f"model.layers.1.{path}" for name, (path, *_) in LINEAR.items()}
    assert len(tensors) == 2 * len(adapter)
    for name, path in {**names, "output": "lm_head"}.items():
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        lora = adapter[path]
        assert a.dtype == b.dtype == np.float32
        assert (len(b), a.shape[1]) == lora.shape
        heads = {"q": HEADS, "k": KV_HEADS}.get(name.rpartition("_")[2])
        b = b if heads is None else in_our_order(b, heads)
        scale = np.float32(fields["adapter.lora.alpha"]) / np.float32(b.shape[1])
        assert np.array_equal(scale * (b[:, : lora.rank] @ a[: lora.rank]), lora.dense())
        assert not a[lora.rank :].any()
        assert not b[:, lora.rank :].any()


def rotated(x, angles, interleaved):
    """Rows of a head after a rotary embedding, of neighbours or of the two halves."""
    half = x.reshape(-1, 2).T if interleaved else x.reshape(2, -1)
    turned = half[0] * np.cos(angles) - half[1] * np.sin(angles), half[0] * np.sin(angles)
    turned = np.stack([turned[0], turned[1] + half[1] * np.cos(angles)])
    return (turned.T if interleaved else turned).reshape(-1)


def test_rows_are_reordered_as_rotary_embeddings_of_neighbours_need(rng, save):
    """Scores of queries and keys are those of Hugging Face's model, which rotates halves."""
    adapter = cm.Adapter(modules(rng))
    out, _ = save(adapter)
    tensors, x = read(out)[1], rng.standard_normal(WIDTH)
    scores = []
    for interleaved in (True, False):
        found = []
        for name, heads, position in (("attn_q", HEADS, 5), ("attn_k", KV_HEADS, 2)):
            weight = adapter[f"model.layers.1.{LINEAR[name][0]}"].dense()
            if interleaved:
                factors = (tensors[f"blk.1.{name}.weight.lora_{side}"] for side in "ba")
                weight = np.matmul(*factors)
            angles = position / 10 ** np.arange(SIZE // 2)
            rows = (weight @ x).reshape(heads, SIZE)
            found.append(np.stack([rotated(row, angles, interleaved) for row in rows]))
        scores.append(found[0].reshape(KV_HEADS, -1, SIZE) @ found[1][:, :, None])
    assert np.allclose(*scores, rtol=1e-4)


GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "num_hidden_layers": None,
    "text_config": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize(
    ("config", "prefix", "architecture"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "model.layers.1.", "qwen3"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "model.layers.1.", "gemma2"),
        (GEMMA3, "model.language_model.layers.1.", "gemma3"),
        (GEMMA3, "language_model.model.layers.1.", "gemma3"),
    ],
)
def test_other_architectures_keep_the_order_of_rows(rng, save, config, prefix, architecture):
    adapter = cm.Adapter(modules(rng, prefix))
    fields, tensors = read(save(adapter, config)[0])
    assert fields["general.architecture"] == architecture
    b, ours = tensors["blk.1.attn_q.weight.lora_b"], adapter[f"{prefix}self_attn.q_proj"].b
    assert np.array_equal(b[:, : ours.shape[1]], ours)


def test_fused_layers_of_phi3(rng, save):
    paths = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
    adapter = cm.Adapter({f"model.layers.0.{path}": update(rng) for path in paths})
    _, tensors = read(save(adapter, {"architectures": ["Phi3ForCausalLM"]})[0])
    assert {key.split(".")[2] for key in tensors} == set(paths.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_dtypes_are_those_of_gguf(rng, save, dtype):
    adapter = cm.Adapter(modules(rng))
    out, _ = save(adapter, dtype=dtype)
    tensors = gguf.GGUFReader(out / "out.gguf").tensors
    assert {x.tensor_type.name for x in tensors} == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    (a,) = (x for x in tensors if x.name == "blk.1.ffn_up.weight.lora_a")
    ours = adapter["model.layers.1.mlp.up_proj"].a.astype(dtype)
    assert list(a.shape) == [WIDTH, 3]
    assert np.ascontiguousarray(a.data).tobytes()[: ours.nbytes] == ours.tobytes()


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.9}])
def test_cut_modules_have_one_rank_too(rng, save, options):
    out, written = save(cm.Adapter(modules(rng)), **options)
    alpha, tensors = read(out)[0]["adapter.lora.alpha"], read(out)[1]
    assert set(written.ranks.values()) == {alpha}
    assert {x.shape[1] for key, x in tensors.items() if key.endswith("b")} == {alpha}
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "coremerge.json",
        "out.gguf",
    ]
    assert list(hash_source(out)) == ["out.gguf"]


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("path", "kind", "config", "error", "message"),
    [
        ("model.embed_tokens", cm.Kind("embedding"), {}, cm.UnsupportedError, "is an embedding; "),
        ("model.layers.0.mlp.w[0]", cm.Kind("expert"), {}, cm.UnsupportedError, "is an expert of"),
        (Q, cm.Kind(transposed=True), {}, cm.UnsupportedError, "is a transposed layer"),
        ("model.layers.2.self_attn.q_proj", cm.Kind(), {}, cm.UnsupportedError, "of this size"),
        ("model.vision.fc1", cm.Kind(), {}, cm.UnsupportedError, "no linear layer of attention"),
        ("model.norm", cm.Kind(), {}, cm.UnsupportedError, "no linear layer of attention"),
        ("lm_head", cm.Kind(), {"tie_word_embeddings": True}, cm.UnsupportedError, "is tied"),
        (
            "lm_head",
            cm.Kind(),
            {"architectures": ["GemmaForCausalLM"]},
            cm.UnsupportedError,
            "no linear",
        ),
        (Q, cm.Kind(), {"head_dim": 8}, cm.MismatchError, "24 rows; by .* 4 heads of 8"),
        (Q, cm.Kind(), {"num_attention_heads": 0}, cm.FormatError, "num_attention_heads is 0"),
        (Q, cm.Kind(), {"num_hidden_layers": None}, cm.FormatError, "num_hidden_layers is None"),
        (Q, cm.Kind(), {"architectures": ["MixtralForCausalLM"]}, cm.UnsupportedError, "'Mixtral"),
        (Q, cm.Kind(), {"architectures": None}, cm.UnsupportedError, "architecture None"),
        (Q, cm.Kind(), {"architectures": 3}, cm.UnsupportedError, "architecture None"),
        (Q, cm.Kind(), {"architectures": [[]]}, cm.UnsupportedError, "architecture list"),
    ],
)
def test_what_is_not_certain_is_refused(rng, save, tmp_path, path, kind, config, error, message):
    adapter = cm.Adapter({path: update(rng, kind, (24, WIDTH))})
    with pytest.raises(error, match=message):
        save(adapter, config)
    assert not (tmp_path / "out").exists()


def test_extras_and_two_modules_of_one_weight_are_refused(rng, save):
    extras = {"score.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(
        cm.UnsupportedError, match=re.escape("tensor 'score.weight' is no low-rank")
    ):
        save(cm.Adapter(modules(rng), extras=extras))
    twice = {**modules(rng), **modules(rng, "language_model.model.layers.1.")}
    with pytest.raises(cm.UnsupportedError, match="are one weight in"):
        save(cm.Adapter(twice))


def test_the_configuration_is_that_of_the_base_model(rng, tmp_path):
    save = find_target("gguf").save
    with pytest.raises(cm.FormatError, match=r"base model \(unknown\).*--base-config"):
        save(cm.Adapter(modules(rng)), tmp_path / "out", to="gguf")
    with pytest.raises(cm.FormatError, match=r"no config\.json"):
        save(cm.Adapter(modules(rng)), tmp_path / "out", to="gguf", base_config=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    adapter = cm.Adapter(modules(rng), metadata=cm.Metadata(base_model=str(tmp_path)))
    save(adapter, tmp_path / "out", to="gguf")
    assert len(read(tmp_path / "out")[1]) == 2 * len(adapter)


def base_file(path, config=(), **more):
    """Writes the base model of CONFIG, as far as it matters here, by llama.cpp's own library."""
    config, architecture = {**CONFIG, **dict(config)}, more.pop("architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(more.pop("type", gguf.GGUFType.MODEL))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_token_list(["a", "b"])
    shapes = {f"blk.1.{name}.weight": shape for name, (_, *shape) in LINEAR.items()}
    shapes |= {} if config["tie_word_embeddings"] else {"output.weight": (21, WIDTH)}
    for name, shape in {**shapes, **more.pop("shapes", {})}.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_base_model_may_be_a_gguf_file(rng, save, tmp_path):
    adapter = cm.Adapter({**modules(rng), "lm_head": update(rng, shape=(21, WIDTH))})
    expected, _ = save(adapter)
    base = base_file(tmp_path / "base.gguf")
    find_target("gguf").save(adapter, tmp_path / "other", to="gguf", base_config=base)
    (tmp_path / "other/other.gguf").rename(tmp_path / "other/out.gguf")
    written = [(folder / "out.gguf").read_bytes() for folder in (expected, tmp_path / "other")]
    assert len(written[0]) == len(written[1])
    first, second = (
        gguf.GGUFReader(x / "out.gguf").tensors for x in (expected, tmp_path / "other")
    )
    for ours, theirs in zip(first, second, strict=True):
        assert ours.name == theirs.name
        assert np.array_equal(ours.data, theirs.data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": {"tie_word_embeddings": True}}, cm.UnsupportedError, "is tied"),
        ({"architecture": "mamba"}, cm.UnsupportedError, "architecture 'mamba'"),
        ({"type": gguf.GGUFType.ADAPTER}, cm.FormatError, "of type 'adapter'; expected the base"),
        (
            {"shapes": {"blk.1.ffn_up.weight": (9, WIDTH)}},
            cm.MismatchError,
            r"up_proj' is \(14, 10\); in .*'blk.1.ffn_up.weight' is \[9, 10\]; this is another",
        ),
    ],
)
def test_another_base_model_in_a_gguf_file_is_refused(rng, tmp_path, change, error, message):
    adapter = cm.Adapter({**modules(rng), "lm_head": update(rng, shape=(21, WIDTH))})
    base = base_file(tmp_path / "base.gguf", **change)
    with pytest.raises(error, match=message):
        find_target("gguf").save(adapter, tmp_path / "out", to="gguf", base_config=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 3, 20, 60, 200])
def test_a_broken_gguf_file_of_a_base_model_is_refused(rng, tmp_path, size):
    base = base_file(tmp_path / "base.gguf")
    base.write_bytes(base.read_bytes()[:size])
    adapter = cm.Adapter(modules(rng))
    with pytest.raises(cm.FormatError, match=r"base\.gguf: cannot be read as a GGUF file"):
        find_target("gguf").save(adapter, tmp_path / "out", to="gguf", base_config=base)


@pytest.mark.parametrize(("inner", "count"), [(0, 2**60), (8, 11_000_000), (12, 1000), (9, 1000)])
def test_endless_lists_in_a_gguf_file_are_refused(rng, tmp_path, inner, count):
    """Without reading them: the package makes an object of each claimed entry."""
    base = tmp_path / "base.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x"
    base.write_bytes(header + struct.pack("<IIQ", 9, inner, count) + bytes(64))
    with pytest.raises(cm.FormatError, match=r"cannot be read as a GGUF file: "):
        find_target("gguf").save(cm.Adapter(modules(rng)), tmp_path, to="gguf", base_config=base)


def test_without_the_package(rng, save, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(cm.UnsupportedError, match="pip install gguf"):
        save(cm.Adapter(modules(rng)))


def test_a_file_is_not_read(rng, save):
    out, _ = save(cm.Adapter(modules(rng)))
    for source in (out, out / "out.gguf"):
        with pytest.raises(cm.UnsupportedError, match=r"out\.gguf: is a GGUF file .*written, but"):
            cm.open_adapter(source)
