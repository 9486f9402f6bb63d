"""Adapters of other tools: read by their definitions, written as they were, or refused by name."""

import contextlib
import json
import warnings

import ml_dtypes
import numpy as np
import pytest
from hostile import broken, run
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import assert_same, update
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import coremerge_jax as cm
from coremerge_jax.errors import CoreMergeError, CoreMergeWarning
from coremerge_jax.io import lycoris
from coremerge_jax.io.formats import find_format, find_target
from coremerge_jax.io.one_file.kohya_names import flatten_all, unflatten

CONV = cm.Kind("conv2d", kernel=(3, 3, 2))
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def write(tmp_path):
    """Writes a file, or with a name that ends in a slash, a folder with one."""

    def make(tensors, name="x.safetensors", notes=None, **others):
        file = tmp_path / name
        if name.endswith("/"):
            file = file / "weights.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: np.array(v, order="C") for k, v in tensors.items()}, file, notes)
        for other, content in others.items():
            (file.parent / f"{other}.json").write_text(json.dumps(content))
        return file.parent if name.endswith("/") else file

    return make


def draw(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def pair(rng, stem, m=4, n=6, r=2, ends=("lora_A.weight", "lora_B.weight")):
    return {f"{stem}.{ends[0]}": draw(rng, r, n), f"{stem}.{ends[1]}": draw(rng, m, r)}


def kohya(rng, name, alpha=1.0, **sizes):
    tensors = pair(rng, name, **sizes, ends=("lora_down.weight", "lora_up.weight"))
    return tensors | ({} if alpha is None else {f"{name}.alpha": np.float32(alpha)})


def assert_update(adapter, path, expected, rtol=2e-6):
    found = np.asarray(adapter[path].dense())
    assert np.allclose(found, expected.reshape(len(expected), -1), rtol=rtol, atol=rtol), path


def refused(source, *parts, error=CoreMergeError, **options):
    """An adapter is refused in one line with these parts in it."""
    with pytest.raises(error) as caught:
        cm.open_adapter(source, **options)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert len(message) < 2000


def save(adapter, out, to, **options):
    return find_target(to).save(adapter, out, to=to, **options)


def the_file(folder):
    (file,) = folder.glob("*.safetensors")
    return file


# --- kohya ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("alpha", [None, 1.0, 3.0])
def test_a_kohya_update_is_up_times_down_times_alpha_by_rank(rng, write, dtype, alpha):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {key: value.astype(dtype) for key, value in kohya(rng, name, alpha).items()}
    adapter = cm.open_adapter(write(tensors))
    up, down = (tensors[f"{name}.lora_{x}.weight"].astype(np.float64) for x in ("up", "down"))
    assert_update(
        adapter, "unet.mid_block.attentions.0.proj_in", (alpha or 2.0) / 2 * up @ down, rtol=1e-5
    )
    assert adapter.metadata.format == "kohya"
    assert (adapter.metadata.rank, adapter.metadata.alpha) == (2, alpha)
    assert adapter.metadata.dtype == np.dtype(dtype).name


def test_convolutions_of_kohya(rng, write):
    a, b = "lora_unet_conv_in", "lora_unet_conv_out"
    tensors = {
        f"{a}.lora_down.weight": draw(rng, 2, 3, 3, 2),
        f"{a}.lora_up.weight": draw(rng, 4, 2, 1, 1),
        f"{b}.lora_down.weight": draw(rng, 2, 3, 1, 1),
        f"{b}.lora_mid.weight": draw(rng, 2, 2, 3, 2),
        f"{b}.lora_up.weight": draw(rng, 4, 2, 1, 1),
        f"{b}.alpha": np.float32(6),
    }
    adapter = cm.open_adapter(write(tensors))
    down, up, mid, inner, out = (
        tensors[key].astype(np.float64)
        for key in (
            f"{a}.lora_down.weight",
            f"{a}.lora_up.weight",
            f"{b}.lora_mid.weight",
            f"{b}.lora_down.weight",
            f"{b}.lora_up.weight",
        )
    )
    assert_update(adapter, "unet.conv_in", np.einsum("or,rihw->oihw", up[..., 0, 0], down))
    chain = np.einsum("or,rshw,si->oihw", out[..., 0, 0], mid, inner[..., 0, 0])
    assert_update(adapter, "unet.conv_out", 3 * chain)
    assert adapter["unet.conv_in"].kind == adapter["unet.conv_out"].kind == CONV


PATHS = {
    f"lora_unet_{UNET.replace('.', '_')}": f"unet.{UNET}",
    "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0": (
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0"
    ),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "lora_unet_down_blocks_2_resnets_1_time_emb_proj": "unet.down_blocks.2.resnets.1.time_emb_proj",
    "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
    f"lora_te_{CLIP.replace('.', '_')}": f"text_encoder.{CLIP}",
    "lora_te_text_model_encoder_layers_3_mlp_fc1": (
        "text_encoder.text_model.encoder.layers.3.mlp.fc1"
    ),
}

FAMILIES = {
    "Flux": {
        "lora_unet_double_blocks_0_img_attn_proj": "diffusion_model.double_blocks.0.img_attn.proj",
        "lora_unet_double_blocks_0_txt_mlp_2": "diffusion_model.double_blocks.0.txt_mlp.2",
        "lora_unet_single_blocks_7_modulation_lin": (
            "diffusion_model.single_blocks.7.modulation.lin"
        ),
        f"lora_te1_{CLIP.replace('.', '_')}": f"text_encoder.{CLIP}",
        "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0": (
            "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0"
        ),
    },
    "HunyuanVideo": {
        "lora_unet_double_blocks_0_img_attn_qkv": "diffusion_model.double_blocks.0.img_attn_qkv",
        "lora_unet_double_blocks_0_img_mlp_fc1": "diffusion_model.double_blocks.0.img_mlp.fc1",
    },
    "SDXL": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
        ),
        "lora_unet_out_2": "diffusion_model.out.2",
        f"lora_te1_{CLIP.replace('.', '_')}": f"text_encoder.{CLIP}",
        f"lora_te2_{CLIP.replace('.', '_')}": f"text_encoder_2.{CLIP}",
    },
    "SD3": {
        "lora_unet_joint_blocks_0_context_block_attn_qkv": (
            "diffusion_model.joint_blocks.0.context_block.attn.qkv"
        )
    },
    "Wan": {
        "lora_unet_blocks_0_cross_attn_k_img": "diffusion_model.blocks.0.cross_attn.k_img",
        "lora_unet_blocks_0_ffn_0": "diffusion_model.blocks.0.ffn.0",
    },
    "Chroma": {
        "lora_unet_double_blocks_0_img_attn_qkv": "diffusion_model.double_blocks.0.img_attn.qkv",
        "lora_unet_distilled_guidance_layer_layers_0_in_layer": (
            "diffusion_model.distilled_guidance_layer.layers.0.in_layer"
        ),
    },
    "LTX": {
        "lora_unet_transformer_blocks_0_attn2_to_out_0": (
            "diffusion_model.transformer_blocks.0.attn2.to_out.0"
        ),
        "lora_unet_adaln_single_linear": "diffusion_model.adaln_single.linear",
    },
    "Cosmos": {
        "lora_unet_blocks_0_adaln_modulation_self_attn_1": (
            "diffusion_model.blocks.0.adaln_modulation_self_attn.1"
        ),
        "lora_unet_blocks_0_cross_attn_output_proj": (
            "diffusion_model.blocks.0.cross_attn.output_proj"
        ),
    },
    "HiDream": {
        "lora_unet_double_stream_blocks_0_block_ff_i_experts_0_w1": (
            "diffusion_model.double_stream_blocks.0.block.ff_i.experts.0.w1"
        ),
        "lora_unet_double_stream_blocks_0_block_attn1_to_q_t": (
            "diffusion_model.double_stream_blocks.0.block.attn1.to_q_t"
        ),
    },
    "transformers by diffusers' names": {
        "lora_transformer_transformer_blocks_0_attn_to_add_out": (
            "transformer.transformer_blocks.0.attn.to_add_out"
        )
    },
    "Stable Diffusion 1": PATHS,
    "names that are not known": {
        name: name for name in ("lora_unet_foo_bar", "lycoris_blocks_0", "lora_prior_te_x")
    },
    # No other module tells whether the model has one text encoder, or several.
    "only the first text encoder": dict.fromkeys(
        [f"lora_te1_{CLIP.replace('.', '_')}"], f"lora_te1_{CLIP.replace('.', '_')}"
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_flat_names_become_paths_and_flat_again(family):
    names = FAMILIES[family]
    assert unflatten(names) == names
    assert flatten_all(names.values()) == {path: name for name, path in names.items()}


@given(
    words=st.lists(st.sampled_from(["0", "1", "proj", "to", "q", "to_q", "attn1", "x"]), max_size=8)
)
@settings(max_examples=50)
def test_any_name_comes_back(words):
    names = ["_".join(["lora_unet", "mid_block", *words]), "lora_te_x", "lora_te1_x"]
    paths = unflatten(names)
    flat = flatten_all(paths.values())
    assert [flat[paths[name]] for name in names] == names


@pytest.mark.parametrize(
    "names",
    [
        ("diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_0_self_attn_q"),
        ("diffusion_model.x", "model.diffusion_model.x"),
        ("unet.conv_in", "lora_unet_conv_in"),
        ("lora_te_x", "lora_te1_x"),
    ],
)
def test_one_module_in_two_spellings_is_refused(rng, write, names):
    source = write(pair(rng, names[0]) | pair(rng, names[1]))
    refused(source, *map(repr, names), "expected one update a module", error=cm.FormatError)


def test_modules_with_one_name_are_not_written(rng, tmp_path):
    paths = (
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "diffusion_model.double_blocks.0.img_attn_qkv",
    )
    adapter = cm.Adapter({path: update(rng) for path in paths})
    with pytest.raises(cm.UnsupportedError, match="have one name in kohya adapters"):
        save(adapter, tmp_path / "out", "kohya")


# --- LoHa and LoKr --------------------------------------------------------------------------
sizes = st.integers(1, 4)
windows = st.sampled_from([(), (3, 2), (1, 1)])


def _halves(rng, name, m, n, r, window, core):
    """Parts of one matrix of LyCORIS, and the matrix, (m, n, ...), by its definition."""
    if core and window:
        parts = {"a": draw(rng, r, m), "b": draw(rng, r, n), "t": draw(rng, r, r, *window)}
        dense = np.einsum("ij...,ip,jq->pq...", parts["t"], parts["a"], parts["b"])
        core_name = name.replace("w", "t")
        return {f"{name}_a": parts["a"], f"{name}_b": parts["b"], core_name: parts["t"]}, dense
    a, b = draw(rng, m, r), draw(rng, r, n, *window)
    return {f"{name}_a": a, f"{name}_b": b}, np.einsum("pr,rq...->pq...", a, b)


def assert_factors(parts, dense):
    size = lycoris.size({name: value.shape for name, value in parts.items()})
    a, b = lycoris.factors(parts)
    flat = dense.reshape(len(dense), -1)
    assert (a.shape, b.shape) == ((size.rank, size.n), (size.m, size.rank))
    assert size.rank <= min(flat.shape)
    assert np.allclose(b @ a, flat, rtol=1e-5, atol=1e-5)
    assert size.kernel == (dense.shape[1:] if dense.ndim == 4 else ())


@given(m=sizes, n=sizes, r=sizes, window=windows, core=st.booleans(), seed=st.integers(0, 9))
def test_loha_is_an_entrywise_product(m, n, r, window, core, seed):
    rng = np.random.default_rng(seed)
    first, left = _halves(rng, "hada_w1", m, n, r, window, core)
    second, right = _halves(rng, "hada_w2", m, n, r, window, core)
    assert_factors(first | second, left * right)


@given(
    first=st.tuples(sizes, sizes, st.none() | sizes),
    second=st.tuples(sizes, sizes, st.none() | sizes),
    window=windows,
    core=st.booleans(),
    seed=st.integers(0, 9),
)
def test_lokr_is_a_kronecker_product(first, second, window, core, seed):
    rng = np.random.default_rng(seed)

    def half(name, m, n, r, *rest):
        if r is not None:
            return _halves(rng, name, m, n, r, *rest)
        whole = draw(rng, m, n, *rest[0])
        return {name: whole}, whole

    parts, left = half("lokr_w1", *first, (), False)
    more, right = half("lokr_w2", *second, window, core)
    kron = np.einsum("ab,cd...->acbd...", left, right)
    shape = (len(left) * len(right), left.shape[1] * right.shape[1], *right.shape[2:])
    assert_factors(parts | more, kron.reshape(shape))


@pytest.mark.parametrize(
    ("parts", "scale"),
    [
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}, 1.5),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 2)}, 1.5),
        ({"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 3), "lokr_w2": (2, 2)}, 1.0),
        ({"lokr_w1": (2, 3), "lokr_w2": (2, 2)}, 1.0),  # alpha counts for nothing
    ],
)
@pytest.mark.parametrize("stem", ["lora_unet_x", "diffusion_model.x", "transformer.x"])
def test_lycoris_alphas_are_divided_by_the_rank_of_the_parts(rng, write, stem, parts, scale):
    arrays = {name: draw(rng, *shape) for name, shape in parts.items()}
    tensors = {f"{stem}.{name}": value for name, value in arrays.items()}
    (lora,) = cm.open_adapter(write({**tensors, f"{stem}.alpha": np.float32(3)})).values()
    a, b = lycoris.factors(arrays)
    assert np.allclose(lora.dense(), scale * b @ a, rtol=1e-5, atol=1e-5)
    assert lora.shape == (4, 6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 6)}, "expected hada_w2_a and hada_w2_b"),
        ({"lokr_w1": (2, 2)}, "expected lokr_w2_a and lokr_w2_b, or lokr_w2"),
        ({"lokr_w1": (2, 2), "lokr_w2": (0, 2)}, "do not fit each other"),
        ({"lokr_w1": (2,), "lokr_w2": (2, 2)}, "do not fit each other"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2), "lokr_w2_a": (2, 2)}, "do not fit each other"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 2)}, "do not fit each other"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2, 3)}, "a convolution over 1 axes"),
        ({"lokr_w1": (50_000, 1), "lokr_w2": (50_000, 1)}, "which no layer of a model has"),
    ],
)
def test_parts_that_do_not_fit_are_refused(write, shapes, message):
    tensors = {f"lora_unet_x.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    refused(write(tensors), "module 'lora_unet_x'", message, error=cm.FormatError)


# --- diffusers ------------------------------------------------------------------------------
def test_diffusers_keys_of_all_releases(rng, write):
    stems = {
        f"unet.{UNET}": ("lora_A.weight", "lora_B.weight"),
        "unet.mid_block.attentions.0.proj_in": ("lora.down.weight", "lora.up.weight"),
        f"text_encoder.{CLIP}": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    }
    tensors = {}
    for stem, ends in stems.items():
        tensors |= pair(rng, stem, ends=ends)
    old = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    tensors |= pair(rng, old, ends=("down.weight", "up.weight"))
    tensors |= pair(rng, "unet.base_model.model.conv_out")
    adapter = cm.open_adapter(write(tensors))
    out = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert set(adapter) == {*stems, out, "unet.conv_out"}
    assert_update(adapter, out, tensors[f"{old}.up.weight"] @ tensors[f"{old}.down.weight"])
    assert adapter.metadata.format == "diffusers"


def note(**fields):
    return {"format": "pt", "lora_adapter_metadata": json.dumps(fields)}


def test_diffusers_scales_are_those_of_the_header(rng, write):
    tensors = pair(rng, "transformer.x.to_q") | pair(rng, "transformer.x.to_k", r=3)
    tensors |= pair(rng, f"text_encoder.{CLIP}")
    notes = note(
        **{
            "transformer.r": 2,
            "transformer.lora_alpha": 6,
            "transformer.rank_pattern": {"to_k": 3},
            "transformer.alpha_pattern": {"^x.to_k": 9},
            "transformer.use_rslora": False,
            "text_encoder.r": 2,
            "text_encoder.lora_alpha": 2,
            "text_encoder.use_rslora": True,
        }
    )
    adapter = cm.open_adapter(write(tensors, notes=notes))
    scales = {"transformer.x.to_q": 3, "transformer.x.to_k": 3, f"text_encoder.{CLIP}": 2**0.5}
    for path, scale in scales.items():
        a, b = (tensors[f"{path}.lora_{x}.weight"] for x in "AB")
        assert_update(adapter, path, scale * b @ a)


def test_alphas_in_the_file_count_before_all_else(rng, write):
    tensors = pair(rng, "transformer.x.to_q") | {"transformer.x.to_q.alpha": np.float32(8)}
    notes = note(**{"transformer.r": 2, "transformer.lora_alpha": 2})
    lora = cm.open_adapter(write(tensors, notes=notes))["transformer.x.to_q"]
    assert np.array_equal(lora.b, 4 * tensors["transformer.x.to_q.lora_B.weight"])


def test_several_ranks_without_alphas_are_noted(rng, write):
    tensors = pair(rng, "transformer.x.to_q") | pair(rng, "transformer.x.to_k", r=3)
    alphas = {f"transformer.x.to_{x}.alpha": np.float32(r) for x, r in (("q", 2), ("k", 3))}
    cm.open_adapter(write(tensors | alphas, "alphas.safetensors"))
    with pytest.warns(CoreMergeWarning, match=r"modules of transformer have ranks 2 to 3, and no"):
        adapter = cm.open_adapter(write(tensors))
    lora = adapter["transformer.x.to_k"]
    assert np.array_equal(lora.b, tensors["transformer.x.to_k.lora_B.weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transformer.r": 0}, "r is 0; expected a positive integer"),
        ({"transformer.r": 3}, "has rank 2 in the file, but the configuration says 3"),
        (
            {"transformer.r": 2, "transformer.lora_alpha": "x"},
            'lora_alpha is "x"; expected a finite',
        ),
        ({"transformer.r": 2, "transformer.alpha_pattern": {"x": "y"}}, "expected a finite number"),
        ({"transformer.r": 2, "transformer.rank_pattern": {"(": 3}}, "has a broken pattern"),
        ({"transformer.use_dora": True}, "transformer.use_dora is true"),
        ({"transformer.peft_type": "LOKR"}, "transformer.peft_type is 'LOKR'"),
    ],
)
def test_headers_of_diffusers_that_are_refused(rng, write, fields, message):
    refused(write(pair(rng, "transformer.x.to_q"), notes=note(**fields)), message)


