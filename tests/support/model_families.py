"""Tiny random models of mlx-lm's architecture families, and mlx-lm's own greedy decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import mlx.core as mx
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step
from mlx_lm.utils import _get_classes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.worker.engine.kv.padded import LanguageModel

VOCABULARY: Final = 300
WINDOW: Final = 24  # tokens; shorter than most prompts of the tests
GAIN: Final = 3.0

SLIDING: Final = ["sliding_attention", "full_attention"]
BASE: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "norm_eps": 1e-6,
    "layer_norm_eps": 1e-6,
    "layer_norm_epsilon": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "query_pre_attn_scalar": 16,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
EXPERTS: Final[dict[str, Any]] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
CONVOLUTIONAL: Final[dict[str, Any]] = {  # lfm2's short convolutions
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
LATENT: Final[dict[str, Any]] = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
STATE_SPACE: Final[dict[str, Any]] = {
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "ssm_state_size": 8,
    "state_size": 8,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "time_step_limit": (0.001, 100.0),
}
FLAT: Final[dict[str, Any]] = {  # multipliers that would shrink the logits' differences to nothing
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "logit_scale": 1.0,
}
GATED_DELTA: Final[dict[str, Any]] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,  # the kernel takes multiples of 32
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": False,
    "full_attention_interval": 2,
}
SHARED_EXPERTS: Final[dict[str, Any]] = EXPERTS | {
    "num_shared_experts": 1,
    "num_dense_layers": 1,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "score_function": "sigmoid",
    "use_qk_norm": True,
}

# Families whose caches are plain, rotating, latent or recurrent: config.json beyond BASE.
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW, "layer_types": SLIDING},
    "ministral3": {
        "sliding_window": WINDOW,
        "layer_types": SLIDING,
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    },
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma": {},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
    },
    "phi3": {},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": SLIDING},
    "glm4": {},
    "cohere2": FLAT | {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "exaone4": {
        "sliding_window": WINDOW,
        "sliding_window_pattern": "LG",
    },
    "starcoder2": {},
    "gpt_oss": EXPERTS | {"sliding_window": WINDOW, "layer_types": SLIDING},
    "deepseek_v2": EXPERTS
    | LATENT
    | {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "mscale_all_dim": 0.7,
        },
    },
    "deepseek_v3": EXPERTS | LATENT | {"topk_method": "noaux_tc"},
    "mamba": STATE_SPACE,
    "mamba2": STATE_SPACE | {"num_heads": 4, "intermediate_size": 64},
    "lfm2": CONVOLUTIONAL | {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": STATE_SPACE | FLAT,
    "jamba": EXPERTS
    | STATE_SPACE
    | {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "granitemoehybrid": EXPERTS | STATE_SPACE | FLAT | {"layer_types": ["mamba", "attention"]},
    "nemotron_h": EXPERTS | STATE_SPACE | {"hybrid_override_pattern": ["M", "*", "-"]},
    "qwen3_next": EXPERTS | GATED_DELTA,
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "afmoe": SHARED_EXPERTS | {"sliding_window": WINDOW, "layer_types": SLIDING},
    "apertus": {"qk_norm": True, "post_norm": False},
    "bailing_moe": SHARED_EXPERTS | {"rotary_dim": 8},
    "cohere": {},
    "deepseek": {},
    "deepseek_v32": {},
    "dots1": SHARED_EXPERTS,
    "ernie4_5": {"use_bias": False},
    "exaone": {"num_layers": 2},
    "exaone_moe": SHARED_EXPERTS
    | {"sliding_window": WINDOW, "layer_types": SLIDING, "is_moe_layer": [False, True]},
    "glm": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 4096, "n_ctx": 4096},
    "gpt_neox": {"use_parallel_residual": False, "rotary_pct": 0.5, "rotary_emb_base": 10_000},
    "granite": FLAT,
    "granitemoe": EXPERTS | FLAT,
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "lfm2_moe": SHARED_EXPERTS
    | {
        "conv_bias": False,
        "conv_L_cache": 3,
        "use_expert_bias": False,
        "layer_types": ["conv", "full_attention"],
    },
    "mimo": {},
    "minicpm": {"scale_depth": 1.4, "scale_emb": 1.0, "dim_model_base": 64},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "olmo_hybrid": GATED_DELTA | {"layer_types": ["linear_attention", "full_attention"]},
    "olmoe": EXPERTS,
    "phi": {},
    "plamo3": {},
    "qwen2_moe": EXPERTS,
    "qwen3_5": {"text_config": BASE | GATED_DELTA | {"rope_parameters": None}},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": SHARED_EXPERTS,
    "stablelm": {"use_qkv_bias": False, "layer_norm_eps": 1e-5},
    "telechat3": {},
}
# Recurrent states that, with random weights, forget a token within some ten others.
FORGETFUL: Final = frozenset({"mamba", "mamba2", "lfm2", "lfm2_moe", "olmo_hybrid"})
# Families that mlx-lm can't batch, and what the refusal names.
REFUSED: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama4": (
        "model: layer 0 keeps a ChunkedKVCache",
        {
            "text_config": BASE
            | EXPERTS
            | {
                "model_type": "llama4_text",
                "num_hidden_layers": 4,
                "attention_chunk_size": 32,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 96,
                "num_experts_per_tok": 1,
                "use_qk_norm": True,
            }
        },
    ),
    "gemma2": ("model: mlx-lm can't batch gemma2 with rows of different lengths", {}),
    "gpt_bigcode": (
        "model: mlx-lm can't batch gpt_bigcode with rows of different lengths",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_inner": 128,
            "n_head": 4,
            "n_positions": 4096,
            "layer_norm_epsilon": 1e-5,
        },
    ),
}


def build(family: str, config: dict[str, Any], seed: int = 0) -> LanguageModel:
    """Return a float32 model with random weights, by the classes that mlx-lm loads it with.

    Weights as drawn would let a row's last token alone decide the next one; matrices are scaled
    up until the whole context has a say.
    """
    mx.random.seed(seed)
    described = BASE | {"model_type": family} | config
    model_class, arguments_class = _get_classes(described)
    model = model_class(arguments_class.from_dict(described))
    model.update(tree_map_with_path(_scaled, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return cast("LanguageModel", model)


def _scaled(path: str, weight: mx.array) -> mx.array:
    weight = weight.astype(mx.float32)
    return GAIN * weight if path.endswith("proj.weight") else weight


@dataclass(frozen=True)
class Reference:
    """What mlx-lm decodes: tokens, and the log probability that each had over the second best."""

    tokens: Sequence[int]
    gaps: Sequence[float]


def by_mlx_lm(model: LanguageModel, prompt: Sequence[int], max_tokens: int) -> Reference:
    """Decode one prompt alone by `generate_step`, greedily, to `max_tokens`."""
    tokens: list[int] = []
    gaps: list[float] = []
    for token, logprobs in generate_step(
        mx.array(list(prompt)), cast("Any", model), max_tokens=max_tokens
    ):
        second, first = cast("list[float]", mx.sort(logprobs)[-2:].tolist())
        tokens.append(int(token))
        gaps.append(first - second)
    return Reference(tokens, gaps)
