"""GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_lite.errors import CheckpointError
from megatron_lite.families.family import Family, ModelType, TensorNames

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig


def _dropouts_differ(values: Mapping[str, Any]) -> list[str]:
    return ["embd_pdrop differs from resid_pdrop"] if values["embd_pdrop"] != values["resid_pdrop"] else []


def _model_type(config: ModelConfig) -> str:
    differs = {
        "bias": not config.bias,
        "qkv_bias": not config.qkv_bias,
        "num_kv_heads": config.num_kv_heads != config.num_heads,
        "head_dim": config.head_dim * config.num_heads != config.hidden_size,
    }
    if wrong := [f"model.{key}={getattr(config, key)}" for key in differs if differs[key]]:
        raise CheckpointError(f"Hugging Face's GPT-2 does not support {', '.join(wrong)}")
    return "gpt2"


GPT2 = Family(
    norm="layer",
    gated=False,
    rotary=False,
    bias=True,
    tied=True,
    ffn_size=lambda hidden: 4 * hidden,
    names=TensorNames(
        "transformer",
        "h",
        "wte",
        "wpe",
        norms={"attention_norm": "ln_1", "mlp_norm": "ln_2", "norm": "ln_f"},
        linears={
            "attention.qkv": ("attn.c_attn",),
            "attention.out": ("attn.c_proj",),
            "mlp.up": ("mlp.c_fc",),
            "mlp.down": ("mlp.c_proj",),
        },
        transposed=True,
    ),
    model_types={
        "gpt2": ModelType(
            "GPT2LMHeadModel",
            {
                "vocab_size": "vocab_size",
                "n_embd": "hidden_size",
                "n_inner": "ffn_size",
                "n_layer": "num_layers",
                "n_head": "num_heads",
                "n_positions": "max_seq_len",
                "layer_norm_epsilon": "norm_eps",
                "initializer_range": "init_std",
                "tie_word_embeddings": "tie_embeddings",
                "resid_pdrop": "dropout",
                "attn_pdrop": "attention_dropout",
            },
            {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
            | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02}
            | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
            {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,)}
            | dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"), (False,))
            | {"add_cross_attention": (False,), "is_encoder_decoder": (False,), "is_causal": (True,)},
            aliases={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
            | {"max_position_embeddings": "n_positions"},
            contradictions=_dropouts_differ,
            tokenizer="GPT2Tokenizer",
        )
    },
    model_type=_model_type,
    written=lambda config: {"activation_function": "gelu_new", "embd_pdrop": config.dropout},
    buffers=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
)