def test_a_language_model_is_no_pipeline(rng, write):
    source = write(pair(rng, "transformer.h.0.attn.c_attn"))
    assert find_format(source).name == "PEFT weights"


# --- Original names -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "ends", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")]
)
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    "stem", ["diffusion_model.blocks.0.self_attn.q", "text_encoders.t5xxl.transformer.encoder.q"]
)
def test_original_names(rng, write, ends, prefix, stem):
    tensors = pair(rng, prefix + stem, ends=ends)
    plain = cm.open_adapter(write(tensors))
    assert np.array_equal(plain[stem].b, tensors[f"{prefix}{stem}.{ends[1]}"])
    tensors[f"{prefix}{stem}.alpha"] = np.float32(1)
    scaled = cm.open_adapter(write(tensors, "y.safetensors"))
    assert np.array_equal(scaled[stem].b, plain[stem].b / 2)
    assert plain.metadata.format == "original"


# --- PEFT's weights alone -------------------------------------------------------------------
KEY = "base_model.model.layers.0.q"


@pytest.mark.parametrize("name", ["x.safetensors", "folder/", "folder/adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("more", "notes", "options", "scale"),
    [
        ({f"{KEY}.alpha": np.float32(4)}, None, {}, 2),
        ({}, {"ss_network_alpha": "4", "ss_network_dim": "2"}, {}, 2),
        ({}, {"lora_alpha": "6.0"}, {}, 3),
        ({}, note(r=2, lora_alpha=6), {}, 3),
        ({}, None, {"alpha": 3}, 1.5),
        ({}, {"lora_alpha": "6.0"}, {"alpha": 3}, 1.5),
    ],
)
def test_peft_weights_alone(rng, write, name, more, notes, options, scale):
    tensors = pair(rng, KEY)
    source = write(tensors | more, name, notes)
    adapter = cm.open_adapter(source, **options)
    assert np.array_equal(adapter["layers.0.q"].b, scale * tensors[f"{KEY}.lora_B.weight"])
    assert adapter.metadata.format == "peft"


def test_a_scaling_that_nothing_tells_is_asked_for(rng, write, tmp_path):
    tensors = pair(rng, KEY)
    source = write(tensors)
    refused(source, "module 'layers.0.q'", "--alpha NUMBER", error=cm.FormatError)
    refused(source, "expected a finite number other than 0", alpha=0.0)
    other = write(tensors, "other.safetensors", note(**{"transformer.r": 2}))
    refused(other, "nothing tells its alpha")
    mistral = write(pair(rng, "layers.0.attention.wq"), "mistral/lora.safetensors")
    refused(mistral, "the scaling in params.json times the rank")
    done = run("convert", source, "-o", tmp_path / "out", "--alpha", "4")
    assert done.code == 0, done.err
    written = cm.load_peft(tmp_path / "out")["layers.0.q"]
    assert np.array_equal(written.b, 2 * tensors[f"{KEY}.lora_B.weight"])
    beside = write(tensors, "peft/adapter_model.safetensors", adapter_config={"r": 2})
    refused(beside, "its adapter_config.json is beside it", "give the folder")


@pytest.mark.parametrize("path", ["x.experts", "x.experts.base_layer", "x.base_layer.out_proj"])
def test_what_only_the_configuration_tells_is_refused(rng, write, path):
    refused(write(pair(rng, path)), repr(path), "put it beside the file", alpha=2)


def test_embeddings_of_peft_weights_alone(rng, write):
    tensors = {
        f"{KEY}.lora_embedding_A": draw(rng, 2, 9),
        f"{KEY}.lora_embedding_B": draw(rng, 4, 2),
    }
    lora = cm.open_adapter(write(tensors), alpha=2)["layers.0.q"]
    assert lora.kind == cm.Kind("embedding", transposed=True)
    assert np.array_equal(lora.a, tensors[f"{KEY}.lora_embedding_A"])


# --- MLX ------------------------------------------------------------------------------------
def mlx(rng, **parameters):
    q, embed = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
    experts = "model.layers.0.mlp.switch_mlp.gate_proj"
    tensors = {
        f"{q}.lora_a": draw(rng, 6, 2),
        f"{q}.lora_b": draw(rng, 2, 4),
        f"{embed}.lora_a": draw(rng, 9, 2),
        f"{embed}.lora_b": draw(rng, 2, 6),
        f"{experts}.lora_a": draw(rng, 3, 2, 6),
        f"{experts}.lora_b": draw(rng, 3, 5, 2),
    }
    config = {
        "fine_tune_type": "lora",
        "model": "owner/base",
        "num_layers": 16,
        "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0, **parameters},
    }
    return tensors, config


def test_mlx_updates_are_the_scale_times_both_factors(rng, write):
    tensors, config = mlx(rng)
    file = write(tensors, "m/adapters.safetensors", adapter_config=config)
    for source in (file, file.parent):
        adapter = cm.open_adapter(source)
        q, embed = (
            20 * (tensors[f"{stem}.lora_a"] @ tensors[f"{stem}.lora_b"])
            for stem in ("model.layers.0.self_attn.q_proj", "model.embed_tokens")
        )
        assert_update(adapter, "model.layers.0.self_attn.q_proj", q.T)
        assert_update(adapter, "model.embed_tokens", embed.T)
        assert adapter["model.embed_tokens"].kind == cm.Kind("embedding", transposed=True)
        stem = "model.layers.0.mlp.switch_mlp.gate_proj"
        for e in range(3):
            expected = 20 * tensors[f"{stem}.lora_b"][e] @ tensors[f"{stem}.lora_a"][e]
            assert_update(adapter, f"model.layers.0.mlp.experts.{e}.gate_proj", expected)
    told = adapter.metadata
    assert (told.format, told.base_model, told.rank, told.alpha) == ("mlx", "owner/base", 2, 40)


def test_experts_of_older_mlx_files(rng, write):
    tensors, config = mlx(rng)
    stem = "model.layers.0.mlp.switch_mlp.gate_proj"
    flat = {**tensors, f"{stem}.lora_a": tensors[f"{stem}.lora_a"].reshape(6, 6)}
    new, old = (
        cm.open_adapter(write(x, f"{i}/adapters.safetensors", adapter_config=config).parent)
        for i, x in enumerate((tensors, flat))
    )
    assert_same(new, old)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"fine_tune_type": "dora"}, "fine_tune_type is 'dora': DoRA rescales"),
        ({}, {"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({}, {"fine_tune_type": 3}, "fine_tune_type is 3; expected a text"),
        ({}, {"lora_parameters": None}, "no rank in lora_parameters"),
        ({}, {"lora_parameters": {"rank": 2}}, "no scale in lora_parameters"),
        ({}, {"lora_parameters": {"rank": 2, "scale": "x"}}, "expected a finite number"),
        (
            {},
            {"lora_parameters": {"rank": 3, "scale": 1.0}},
            "has rank 2, but adapter_config.json says",
        ),
        ({}, {"lora_parameters": {"rank": 2, "scale": 1.0, "alpha": 16}}, "leave alpha out"),
        ({"x.m": (4,)}, {}, "'x.m' belongs to DoRA"),
        ({"x.lora_a": (4, 2)}, {}, "module 'x' has lora_a only"),
        ({"x.lora_a": (4, 2), "x.lora_b": (3, 4)}, {}, "of one rank r"),
        ({"x.lora_a": (3, 2, 4), "x.lora_b": (3, 5, 2)}, {}, "in a 'switch_mlp'"),
    ],
)
def test_mlx_folders_that_are_refused(rng, write, tensors, config, message):
    more = {key: np.ones(shape, np.float32) for key, shape in tensors.items()}
    own, fields = mlx(rng)
    source = write({**own, **more}, "m/adapters.safetensors", adapter_config=fields | config)
    refused(source.parent, message)


