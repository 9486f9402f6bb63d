"""Renames of modules between releases of transformers, by family of models.

Paths in here are templates: every component that is a number (a layer, an expert) is written ``#``.
Old names are those of checkpoints and earlier releases, new names those in memory since.
"""

# Names of the layers of transformers that are a `Conv1D`, whose weight is (inputs, outputs).
CONV1D_LAYERS = ("c_attn", "c_fc", "c_proj", "q_attn")

# Ending of the name of a layer's weight that peft adapts as a parameter (``target_parameters``).
WEIGHT = ".weight[0]"

# Ending of the name of an extra: trained rows of an embedding.
TOKENS = ".token_adapter.trainable_tokens_delta"

# Names of models around a language model. They differ most, and say least: a path is compared
# without those that it starts with. Names of vision and audio towers stay.
WRAPPERS = ("backbone", "language_model", "model", "thinker", "vlm")

# Old to new, applied in this order. A pattern ends where a component does.
RENAMES = (
    # Granite MoE: fused already, by another name
    (r"\bblock_sparse_moe\.input_linear(\.weight)?", "mlp.experts.gate_up_proj"),
    (r"\bblock_sparse_moe\.output_linear(\.weight)?", "mlp.experts.down_proj"),
    (r"\bblock_sparse_moe\.router\.layer", "mlp.router"),
    # GPT-NeoX
    (r"^embed_out", "lm_head"),
    # Kimi Linear
    (r"\bself_attn\.(f_[ab]_proj)", r"self_attn.forget_gate.\1"),
    # Aria
    (r"\bexperts\.fc1(\.weight)?", "experts.gate_up_proj"),
    (r"\bexperts\.fc2(\.weight)?", "experts.down_proj"),
    # Mixtral, MiniMax, Phi-MoE
    (r"\bblock_sparse_moe", "mlp"),
    # DINOv2 with a gated MLP
    (r"\bmlp\.weights_in", "mlp.gate_up_proj"),
    (r"\bmlp\.weights_out", "mlp.down_proj"),
    # ViT, DeiT, BEiT, AST, DINOv2: attention.attention; Swin, Segformer: attention.self
    (r"\battention\.(?:attention|self)\.query", "attention.q_proj"),
    (r"\battention\.(?:attention|self)\.key", "attention.k_proj"),
    (r"\battention\.(?:attention|self)\.value", "attention.v_proj"),
    (r"\battention\.output\.dense", "attention.o_proj"),
    (
        r"\battention\.self\.relative_position_bias_table",
        "attention.relative_position_bias.relative_position_bias_table",
    ),
    # As transformers saves the decoder of ViTMAE
    (r"\bdecoder_encoder\.layer", "decoder_layers"),
    # ViT, DeiT, BEiT, AST, Swin
    (r"\bencoder\.layer", "layers"),
    (r"\bintermediate\.dense", "mlp.fc1"),
    (r"\boutput\.dense", "mlp.fc2"),
    # Segformer
    (r"\bencoder\.block\.#", "stages.#.blocks"),
    (r"\bencoder\.patch_embeddings\.#", "stages.#.patch_embeddings"),
    (r"\bencoder\.layer_norm\.#", "stages.#.layer_norm"),
    (r"(?<=\bblocks\.#\.)layer_norm_1", "layernorm_before"),
    (r"(?<=\bblocks\.#\.)layer_norm_2", "layernorm_after"),
    (r"\battention\.self\.layer_norm", "attention.sequence_reduction.layer_norm"),
    (r"\battention\.self\.sr", "attention.sequence_reduction.sequence_reduction"),
    (r"\bmlp\.dense1", "mlp.fc1"),
    (r"\bmlp\.dense2", "mlp.fc2"),
    (r"\bdecode_head\.linear_c", "decode_head.linear_projections"),
    # DETR, RT-DETR and their relatives
    (r"\bencoder\.encoder\.#\.layers", "encoder.aifi.#.layers"),
    (r"\bbackbone\.conv_encoder", "backbone"),
    (r"(?<=attn\.)out_proj", "o_proj"),
    (r"(?<=\blayers\.#\.)(fc[12])", r"mlp.\1"),
)

# More that is the same, in which names of some models are old and of others new.
EQUAL = (
    # Vision towers of CLIP and SigLIP inside of other models
    (r"\bvision_tower\.vision_model", "vision_tower"),
    # Phi-MoE, whose gate was block_sparse_moe.gate
    (r"\bmlp\.router", "mlp.gate"),
    # Gates that are parameters: peft counts one as the only expert
    (r"\b(gate|router)\.weight\[0\]", r"\1"),
)

# Where the parts of a model are: before transformers 4.52, and since.
PLACEMENTS = (
    # Qwen2-VL, Qwen2.5-VL, Qwen3-VL, GLM-4V
    {"model": "model.language_model", "visual": "model.visual"},
    # LLaVA, Gemma 3, PaliGemma, InternVL, Mistral 3, Llama 3.2 Vision, Qwen2-Audio
    {
        "language_model.model": "model.language_model",
        "language_model.lm_head": "lm_head",
        "vision_tower": "model.vision_tower",
        "vision_model": "model.vision_model",
        "audio_tower": "model.audio_tower",
        "multi_modal_projector": "model.multi_modal_projector",
        "image_newline": "model.image_newline",
    },
)

# Parts that have got another place and, in some of these releases, another name.
UNCERTAIN = ("vision_tower.vision_model", "model.vision_tower.encoder.layers")

# Layers of one expert, ``experts.#.w1``, by the names of others: Mixtral, MiniMax, Phi-MoE, LFM2.
EXPERT_LAYERS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# Layers of one expert in models for bitsandbytes, ``experts.gate_up_projs.#``: gpt-oss.
LISTED = {"gate_up_projs": "gate_up_proj", "down_projs": "down_proj"}

# Modules whose rows are those of others, one below the other, with the order of these.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}

# Words in the names of parts that see images or hear sounds.
TOWERS = {
    "images": ("vision", "visual", "image", "video"),
    "sounds": ("audio", "speech", "sound", "acoustic"),
}

# Modules that hold queries, keys and values in an order that depends on the model.
MIXED = ("qkv", "Wqkv", "W_pack", "query_key_value")
