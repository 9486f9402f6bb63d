"""Updates read from other tools' files are what these compute, and they read what we write."""

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file

import coremerge_jax as cm
from coremerge_jax.io import lycoris
from coremerge_jax.io.formats import find_target

pytestmark = [
    pytest.mark.oracle,
    # Warnings of torch, transformers and diffusers themselves, none of them about the adapter.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("default::UserWarning:diffusers"),
]


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import diffusers.pipelines
        from diffusers import FluxPipeline, StableDiffusionPipeline  # noqa: F401
    return diffusers


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


def draw(*shape):
    import torch

    return torch.randn(*shape)


def save(adapter, out, to):
    find_target(to).save(adapter, out, to=to)
    return out


# --- Models ---------------------------------------------------------------------------------
def unet_of(diffusers):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def run_unet(unet):
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        return unet(draw(1, 4, 8, 8), 1, draw(1, 5, 8)).sample


def flux_of(diffusers):
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


def run_flux(flux):
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        return flux(
            hidden_states=draw(1, 4, 4),
            encoder_hidden_states=draw(1, 3, 32),
            pooled_projections=draw(1, 32),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"

UNET = [
    f"{ATTENTION}.to_q",
    f"{ATTENTION}.to_out.0",
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "up_blocks.0.upsamplers.0.conv",
    "mid_block.resnets.0.time_emb_proj",
]

FLUX = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_add_out",
    "single_transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.0.proj_mlp",
]


def adapter_for(model, component, paths):
    """Updates of ranks from 1 on."""
    loras = {}
    for i, path in enumerate(paths):
        m, *rest = model.get_submodule(path).weight.shape
        kind = cm.Kind("conv2d", kernel=tuple(rest)) if len(rest) == 3 else cm.Kind()
        a, b = draw(i % 3 + 1, int(np.prod(rest))), draw(m, i % 3 + 1)
        loras[f"{component}.{path}"] = cm.LoRA(a=a.numpy(), b=b.numpy(), kind=kind)
    return cm.Adapter(loras)


def add(model, adapter, component):
    """Adds the updates to the weights."""
    import torch

    for path, lora in adapter.items():
        weight = model.get_submodule(path.removeprefix(f"{component}.")).weight
        update = torch.from_numpy(np.asarray(lora.dense())).reshape(weight.shape)
        weight.data += update


def assert_close(ours, theirs, base):
    import torch

    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, base, rtol=1e-2, atol=1e-2)


# --- diffusers ------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_stable_diffusion_loads_what_we_write(diffusers, tmp_path, to):
    unet = unet_of(diffusers)
    base, theirs = run_unet(unet), unet_of(diffusers)
    theirs.load_state_dict(unet.state_dict())
    # Of kohya's files, diffusers converts the names of attentions only, and loses the alphas of
    # output projections.
    paths = UNET if to == "diffusers" else [UNET[0], *UNET[2:4]]
    adapter = adapter_for(unet, "unet", paths)
    (file,) = save(adapter, tmp_path / "out", to).glob("*.safetensors")
    pipeline = diffusers.StableDiffusionPipeline
    state, alphas, metadata = pipeline.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        unet_config=theirs.config,
        return_lora_metadata=True,
    )
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs, metadata=metadata)
    add(unet, adapter, "unet")
    assert_close(run_unet(unet), run_unet(theirs), base)


def test_flux_loads_what_we_write(diffusers, tmp_path):
    flux = flux_of(diffusers)
    base, theirs = run_flux(flux), flux_of(diffusers)
    theirs.load_state_dict(flux.state_dict())
    adapter = adapter_for(flux, "transformer", FLUX)
    folder = str(save(adapter, tmp_path / "out", "diffusers"))
    pipeline = diffusers.FluxPipeline
    state, alphas, metadata = pipeline.lora_state_dict(
        folder, return_alphas=True, return_lora_metadata=True
    )
    pipeline.load_lora_into_transformer(
        state, network_alphas=alphas, transformer=theirs, metadata=metadata
    )
    add(flux, adapter, "transformer")
    assert_close(run_flux(flux), run_flux(theirs), base)


def test_a_text_encoder_loads_what_we_write(diffusers, tmp_path):
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    ours, theirs = CLIPTextModel(config).eval(), CLIPTextModel(config).eval()
    theirs.load_state_dict(ours.state_dict())
    names = [name for name, _ in ours.named_modules() if name.endswith(("q_proj", "fc1"))]
    adapter = adapter_for(ours, "text_encoder", names)
    # Files have the part "text_model", which transformers 5 has no more in its names.
    bare = ((path.removeprefix("text_encoder."), lora) for path, lora in adapter.items())
    full = {f"text_encoder.text_model.{p.removeprefix('text_model.')}": x for p, x in bare}
    folder = str(save(adapter.replace(modules=full), tmp_path / "out", "diffusers"))
    pipeline = diffusers.StableDiffusionPipeline
    state, alphas, metadata = pipeline.lora_state_dict(folder, return_lora_metadata=True)
    pipeline.load_lora_into_text_encoder(
        state, network_alphas=alphas, text_encoder=theirs, prefix="text_encoder", metadata=metadata
    )
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        base = ours(tokens).last_hidden_state
        add(ours, adapter, "text_encoder")
        assert_close(ours(tokens).last_hidden_state, theirs(tokens).last_hidden_state, base)