def test_adapters_of_mlx_vlm(rng, write):
    """``A`` is (inputs, r), ``B`` is (r, outputs), and alpha is the scale, whatever the rank."""
    stem = "language_model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.A": draw(rng, 6, 2), f"{stem}.B": draw(rng, 2, 4)}
    config = {"rank": 2, "alpha": 0.5, "dropout": 0.1}
    source = write(tensors, "m/adapters.safetensors", adapter_config=config)
    adapter = cm.open_adapter(source.parent)
    assert_update(adapter, stem, 0.5 * (tensors[f"{stem}.A"] @ tensors[f"{stem}.B"]).T)
    assert adapter.metadata.format == "mlx"
    write(tensors, "m/adapters.safetensors", adapter_config={"rank": 2})
    refused(source, "no alpha; expected that of the training by mlx-vlm")
    mixed = {**tensors, "x.A": draw(rng, 6, 2), "x.lora_b": draw(rng, 2, 4)}
    refused(
        write(mixed, "n/adapters.safetensors", adapter_config=config),
        "module 'x' has A and lora_b only",
    )


def test_mlx_calls_a_language_model_in_another_by_its_own_name(rng, tmp_path):
    """It passes over names that it does not know."""
    names = {
        "model.language_model.layers.0.self_attn.q_proj": (
            "language_model.model.layers.0.self_attn.q_proj"
        ),
        "model.language_model.layers.0.mlp.experts.0.up_proj": (
            "language_model.model.layers.0.mlp.switch_mlp.up_proj"
        ),
        "lm_head": "language_model.lm_head",
    }
    save(cm.Adapter({path: update(rng) for path in names}), tmp_path / "out", "mlx")
    written = load_file(tmp_path / "out" / "adapters.safetensors")
    assert written.keys() == {f"{name}.lora_{x}" for name in names.values() for x in "ab"}
    again = cm.open_adapter(tmp_path / "out")
    save(again, tmp_path / "again", "mlx")
    assert load_file(tmp_path / "again" / "adapters.safetensors").keys() == written.keys()


