"""Shrink the configuration of every causal architecture of the installed transformers.

In: a `model_type` of transformers' table of causal models. Out: its default configuration with
hidden size 64, two layers (or more, for one of each kind), 4 experts and 520 tokens. Sizes are
found by the words in their keys; what no word finds is in SPECIAL.
"""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 520  # the debug recipe's tokenizer makes ids up to 514
_LAYERS = re.compile(
    r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers|num_blocks|depth"
)

# The first pattern that matches a key's whole name gives its size.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"codebook_size", 512),  # a power of 2
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r".*token_(id|index)|mask_index", 3),
    (r"moe_intermediate_size|.*expert.*_(intermediate|hidden)_size|expert_ffn.*", 32),
    (
        r".*intermediate_size(_mlp)?|.*ffn_dim|ffn_hidden_size|n_inner|d_inner|dff|dim_ff|mlp_dim",
        96,
    ),
    (r"feed_forward_size", 96),
    (r"linear_(key|value)_head_dim|linear_head_dim|mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"linear_num_key_heads", 2),
    (r"linear_num_(value_)?heads", 4),
    (r"(.*_)?(hidden_size|d_model|n_embd|(embedding|embed|emb|model)_dim|embedding_size)", 64),
    (
        r"projection_dim|input_embedding_size|output_embedding_size|lru_width|word_embed_proj_dim",
        64,
    ),
    (r"adapter_(in_dim|out_dim|input_size)", 64),
    (r"hidden_size_global|attention_hidden_size|backbone_hidden_size|hidden_dim|mamba_d_ssm", 64),
    (r"qk_head_dim", 32),
    (r"(.*_)?(head_dim|head_size|dim_head|d_head|kv_channels)|hidden_size_per_layer_input", 16),
    (r"qk_nope_head_dim|v_head_dim|index_head_dim|rotary_dim", 16),
    (r"(kv|q|o)_lora_rank|laurel_rank|hc_lowrank|adapter_rank", 16),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|num_query_groups)", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|index_n_heads", 8),
    (r"(.*_)?(n|num)_(attention_)?heads?|(.*_)?attention_heads", 4),
    (r"((n|num)_(local_|routed_)?|moe_num_|zero_)experts?(_num)?", 4),
    (r"(num|n)_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k", 2),
    (r"first_k_dense_replace|num_dense_layers", 1),  # else there is no layer with experts
    (r"n_group|topk_group|num_expert_groups?|n_groups|o_groups", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 512),
    (r"(.*_)?sliding_window(_size)?|attention_window_size|window_size|local_attention", 16),
    (r"attention_chunk_size|(mamba_)?chunk_size|index_topk|keep_window_size", 16),
    (r"(.*_)?(d_state|state_size)|time_step_rank|mamba_dt_rank", 16),
)


# What a family needs beside small sizes, by `model_type`; it reaches a model's parts, too.
_SHARED_KEYS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
# Zamba attends to states beside embeddings, twice as wide, in hybrids that share their weights.
_TWO_HYBRIDS = {
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "num_hidden_layers": 4,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
_DECODER = {"is_decoder": True}
_DECODERS = (
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_DECODERS, _DECODER),
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "xlm": {"causal": True},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "head_dim": 32,
        "per_layer_config": {
            2: {
                **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32},
                **{"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16},
                **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
            }
        },
    },
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4, "<|visual token 000000|>": 5}},
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_ssm": 64},
    "gemma3n_text": {
        **_SHARED_KEYS,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0] * 2,
    },
    "gemma4_text": {
        **_SHARED_KEYS,
        "num_kv_shared_layers": 2,
        "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
    },
    "gemma4_unified_text": {
        **_SHARED_KEYS,
        "num_kv_shared_layers": 2,
        "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "llama4_text": {"moe_layers": [0, 1]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "rwkv": {"num_hidden_layers": 7},  # one more than the six that it leaves alone in evaluation
    "reformer": {**_DECODER, "axial_pos_embds": False},
    "zamba": {**_TWO_HYBRIDS, "use_mamba_kernels": False},
    "zamba2": {**_TWO_HYBRIDS, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}

# Why a model that transformers calls causal is not tried.
NOT_TRIED = {
    "gemma3n": "its towers need the library timm, which is not installed; gemma3n_text is tried",
    "gemma4_assistant": "it drafts tokens from the states of another model",
    "musicgen": "it predicts codes of sound in several streams, and no text",
    "musicgen_melody": "it predicts codes of sound in several streams, and no text",
}


def shrink(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's settings with small sizes, those of its parts included."""
    small: dict[str, Any] = {}
    layers = max(
        (v for k, v in settings.items() if _LAYERS.fullmatch(k) and type(v) is int), default=0
    )
    lists = [v for v in settings.values() if isinstance(v, list) and len(v) == layers > 2]
    # a list of numbers of layers has as many kinds as layers
    kept = _one_of_each_kind([kinds for kinds in lists if len(set(map(str, kinds))) < layers])
    for key, value in settings.items():
        if key == "per_layer_config" and value:
            layers_of = {int(number): shrink(own) for number, own in value.items()}
            layers_of = {
                i: {k: v for k, v in own.items() if v is not None} for i, own in layers_of.items()
            }
            value = {i: layers_of[old] for i, old in enumerate(kept) if old in layers_of}
        elif isinstance(value, dict) and key.endswith("config"):
            value = shrink(value)
        elif isinstance(value, list) and len(value) == layers > 2:
            value = [value[i] for i in kept]
        elif type(value) is int and _LAYERS.fullmatch(key) and value > 1:
            value = len(kept)
        elif type(value) is int and value >= 0:
            value = next((size for words, size in SIZES if re.fullmatch(words, key)), value)
        elif type(value) is float and ("drop" in key or key.endswith("_pdrop")):
            value = 0.0
        elif key == "initializer_range":
            value = 0.1  # larger than usual, so that small layers act on each other
        small[key] = value
    if small.get("kv_lora_rank"):  # latent attention has no groups of heads
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small | SPECIAL.get(settings.get("model_type", ""), {})


def _one_of_each_kind(lists: list[list[Any]]) -> list[int]:
    """Return the numbers of the layers that show every kind in these lists; two at least."""
    kept = {next(i for i, k in enumerate(kinds) if k == kind) for kinds in lists for kind in kinds}
    for number in range(2):
        if len(kept) < 2:
            kept.add(number)
    return sorted(kept)


def config_of(model_type: str) -> Any:
    """Return the shrunk configuration of a `model_type`."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    settings = shrink({**cls().to_dict(), "model_type": model_type})
    del settings["model_type"]
    return cls(**settings)
