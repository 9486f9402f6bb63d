"""Sources that no format recognises: what they are, for messages."""

import os
import re
from pathlib import Path

from coremerge_jax.io.single_file import SUFFIX, list_files, look_at, read_names

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_RESAVE = (
    "pickle files can run code when they are read, so they are not; load it with the tool that "
    "wrote it, and save it as safetensors"
)

# Files by their endings or names: what each is, and what to do.
_FILES = (
    (
        r"adapter(_model|_\d+)?\.pt",
        f"torchtune's adapter as a pickle file; {_RESAVE}: torchtune's checkpointer for Hugging "
        "Face models writes adapter_model.safetensors and adapter_config.json",
    ),
    (
        r"adapter_model.*\.bin",
        f"PEFT's weights as a pickle file; {_RESAVE}: peft's save_pretrained does that",
    ),
    (r"pytorch_lora_weights\.bin", f"diffusers' LoRA as a pickle file; {_RESAVE}"),
    (r".*\.msgpack", "flax's parameters; restore them with flax, and save them with orbax"),
    (r".*\.(h5|keras)", "a Keras file; load it with Keras, and save its variables with orbax"),
    (r".*\.onnx", "a model for ONNX Runtime, which is no LoRA"),
    (
        r".*\.npz",
        "a NumPy archive, as early releases of MLX's examples wrote; save it as "
        "adapters.safetensors, with the adapter_config.json of mlx-lm",
    ),
    (r"adapter_config\.json", "PEFT's or mlx-lm's configuration; give the folder that it is in"),
    (r".*\.(zip|tar|tgz|tar\.gz)", "an archive; unpack it, and give what is in it"),
)

# Tensors by their names: what a file with one of them is.
_KEYS = (
    (r".*\.processor\.\w*_lora\d\..*", "a LoRA for Flux of XLabs, whose format is not read"),
    (r".*\.(diff|diff_b|w_norm|b_norm)", "differences of whole weights, not low-rank ones"),
    (r".*\.b?oft_(blocks|diag|r|s)(\..*)?", "OFT, which rotates the base weights"),
    (r".*\.[ab][12]\.weight", "GLoRA, which scales the base weights"),
    (r".*\.(on_input|ia3_l.*)", "IA3, which scales activations"),
    (
        r".*(emb_params|string_to_param.*)|clip_[lg]|t5xxl|<[^<>]+>|\*",
        "a textual inversion, which is no LoRA",
    ),
    (r".*\.(lora_E|ranknum).*", "AdaLoRA without its configuration"),
    (r".*\.core", "a compiled merge; coremerge pack lift makes an adapter of it"),
    (r".*\.(matrices|squares)", "statistics of inputs; give them with --statistics"),
    (r".*prompt_embeddings.*", "a trained prompt, which is no LoRA"),
    (r".*vera_lambda.*", "VeRA without its configuration"),
    (
        r"(control_model|input_hint_block|controlnet_\w+|lora_controlnet)(\..*)?",
        "a ControlNet, which is no LoRA",
    ),
    (r"(image_proj|ip_adapter)\..*", "an IP-Adapter, which is no LoRA"),
    (r"(.*\.)?(exp_avg(_sq)?|max_exp_avg_sq|momentum_buffer)(\..*)?", "the state of an optimizer"),
    (
        r"((model\.)?diffusion_model|model\.model)\..*\.(weight|bias)",
        "a checkpoint of an image or video model, without LoRA factors",
    ),
    (r"(vae\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\..*", "a VAE, without LoRA factors"),
    (r".*\.(weight|bias|scales|qweight)", "weights of a model, without LoRA factors"),
)


def describe(source: str | Path) -> str | None:
    """Returns what a file is that no format recognises, or what a folder has; None if unknown.

    Does not raise.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return _describe_folder(path)
        return _describe_file(path) if path.is_file() else None
    except (OSError, ValueError):
        return None


def _describe_file(file: Path) -> str | None:
    told = next((what for name, what in _FILES if re.fullmatch(name, file.name.lower())), None)
    if told is not None:
        return told
    if file.suffix.lower() in _PICKLES:
        return f"a pickle file; {_RESAVE}"
    if file.suffix.lower() != SUFFIX:
        return None
    return _describe_keys(file)


def _describe_keys(file: Path) -> str:
    keys = read_names(file)
    if not keys:
        return "not a readable safetensors file, or one without tensors; download or save it again"
    for pattern, what in _KEYS:
        for key in keys:
            if re.fullmatch(pattern, key[:1000], re.IGNORECASE):
                return f"{what} (it has the tensor {_shown(key)})"
    return f"no adapter that is known: it has the tensor {_shown(keys[0])}"


def _describe_folder(folder: Path) -> str | None:
    files = list_files(folder)
    found = [file.name for file in files if look_at(file.name, read_names(file))]
    if len(found) > 1:
        return (
            f"{len(found)} files that are adapters, {_shown(found[0])} to {_shown(found[-1])}; "
            "give one of these files"
        )
    if found:
        return f"{len(files)} files, of which {_shown(found[0])} is an adapter; give that file"
    if files:
        return f"{_shown(files[0].name)}, which is {_describe_keys(files[0])}"
    if (folder / "model_index.json").is_file():
        return "model_index.json, so it is a pipeline of diffusers, which is a base model"
    for name in sorted(os.listdir(folder)):  # noqa: PTH208  # names are enough
        if (folder / name).is_file() and not name.endswith((SUFFIX, ".json")):
            what = _describe_file(folder / name)
            if what is not None:
                return f"{_shown(name)}, which is {what}"
    inside = [x.name for x in sorted(folder.iterdir()) if x.is_dir() and list_files(x)]
    if inside:
        return (
            f"no files of one, but folders, {_shown(inside[0])} to {_shown(inside[-1])}; give one"
        )
    return None


def _shown(name: str) -> str:
    return repr(name[:100])