def test_an_mlx_file_needs_its_configuration(rng, write):
    refused(write(mlx(rng)[0], "adapters.safetensors"), "no adapter_config.json beside it")


# --- Refused --------------------------------------------------------------------------------
DOWN, UP = "lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"
GOOD = {DOWN: (2, 6), UP: (4, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_unet_x.dora_scale": (4, 1)}, "'lora_unet_x.dora_scale' belongs to DoRA"),
        ({"lora_unet_x.lora_magnitude_vector": (4,)}, "belongs to DoRA"),
        ({"lora_unet_y.diff": (4, 6)}, "a whole difference of weights"),
        ({"lora_unet_y.lora_up.bias": (4,)}, "belongs to a bias"),
        ({"lora_unet_y.oft_blocks": (4, 2, 2)}, "belongs to OFT"),
        ({"lora_unet_y.a1.weight": (4, 2)}, "belongs to GLoRA"),
        ({"lora_unet_y.w_norm": (4,)}, "belongs to a trained norm"),
        ({"lora_unet_y.what": (4, 2)}, "'lora_unet_y.what' is no part of a low-rank update"),
        ({UP: None}, "'lora_unet_x.lora_down.weight' only; expected both factors"),
        ({"lora_unet_y.alpha": ()}, "has an alpha only"),
        ({"lora_unet_x.alpha": (2,)}, "'lora_unet_x.alpha' has shape (2,); expected one number"),
        ({UP: (4, 3)}, "of one rank r"),
        ({UP: (0, 2)}, "empty"),
        ({DOWN: (2, 6, 3), UP: (4, 2, 1)}, "only linear layers and two-dimensional convolutions"),
        ({DOWN: (2, 6, 3, 3)}, "of one rank r"),
        ({DOWN: (2, 6, 3, 3), UP: (4, 2, 3, 3)}, "of one rank r"),
        ({"lora_unet_x.lora_mid.weight": (2, 2, 3, 3)}, "of one rank r"),
        ({"lora_unet_x.lora_A.weight": (2, 6)}, "are the same part of one module"),
        ({"lora_unet_x.hada_w1_a": (2, 6)}, "expected both factors"),
    ],
)
def test_files_that_are_refused(write, change, message):
    shapes = {key: shape for key, shape in {**GOOD, **change}.items() if shape is not None}
    source = write({key: np.ones(shape, np.float32) for key, shape in shapes.items()})
    refused(source, "x.safetensors", message)
    assert run("inspect", source).err.count("\n") == 1