@pytest.mark.parametrize("stabilized", [False, True])
def test_we_read_what_diffusers_saves(diffusers, tmp_path, stabilized):
    from peft import LoraConfig, get_peft_model_state_dict

    unet = unet_of(diffusers)
    unet.add_adapter(
        LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules=[path.rpartition("1.")[2] for path in UNET],
            rank_pattern={"to_q": 3},
            alpha_pattern={f"^{ATTENTION}.to_q": 1.5},
            use_rslora=stabilized,
        )
    )
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = draw(*parameter.shape)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    adapter = cm.open_adapter(tmp_path)
    layers = {n: m for n, m in unet.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    assert {f"unet.{name}" for name in layers} == set(adapter)
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default").detach().numpy()
        found = np.asarray(adapter[f"unet.{name}"].dense())
        assert np.allclose(found, expected.reshape(found.shape), rtol=1e-5, atol=1e-5)


# --- peft's LoHa and LoKr -------------------------------------------------------------------
@pytest.mark.parametrize("method", ["LoHa", "LoKr"])
@pytest.mark.parametrize("options", [{}, {"use_effective_conv2d": True}, {"r": 5}])
def test_factors_are_those_of_pefts_layers(method, options):
    import peft
    from torch import nn

    model = nn.ModuleDict({"linear": nn.Linear(12, 20), "conv": nn.Conv2d(6, 8, (3, 2))})
    more = {"decompose_both": True, "decompose_factor": 2} if method == "LoKr" else {}
    fields = {"r": 2, "alpha": 3, "target_modules": ["linear", "conv"], "init_weights": False}
    config = getattr(peft, f"{method}Config")(**fields | more | options)
    peft.inject_adapter_in_model(config, model)
    for name, layer in model.items():
        state = {key: x.detach().numpy() for key, x in layer.state_dict().items()}
        parts = {
            key.removesuffix(".default"): value
            for key, value in state.items()
            if key.startswith(("hada", "lokr"))
        }
        size = lycoris.size({part: value.shape for part, value in parts.items()})
        a, b = lycoris.factors(parts)
        expected = layer.get_delta_weight("default").detach().numpy()
        scale = config.alpha / config.r
        assert np.allclose(scale * b @ a, expected.reshape(size.m, size.n), rtol=1e-4, atol=1e-5)
        if size.kernel:
            assert (size.m, *size.kernel) == expected.shape, name


# --- ComfyUI and sd-scripts -----------------------------------------------------------------
def test_kohya_updates_by_comfyui(tmp_path):
    """The products of ``comfy/weight_adapter/lora.py``: up and down, flat, times alpha / rank."""
    import torch
    from safetensors.torch import save_file

    shapes = {"lora_unet_linear": ((2, 6), (4, 2)), "lora_unet_conv": ((2, 6, 3, 3), (4, 2, 1, 1))}
    tensors = {}
    for name, (down, up) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = draw(*down).to(torch.bfloat16)
        tensors[f"{name}.lora_up.weight"] = draw(*up).to(torch.bfloat16)
        tensors[f"{name}.alpha"] = torch.tensor(1.5, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = cm.open_adapter(tmp_path / "x.safetensors")
    for name in shapes:
        up, down = (tensors[f"{name}.lora_{x}.weight"].float().flatten(1) for x in ("up", "down"))
        expected = tensors[f"{name}.alpha"].item() / len(down) * torch.mm(up, down)
        assert np.allclose(adapter[name].dense(), expected.numpy(), rtol=1e-5, atol=1e-6)


# --- MLX ------------------------------------------------------------------------------------
def test_mlx_computes_the_updates_of_what_we_write(tmp_path):
    """The products of ``mlx_lm/tuner/lora.py``: of a linear layer, an embedding and experts."""
    import mlx.core as mx

    rng = np.random.default_rng(0)
    make = lambda m, n, kind=cm.Kind(): cm.LoRA(  # noqa: E731, B008
        a=rng.standard_normal((2, n), np.float32),
        b=rng.standard_normal((m, 2), np.float32),
        kind=kind,
    )
    q, embed, experts = (
        "model.layers.0.self_attn.q_proj",
        "model.embed_tokens",
        "model.layers.0.mlp",
    )
    adapter = cm.Adapter(
        {
            q: make(4, 6),
            embed: make(6, 9, cm.Kind("embedding", transposed=True)),
            **{f"{experts}.experts.{e}.up_proj": make(5, 6) for e in range(3)},
        }
    )
    folder = save(adapter, tmp_path / "out", "mlx")
    told = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]
    arrays = mx.load(str(folder / "adapters.safetensors"))
    assert arrays.keys() == load_file(folder / "adapters.safetensors").keys()
    scale, switch = told["scale"], f"{experts}.switch_mlp.up_proj"
    a, b = arrays[f"{q}.lora_a"], arrays[f"{q}.lora_b"]
    assert np.allclose((scale * b.T) @ a.T, adapter[q].dense(), atol=1e-5)
    a, b = arrays[f"{embed}.lora_a"], arrays[f"{embed}.lora_b"]
    assert np.allclose((scale * a) @ b, adapter[embed].dense().T, atol=1e-5)
    product = (scale * arrays[f"{switch}.lora_b"]) @ arrays[f"{switch}.lora_a"]
    for e in range(3):
        expected = adapter[f"{experts}.experts.{e}.up_proj"].dense()
        assert np.allclose(np.asarray(product[e]), expected, atol=1e-5)
