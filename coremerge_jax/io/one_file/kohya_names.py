"""Names of modules in sd-scripts' files, whose dots are underscores, and back to dots.

``lora_unet_mid_block_attentions_0_proj_in`` is ``mid_block.attentions.0.proj_in`` of the UNet. To
know which underscores were dots takes the words of a model family. The families here are those
that sd-scripts, musubi-tuner and ComfyUI know; a name that is none of theirs, or that can be read
in two ways, stays flat.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

from coremerge_jax.errors import UnsupportedError

ORIGINAL = "diffusion_model"


@dataclasses.dataclass(frozen=True)
class _Family:
    """Words of the names of a model family.

    Attributes:
        component: first part of the paths of its modules.
        roots: words that a name begins with.
        words: all other words; numbers are words as well.
    """

    component: str
    roots: frozenset[str]
    words: frozenset[str]

    @functools.cached_property
    def longest(self) -> int:
        """The largest number of pieces that a word has."""
        return max(word.count("_") for word in self.roots | self.words) + 1

    def unflatten(self, name: str) -> str | None:
        """Returns the name with its dots; None if there is none, or more than one."""
        pieces = name.split("_")
        # Up to two ways to read the pieces from each on, the last pieces first.
        ways: list[list[str]] = [[] for _ in pieces] + [[""]]
        for start in reversed(range(len(pieces))):
            for stop in range(start + 1, min(start + self.longest, len(pieces)) + 1):
                if self._is_word(pieces, start, stop):
                    word = "_".join(pieces[start:stop])
                    ways[start] += [f".{word}{rest}" for rest in ways[stop]]
            del ways[start][2:]
        return ways[0][0][1:] if len(ways[0]) == 1 else None

    def _is_word(self, pieces: list[str], start: int, stop: int) -> bool:
        word = "_".join(pieces[start:stop])
        if start == 0:
            return word in self.roots
        # "linear_1" is one word where there is such a word.
        numbered = word.isdecimal() and f"{pieces[start - 1]}_{word}" not in self.words
        return numbered or word in self.words


def _family(component: str, roots: str, words: str) -> _Family:
    return _Family(component, frozenset(roots.split()), frozenset(words.split()))


_ATTENTION = "to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out to_qkv to_gate"
_UNET = f"{_ATTENTION} transformer_blocks attn1 attn2 ff net proj proj_in proj_out conv"
_STREAMS = "img_attn txt_attn img_mlp txt_mlp img_mod txt_mod linear1 linear2 modulation mlp"
_EMBEDDERS = "in_layer out_layer adaLN_modulation linear mlp norm"

# In the order in which names that two families share are read.
_UNETS = (
    # Stable Diffusion, by diffusers' names
    _family(
        "unet",
        "down_blocks up_blocks mid_block conv_in conv_out time_embedding add_embedding",
        f"{_UNET} attentions resnets downsamplers upsamplers motion_modules conv1 conv2 "
        "conv_shortcut time_emb_proj linear_1 linear_2 cond_proj",
    ),
    # Stable Diffusion, by the names of its authors
    _family(
        ORIGINAL,
        "input_blocks middle_block output_blocks time_embed label_emb out",
        f"{_UNET} in_layers out_layers emb_layers skip_connection op",
    ),
    # Flux, Flux 2, Chroma
    _family(
        ORIGINAL,
        "double_blocks single_blocks img_in txt_in time_in vector_in guidance_in final_layer "
        "double_stream_modulation_img double_stream_modulation_txt single_stream_modulation "
        "distilled_guidance_layer",
        f"{_STREAMS} {_EMBEDDERS} qkv proj lin layers in_proj out_proj",
    ),
    # HunyuanVideo
    _family(
        ORIGINAL,
        "double_blocks single_blocks img_in txt_in time_in vector_in guidance_in final_layer",
        f"{_EMBEDDERS} img_attn_qkv img_attn_proj txt_attn_qkv txt_attn_proj img_mlp txt_mlp "
        "img_mod txt_mod linear1 linear2 modulation fc1 fc2 individual_token_refiner blocks "
        "self_attn_qkv self_attn_proj input_embedder t_embedder c_embedder linear_1 linear_2 proj",
    ),
    # Stable Diffusion 3
    _family(
        ORIGINAL,
        "joint_blocks x_embedder context_embedder t_embedder y_embedder final_layer",
        "context_block x_block attn attn2 qkv proj mlp fc1 fc2 adaLN_modulation linear",
    ),
    # Wan
    _family(
        ORIGINAL,
        "blocks patch_embedding text_embedding time_embedding time_projection head img_emb "
        "vace_blocks vace_patch_embedding",
        "self_attn cross_attn q k v o k_img v_img ffn head proj before_proj after_proj",
    ),
    # Cosmos and Anima
    _family(
        ORIGINAL,
        "blocks x_embedder t_embedder final_layer",
        "self_attn cross_attn q_proj k_proj v_proj output_proj mlp layer1 layer2 proj linear "
        "linear_1 linear_2 adaln_modulation_self_attn adaln_modulation_cross_attn "
        "adaln_modulation_mlp",
    ),
    # HiDream
    _family(
        ORIGINAL,
        "double_stream_blocks single_stream_blocks caption_projection final_layer",
        f"{_ATTENTION} block attn1 to_q_t to_k_t to_v_t to_out_t ff_i ff_t experts shared_experts "
        "gate w1 w2 w3 adaLN_modulation linear",
    ),
    # Lumina and Z-Image
    _family(
        ORIGINAL,
        "layers context_refiner noise_refiner cap_embedder x_embedder t_embedder final_layer",
        "attention qkv out to_q to_k to_v to_out feed_forward w1 w2 w3 adaLN_modulation mlp linear",
    ),
    # Qwen-Image and LTX-Video, whose authors' names are diffusers'
    _family(
        ORIGINAL,
        "transformer_blocks img_in txt_in time_text_embed norm_out proj_out patchify_proj "
        "adaln_single caption_projection",
        f"{_ATTENTION} attn attn1 attn2 ff net proj img_mlp txt_mlp img_mod txt_mod linear "
        "linear_1 linear_2 timestep_embedder emb",
    ),
)

_TRANSFORMERS = (
    _family(
        "transformer",
        "transformer_blocks single_transformer_blocks x_embedder context_embedder time_text_embed "
        "norm_out proj_out pos_embed blocks condition_embedder",
        f"{_ATTENTION} attn attn1 attn2 ff ff_context net proj proj_mlp proj_out norm norm1 "
        "norm1_context linear linear_1 linear_2 timestep_embedder text_embedder guidance_embedder",
    ),
)

_PROJECTIONS = "q_proj k_proj v_proj o_proj out_proj mlp fc1 fc2 gate_proj up_proj down_proj"
_TEXTS = (
    ("text_model text_projection", f"encoder layers self_attn {_PROJECTIONS}"),
    ("encoder", "block layer SelfAttention DenseReluDense q k v o wi wi_0 wi_1 wo"),
    ("model layers", f"model layers self_attn {_PROJECTIONS}"),
)

_ENCODERS = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}

# The families that a name may be of, by its beginning.
_PREFIXES = {
    "lora_unet_": _UNETS,
    "lora_transformer_": _TRANSFORMERS,
    **{
        prefix: tuple(_family(component, *words) for words in _TEXTS)
        for prefix, component in _ENCODERS.items()
    },
}

_FLAT = {
    "unet": "lora_unet",
    ORIGINAL: "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}


def unflatten(names: Iterable[str]) -> dict[str, str]:
    """Returns the paths of modules by their flat names; a name that is not known is its own path.

    `flatten` gives the names back.
    """
    names = list(names)
    paths: dict[str, str] = {}
    for prefix, families in _PREFIXES.items():
        flat = [name for name in names if name.startswith(prefix)]
        paths |= _read(prefix, flat, families)
    told = flatten_all(paths.values())
    # "lora_te1" and "lora_te" are both the first text encoder: the other modules tell which.
    known = {name: path for name, path in paths.items() if told[path] == name}
    return {name: known.get(name, name) for name in names}


def _read(prefix: str, names: list[str], families: tuple[_Family, ...]) -> dict[str, str]:
    """Returns paths of the names that the family knows which knows most of them."""
    best: dict[str, str] = {}
    for family in families:
        read = {name: family.unflatten(name.removeprefix(prefix)) for name in names}
        found = {name: f"{family.component}.{path}" for name, path in read.items() if path}
        best = max(best, found, key=len)  # the first of those that know as many
    return best


def flatten_all(paths: Iterable[str]) -> dict[str, str]:
    """Returns flat names by path.

    Raises:
        UnsupportedError: a path is of no component that sd-scripts has a name for.
    """
    paths = list(paths)
    # Models with one text encoder call it "te"; those with more, "te1" and so on.
    several = any(p.startswith(("text_encoder_", f"{ORIGINAL}.")) for p in paths)
    first: Mapping[str, str] = {"text_encoder": "lora_te1" if several else "lora_te"}
    return {path: _flatten(path, {**_FLAT, **first}) for path in paths}


def flat_key(path: str) -> str:
    """Returns a name that all spellings of a module have in common, flat and with dots."""
    component, dot, rest = path.partition(".")
    flat = {**_FLAT, "text_encoder": "lora_te"}.get(component)
    name = f"{flat}_{rest.replace('.', '_')}" if flat and dot else path
    return f"lora_te_{name.removeprefix('lora_te1_')}" if name.startswith("lora_te1_") else name


def _flatten(path: str, prefixes: Mapping[str, str]) -> str:
    component, dot, rest = path.partition(".")
    if not dot and component.startswith(("lora_", "lycoris_")):
        return path
    if component not in prefixes or not rest:
        raise UnsupportedError(
            f"module {path!r} has no name in kohya's format, which is for image and video models: "
            f"expected a path that begins with one of {', '.join(prefixes)}; write it with --to "
            "peft"
        )
    return f"{prefixes[component]}_{rest.replace('.', '_')}"