@pytest.mark.parametrize("alpha", [0.0, np.nan, np.inf])
def test_alphas_that_do_not_scale_are_refused(rng, write, alpha):
    refused(write(kohya(rng, "lora_unet_x", alpha)), "expected a finite number other than 0")


@pytest.mark.parametrize("key", [DOWN, UP])
def test_values_that_are_not_finite_are_refused_when_read(rng, write, key):
    tensors = kohya(rng, "lora_unet_x")
    tensors[key][0, 0] = np.inf
    adapter = cm.open_adapter(write(tensors))
    with pytest.raises(cm.FormatError, match=f"tensor {key!r} has NaN or infinite values"):
        adapter["lora_unet_x"]


def test_integers_are_no_factors(write):
    tensors = {key: np.ones(shape, np.int8) for key, shape in GOOD.items()}
    refused(write(tensors), "has dtype int8", error=cm.UnsupportedError)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One small adapter of each format, in a folder."""
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("formats")
    tensors, config = mlx(rng)
    loha = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}
    lokr = {"lokr_w1": (2, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)}
    contents = {
        "kohya": kohya(rng, "lora_unet_mid_block_attentions_0_proj_in"),
        "lycoris": {f"lora_unet_{x[:4]}.{x}": draw(rng, *s) for x, s in (loha | lokr).items()},
        "diffusers": pair(rng, f"unet.{UNET}"),
        "original": pair(rng, "diffusion_model.x"),
        "peft": pair(rng, KEY),
        "adapters": tensors,
    }
    notes = {"diffusers": note(**{"unet.r": 2, "unet.lora_alpha": 4}), "peft": {"lora_alpha": "2"}}
    for name, content in contents.items():
        (place / name).mkdir()
        content = {key: np.asarray(value) for key, value in content.items()}
        save_file(content, place / name / f"{name}.safetensors", notes.get(name))
    (place / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("name", ["kohya", "lycoris", "diffusers", "original", "peft", "adapters"])
def test_a_broken_file_is_read_or_refused_in_one_line(folders, name):
    files = sorted((folders / name).iterdir())

    @settings(max_examples=2 * settings.default.max_examples)
    @given(data=st.data())
    def check(data):
        file = data.draw(st.sampled_from(files))
        valid = file.read_bytes()
        file.write_bytes(data.draw(broken(file)))
        try:
            with warnings.catch_warnings(), contextlib.suppress(CoreMergeError):
                warnings.simplefilter("ignore", CoreMergeWarning)
                adapter = cm.open_adapter(folders / name)
                adapter.read(adapter)
        finally:
            file.write_bytes(valid)

    check()


# --- Written --------------------------------------------------------------------------------
MADE = {
    "kohya": {"unet.mid_block.attentions.0.proj_in": (4, 6, 3), "unet.conv_in": (4, CONV, 2)},
    "diffusers": {
        f"unet.{UNET}": (4, 6, 3),
        "unet.conv_in": (4, CONV, 2),
        f"text_encoder.{CLIP}": (4, 6, 2),
    },
    "original": {
        "diffusion_model.blocks.0.self_attn.q": (4, 6, 3),
        "diffusion_model.img_emb.proj.1": (4, 6, 2),
    },
    "mlx": {
        "model.layers.0.self_attn.q_proj": (4, 6, 3),
        **{f"model.layers.0.mlp.experts.{e}.up_proj": (5, 6, 3) for e in (1, 0, 2)},
        **{f"model.layers.0.block_sparse_moe.experts.{e}.w2": (5, 6, 3) for e in (1, 0)},
        "model.embed_tokens": (6, "embedding", 3),
    },
}


def make(rng, modules):
    """An adapter with modules of these rows, columns (or kind) and ranks."""
    kinds = {"embedding": cm.Kind("embedding", transposed=True)}
    loras = {}
    for path, (m, n, r) in modules.items():
        kind = kinds.get(n, n) if not isinstance(n, int) else cm.Kind()
        width = {"conv2d": 18, "embedding": 9}.get(kind.name, n)
        loras[path] = update(rng, kind, (m, width), r)
    return cm.Adapter(loras, metadata=cm.Metadata(base_model="owner/base"))


@pytest.mark.parametrize("to", MADE)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read_again_bit_for_bit(rng, tmp_path, to, dtype):
    adapter = make(rng, MADE[to])
    rounded = adapter.replace(
        modules={
            path: lora.replace(
                a=lora.a.astype(dtype).astype(np.float32), b=lora.b.astype(dtype).astype(np.float32)
            )
            for path, lora in adapter.items()
        }
    )
    save(adapter, tmp_path / "a", to, dtype=dtype)
    again = cm.open_adapter(tmp_path / "a")
    assert again.metadata.format == to
    assert again.metadata.dtype == dtype
    assert_same(again, rounded)
    save(again, tmp_path / "b", to, dtype=dtype)
    first, second = (load_file(the_file(tmp_path / x)) for x in "ab")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_kohya_keys_come_back(rng, write, tmp_path):
    tensors = {}
    for i, name in enumerate([*FAMILIES["SDXL"], "lora_unet_foo_bar"]):
        tensors |= kohya(rng, name, alpha=2 + i, r=2 + i)
    save(cm.open_adapter(write(tensors)), tmp_path / "out", "kohya")
    written = load_file(the_file(tmp_path / "out"))
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[key], tensors[key]) for key in tensors)


def test_a_rank_that_bfloat16_has_not_is_filled_up(rng, tmp_path):
    adapter = make(rng, {"unet.conv_in": (300, 300, 257)})
    save(adapter, tmp_path / "out", "kohya", dtype="bfloat16")
    lora = cm.open_adapter(tmp_path / "out")["unet.conv_in"]
    assert lora.rank == 258
    assert np.array_equal(lora.a[:257], adapter["unet.conv_in"].a.astype(ml_dtypes.bfloat16))
    assert not lora.a[257:].any()


def test_mlx_has_one_rank_for_all(rng, tmp_path):
    adapter = make(
        rng, {"model.layers.0.q": (4, 6, 2), "model.layers.1.q": (4, 6, 3), "model.x": (4, 6, 1)}
    )
    save(adapter, tmp_path / "out", "mlx")
    again = cm.open_adapter(tmp_path / "out")
    assert {lora.rank for lora in again.values()} == {3}
    for path in adapter:
        assert np.array_equal(again[path].dense(), adapter[path].dense())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["model"] == "owner/base"
    assert config["lora_parameters"] == {
        "rank": 3,
        "scale": 1.0,
        "dropout": 0.0,
        "keys": ["q", "model.x"],
    }


def test_diffusers_finds_ranks_and_scaling_in_the_header(rng, tmp_path):
    save(make(rng, MADE["diffusers"]), tmp_path / "out", "diffusers")
    with safe_open(the_file(tmp_path / "out"), "numpy") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert the_file(tmp_path / "out").name == "pytorch_lora_weights.safetensors"
    assert (told["unet.r"], told["unet.lora_alpha"], told["text_encoder.r"]) == (3, 3, 2)
    assert told["unet.rank_pattern"] == told["unet.alpha_pattern"] == {"^conv_in": 2}
    assert told["text_encoder.target_modules"] == [CLIP.removeprefix("text_model.")]


@pytest.mark.parametrize(
    ("path", "kind", "to", "message"),
    [
        ("layers.0.q", cm.Kind(), "kohya", "has no name in kohya's format"),
        ("transformer_2.x", cm.Kind(), "kohya", "has no name in kohya's format"),
        ("unet.embed", "embedding", "kohya", "is an embedding, which kohya adapters cannot hold"),
        ("diffusion_model.double_blocks.0.x", cm.Kind(), "diffusers", "--to original or kohya"),
        ("lora_unet_foo", cm.Kind(), "diffusers", "whose words are not known"),
        ("layers.0.q", cm.Kind(), "diffusers", "is of none of diffusers' components"),
        ("transformer.x", cm.Kind(), "original", "has diffusers' name for a layer"),
        ("layers.0.q", cm.Kind(), "original", "is no part of an image or video model"),
        ("unet.x", cm.Kind(), "mlx", "which mlx-lm does not load"),
        ("transformer.transformer_blocks.0.x", cm.Kind(), "mlx", "which mlx-lm does not load"),
        ("model.visual.blocks.0.attn.qkv", cm.Kind(), "mlx", "is of a vision or audio model"),
        ("vision_tower.blocks.0.attn.qkv", cm.Kind(), "mlx", "is of a vision or audio model"),
        ("conv", CONV, "orbax", "is a convolution, which orbax adapters cannot hold"),
        ("embed", "embedding", "orbax", "is an embedding, which orbax adapters cannot hold"),
        ("x.experts[0]", cm.Kind("expert"), "orbax", "is an expert of a fused parameter"),
        ("conv", CONV, "mlx", "is a convolution, which MLX adapters cannot hold"),
        ("x.experts[0]", cm.Kind("expert"), "mlx", "is an expert of a fused parameter"),
        (
            "x.experts.1.up_proj",
            cm.Kind(),
            "mlx",
            "x.switch_mlp.up_proj' has experts, but not number 0",
        ),
        ("model.embed_tokens", cm.Kind(), "mlx", "takes modules for embeddings by their names"),
        ("model.x", "embedding", "mlx", "takes modules for embeddings by their names"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(rng, tmp_path, path, kind, to, message):
    kind = cm.Kind("embedding", transposed=True) if kind == "embedding" else kind
    adapter = cm.Adapter({path: update(rng, kind, (4, 18))})
    with pytest.raises(cm.UnsupportedError, match=message) as caught:
        save(adapter, tmp_path / "out", to)
    assert repr(path) in str(caught.value) or ".experts." in path
    assert not (tmp_path / "out").exists()


def test_layers_by_the_names_of_two_tools_are_not_written(rng, tmp_path):
    """As in a merge of two adapters for SDXL, which share a text encoder only."""
    paths = ("diffusion_model.input_blocks.4.1.proj_in", "unet.down_blocks.1.attentions.0.proj_in")
    adapter = cm.Adapter({path: update(rng) for path in paths})
    with pytest.raises(cm.UnsupportedError, match="have the names of two tools"):
        save(adapter, tmp_path / "out", "kohya")


@pytest.mark.parametrize("to", MADE)
def test_extras_are_refused(rng, tmp_path, to):
    adapter = make(rng, MADE[to]).replace(extras={"head.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(cm.UnsupportedError, match=r"not low-rank updates \(first: 'head.weight'\)"):
        save(adapter, tmp_path / "out", to)


@pytest.mark.parametrize(
    ("source", "to"), [("kohya", "diffusers"), ("diffusers", "kohya"), ("original", "kohya")]
)
def test_conversions_between_names(rng, tmp_path, source, to):
    adapter = make(rng, MADE[source])
    save(adapter, tmp_path / "a", source)
    for there, back in (("a", "b"), ("b", "c")):
        target = to if back == "b" else source
        done = run("convert", tmp_path / there, "--to", target, "-o", tmp_path / back)
        assert done.code == 0, done.err
    assert_same(cm.open_adapter(tmp_path / "c"), adapter)


def test_merges_read_and_write_them(rng, tmp_path):
    for name in "ab":
        save(make(rng, MADE["kohya"]), tmp_path / name, "kohya")
    options = ["--rule", "mean", "--scale", "1", "-o", tmp_path / "m"]
    merged = run("merge", tmp_path / "a", tmp_path / "b", *options)
    assert merged.code == 0, merged.err
    done = run("convert", tmp_path / "m", "--to", "kohya", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    mean, first, second = (cm.open_adapter(tmp_path / x) for x in ("out", "a", "b"))
    for path in first:
        expected = (first[path].dense() + second[path].dense()) / 2
        assert np.allclose(mean[path].dense(), expected, atol=1e-5)


def test_a_merge_has_the_fields_of_the_header_that_all_adapters_have(rng, write, tmp_path):
    common = {"format": "pt", "ss_base_model_version": "sd_v1", "ss_network_dim": "2"}
    opened = [
        cm.open_adapter(write(kohya(rng, "lora_unet_conv_in"), f"{i}.safetensors", common | own))
        for i, own in enumerate(
            [
                {"ss_sd_model_name": "a.safetensors", "ss_steps": "9"},
                {"ss_sd_model_name": "b.safetensors", "modelspec.architecture": "x" * 10_000},
            ]
        )
    ]
    merged = cm.merge(opened, cm.mean())
    named = r"stay behind.*: modelspec.architecture, ss_sd_model_name, ss_steps$"
    for to, kept in (("kohya", "sd_v1"), ("peft", None)):
        with pytest.warns(CoreMergeWarning, match=named if kept else "and 1 more"):
            save(merged, tmp_path / to, to)
        with safe_open(the_file(tmp_path / to), "numpy") as file:
            assert file.metadata().get("ss_base_model_version") == kept
            assert "ss_steps" not in file.metadata()


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize(
    ("stem", "path", "options"),
    [
        ("base_model.model.layers.0.q", "layers.0.q", {"alpha": 2.0}),
        ("diffusion_model.blocks.0.q", "diffusion_model.blocks.0.q", {}),
    ],
)
def test_what_wraps_a_model_is_no_part_of_names(rng, write, wrapper, stem, path, options):
    assert list(cm.open_adapter(write(pair(rng, wrapper + stem)), **options)) == [path]
    both = pair(rng, wrapper + stem) | pair(rng, stem)
    refused(write(both, "both.safetensors"), "the same part of one module", **options)


# --- Not known ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.layers.0.q.weight"], "weights of a model, without LoRA factors"),
        (["double_blocks.0.processor.qkv_lora1.down.weight"], "XLabs"),
        (["x.diff"], "differences of whole weights"),
        (["emb_params"], "a textual inversion"),
        (["<cat-toy>"], "a textual inversion"),
        (["control_model.zero_convs.0.0.weight"], "a ControlNet"),
        (["ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["state.0.exp_avg", "state.0.step"], "the state of an optimizer"),
        (["base_model.model.q.oft_R.weight"], "OFT"),
        (["base_model.model.q.ia3_l"], "IA3"),
        (["model.diffusion_model.out.2.weight", "first_stage_model.x"], "a checkpoint of an image"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "a VAE"),
        (["x.base.layer\x1b[31m"], r"it has the tensor 'x.base.layer\x1b[31m'"),
    ],
)
def test_files_that_no_format_has_are_told_by_a_key(write, keys, message):
    file = write({key: np.ones((2, 2), np.float32) for key in keys})
    refused(file, "x.safetensors", message, error=cm.FormatError)
    refused(file.parent, "no adapter in this folder; it has 'x.safetensors'", error=cm.FormatError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_0.pt", "torchtune's adapter as a pickle file"),
        ("style.ckpt", "a pickle file; pickle files can run code"),
        ("pytorch_lora_weights.bin", "diffusers' LoRA as a pickle file"),
        ("adapters.npz", "a NumPy archive"),
        ("lora.zip", "an archive; unpack it"),
        ("flax_model.msgpack", "flax's parameters"),
        ("model.keras", "a Keras file"),
        ("broken.safetensors", "not a readable safetensors file"),
        ("notes.txt", "is a file; expected"),
    ],
)
def test_files_that_no_format_has_are_told_by_their_names(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"data")
    refused(tmp_path / name, name, message, error=cm.FormatError)
    if not name.endswith(".txt"):
        refused(tmp_path, "no adapter in this folder; it has", name, message, error=cm.FormatError)


def test_a_folder_of_checkpoints_of_other_tools_names_them(rng, write):
    for n in (5, 9):
        write(kohya(rng, "lora_unet_x"), f"run/checkpoint-{n}/pytorch_lora_weights.safetensors")
    source = write({}, "run/logs/").parent
    refused(source, "but folders, 'checkpoint-5' to ", "give one", error=cm.FormatError)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "weights of a"),
        (["unet/model.safetensors", "vae/model.safetensors"], "a pipeline of diffusers"),
    ],
)
def test_a_base_model_is_told(write, tmp_path, files, message):
    (tmp_path / "model_index.json").write_text("{}")
    for file in files:
        write({"x.weight": np.ones((2, 2), np.float32)}, file)
    refused(tmp_path, "no adapter in this folder; it has", message, error=cm.FormatError)


def test_an_ending_may_be_in_capitals(rng, write):
    assert list(cm.open_adapter(write(kohya(rng, "lora_unet_x"), "X.SAFETENSORS"))) == [
        "lora_unet_x"
    ]


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "x.safetensors", "x.safetensors: no such file", error=cm.FormatError)


def test_a_folder_with_several_files(rng, write, tmp_path):
    for name in ("a", "b", "c"):
        write(kohya(rng, "lora_unet_x"), f"{name}.safetensors")
    refused(tmp_path, "3 files that are adapters, 'a.safetensors' to 'c.safetensors'")
    assert list(cm.open_adapter(tmp_path / "b.safetensors")) == ["lora_unet_x"]
    for name in ("a", "c"):
        write({"exp_avg": np.ones(2, np.float32)}, f"{name}.safetensors")
    refused(tmp_path, "3 files, of which 'b.safetensors' is an adapter; give that file")
    assert list(cm.io.hash_source(tmp_path / "b.safetensors")) == ["b.safetensors"]
