"""Llama, and the models that differ from it only by switches: Mistral, Qwen 2, Qwen 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_lite.errors import CheckpointError
from megatron_lite.families.family import Family, ModelType, TensorNames

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
    "attention_dropout": "attention_dropout",
}
_SIZES: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
_SIZES |= {"initializer_range": 0.02, "tie_word_embeddings": False, "attention_dropout": 0.0}
_QWEN = _SIZES | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN |= {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_FIXED = {"hidden_act": ("silu", "swish"), "is_encoder_decoder": (False,), "is_causal": (True,)}
_NO_BIAS = {"bias": False, "qkv_bias": False, "qk_norm": False}


def _biases_differ(values: Mapping[str, Any]) -> list[str]:
    attention, mlp = values["attention_bias"], values["mlp_bias"]
    return [f"attention_bias={attention} with mlp_bias={mlp}"] if attention != mlp else []


def _model_type(config: ModelConfig) -> str:
    if config.qk_norm:
        if config.bias or config.qkv_bias:
            raise CheckpointError("Hugging Face's Llama does not support model.qk_norm together with biases")
        return "qwen3"
    if config.bias != config.qkv_bias:
        if config.bias or config.head_dim * config.num_heads != config.hidden_size:
            dim = "" if config.bias else f" and model.head_dim={config.head_dim}"
            raise CheckpointError(
                f"Hugging Face's Llama does not support model.bias={config.bias} with "
                f"model.qkv_bias={config.qkv_bias}{dim}"
            )
        return "qwen2"
    return "llama"


def _written(config: ModelConfig) -> dict[str, Any]:
    if config.dropout:
        architecture = LLAMA.model_types[_model_type(config)].architecture
        raise CheckpointError(f"model.dropout={config.dropout}: Hugging Face's {architecture} has none")
    return {"hidden_act": "silu"} | ({"attention_bias": False} if config.qk_norm else {})


LLAMA = Family(
    norm="rms",
    gated=True,
    rotary=True,
    bias=False,
    tied=False,
    ffn_size=lambda hidden: -(-8 * hidden // 3 // 32) * 32,
    names=TensorNames(
        "model",
        "layers",
        "embed_tokens",
        "",
        norms={
            "attention_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "norm": "norm",
            "attention.q_norm": "self_attn.q_norm",
            "attention.k_norm": "self_attn.k_norm",
        },
        linears={
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.out": ("self_attn.o_proj",),
            "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down": ("mlp.down_proj",),
        },
    ),
    model_types={
        "llama": ModelType(
            "LlamaForCausalLM",
            {**_FIELDS, "attention_bias": "qkv_bias", "mlp_bias": "bias"},
            {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048, **_SIZES}
            | {"attention_bias": False, "mlp_bias": False},
            _FIXED,
            contradictions=_biases_differ,
        ),
        "mistral": ModelType(
            "MistralForCausalLM",
            _FIELDS,
            {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072, **_SIZES}
            | {"num_key_value_heads": 8, "sliding_window": 4096},
            _FIXED,
            _NO_BIAS,
            tokenizer="TokenizersBackend",
        ),
        "qwen2": ModelType(
            "Qwen2ForCausalLM",
            _FIELDS,
            _QWEN,
            _FIXED,
            {**_NO_BIAS, "qkv_bias": True},
            harmless=frozenset({"attention_bias"}),
            tokenizer="Qwen2Tokenizer",
            tokenizer_wins=True,
        ),
        "qwen3": ModelType(
            "Qwen3ForCausalLM",
            _FIELDS,
            {**_QWEN, "head_dim": 128},
            {**_FIXED, "attention_bias": (False,)},
            {**_NO_BIAS, "qk_norm": True},
            tokenizer="Qwen2Tokenizer",
        ),
    },
    model_type=_model_type,
    written=_written,
    buffers=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
