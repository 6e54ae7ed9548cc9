"""Reads a model config from Megatron-LM's arguments: each is honoured, known to be harmless, or refused by name.

A checkpoint contains all arguments of its run, some 700, most of them about training. Arguments that define the model
are known here by name. An unknown argument is refused if its name is about the model and it is switched on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.errors import CheckpointError
from megatron_lite.families import FAMILIES
from megatron_lite.families.family import Family

_UNSET: tuple[Any, ...] = (None, False, 0, "", (), [])
# Arguments of models that are not supported: they must be unset or have one of these values.
_FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("squared_relu", "quick_geglu", "glu_linear_offset", "activation_func", "activation_func_clamp_value"),
            *("apply_layernorm_1p", "layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"),
            *("window_size", "window_attn_skip_freq", "attention_output_gate", "qk_l2_norm", "softmax_scale"),
            *("rotary_interleaved", "no_rope_freq", "mrope_section", "multi_latent_attention", "cache_mla_latents"),
            *("experimental_attention_variant", "linear_attention_freq", "is_hybrid_model", "hybrid_layer_pattern"),
            *("hybrid_override_pattern", "hybrid_attention_ratio", "hybrid_mlp_ratio", "hybrid_stack_spec", "spec"),
            *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json", "yaml_cfg"),
            *("heterogeneous_block_specs", "num_experts", "num_moe_experts", "mtp_num_layers", "use_mup"),
            *("enable_mhc_connections", "retro_add_retriever", "transformer_layer_spec", "language_model_spec"),
            *("modality_submodules_spec", "use_arbitrary_attention_mask", "quant_recipe", "use_kitchen"),
        ),
        _UNSET,
    ),
    "softmax_type": (*_UNSET, "vanilla"),
    "rope_type": (None, "rope"),
    "rotary_percent": (None, 1.0),
}
_HONOURED = {
    *("num_layers", "hidden_size", "num_attention_heads", "group_query_attention", "num_query_groups", "kv_channels"),
    *("ffn_hidden_size", "padded_vocab_size", "max_position_embeddings", "seq_length", "bf16", "swiglu"),
    *("gated_linear_unit", "normalization", "norm_epsilon", "layernorm_epsilon", "qk_layernorm", "openai_gelu"),
    *("bias_gelu_fusion", "add_bias_linear", "disable_bias_linear", "add_qkv_bias", "position_embedding_type"),
    *("use_rotary_position_embeddings", "rotary_base", "use_rope_scaling", "rope_scaling", "rope_scaling_factor"),
    *("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor", "hidden_dropout", "attention_dropout"),
    *("untie_embeddings_and_output_weights", "share_embeddings_and_output_weights"),
}
# Arguments with names about the model that change how it is computed or trained, but not what it computes; and prefixes
# of arguments that matter only together with one that is refused above.
_HARMLESS = {
    *("account_for_embedding_in_pipeline_split", "activation_func_fp8_input_store", "activation_offload_fraction"),
    *("add_position_embedding", "apply_query_key_layer_scaling", "apply_rope_fusion", "apply_wd_to_qk_layernorm"),
    *("attention_backend", "attention_softmax_in_fp32", "batch_invariant_backend", "batch_invariant_mode"),
    *("bias_activation_fusion", "bias_swiglu_fusion", "checkpoint_activations", "clip_grad"),
    *("clone_scatter_output_in_embedding", "create_attention_mask_in_dataloader", "defer_embedding_wgrad_compute"),
    *("disable_mamba_mem_eff_path", "distribute_saved_activations", "embedding_init_method"),
    *("embedding_init_method_std", "embedding_path", "ep_overlap_early_attn_memory_release"),
    *("experimental_attention_variant_loss_scale_func", "expert_gtp_weight_remat_size", "expert_model_parallel_size"),
    *("expert_tensor_parallel_num_weight_shards", "expert_tensor_parallel_size", "fine_grained_activation_offloading"),
    *("flash_attention_version", "fp32_residual_connection", "fused_residual_rmsnorm", "fused_single_qkv_rope"),
    *("grad_scale_func", "head_lr_mult", "hybrid_context_parallel", "initial_loss_scale", "linear_conv_kernel_dim"),
    *("linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim", "logit_dtype"),
    *("loss_scale", "loss_scale_window", "masked_softmax_fusion", "memory_efficient_layer_norm", "min_loss_scale"),
    *("mscale", "mscale_all_dim", "multiple_validation_sets", "no_bias_dropout_fusion", "no_bias_gelu_fusion"),
    *("no_bias_swiglu_fusion", "no_create_attention_mask_in_dataloader", "no_masked_softmax_fusion"),
    *("no_persist_layer_norm", "no_position_embedding", "no_rope_fusion"),
    *("num_microbatches_with_partial_activation_checkpoints", "num_speculative_tokens"),
    *("original_max_position_embeddings", "output_bert_embeddings", "overlap_dispatch_backward_with_experts_wgrad"),
    *("overlap_moe_expert_parallel_comm", "persist_layer_norm", "qk_head_dim", "qk_pos_emb_head_dim"),
    *("reset_attention_mask", "reset_position_ids", "rotary_scaling_factor", "run_workload_inspector_server"),
    *("scatter_embedding_sequence_parallel", "special_token_ids", "special_tokens", "throughput_window_size"),
    *("tp_comm_overlap_disable_qkv", "use_flash_attn", "use_flashinfer_fused_rope", "use_fused_weighted_squared_relu"),
    *("use_grouped_gemm_for_shared_expert", "use_kitchen_attention", "use_mamba_mem_eff_path"),
    *("use_te_activation_func", "v_head_dim"),
}
_DEPENDENT = (
    *("moe_", "mamba_", "dsa_", "gdp_", "mhc_", "mtp_", "mup_", "yarn_", "relative_attention_", "retro_"),
    *("bert_", "dino_", "ict_", "indexer_", "retriever_", "grpo_", "rl_", "inference_", "log_", "logits_load_"),
    *("logits_save_", "fp8", "fp4", "tokenizer_", "tiktoken_", "cpu_offloading", "recompute_", "save_", "muon_"),
    *("kitchen_", "qk_clip", "gtp_"),
    *("ckpt_", "dist_", "fim_", "megatron_", "exit_", "data", "lr_", "optim", "vision_", "cuda_graph_", "use_torch"),
)
_ABOUT_THE_MODEL = re.compile(
    "rope|rotary|yarn|attention|attn|softmax|norm|activation|glu|gelu|relu|embed|logit|residual|qk|scal|mult|softcap"
    "|window|alibi|position|gate|clamp|latent|connection|clip|expert|moe|mamba|hybrid|heterogen|spec|variant|mtp"
    "|causal|head_dim|hidden_act|linear_|no_bias"
)


def from_args(args: Mapping[str, Any], where: Path, vocab_size: int | None) -> tuple[dict[str, Any], list[str]]:
    """Our ``model`` section for Megatron's arguments, and notes for the user. Raises CheckpointError naming every
    argument that cannot be honoured."""
    missing = [n for n in ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size") if not args.get(n)]
    if missing:
        raise CheckpointError(f"{where}: its args lack {', '.join(missing)}")
    refused = [f"{name}={args[name]!r}" for name, allowed in _FIXED.items() if args.get(name) not in allowed]
    refused += [f"{name}={args[name]!r} is unknown" for name in sorted(args) if _unknown(name) and _set(args[name])]
    either = _Either(args, refused)
    swiglu = bool(args.get("swiglu"))
    rope = args.get("position_embedding_type") == "rope" or bool(args.get("use_rotary_position_embeddings"))
    norm, positions = args.get("normalization", "LayerNorm"), args.get("position_embedding_type", "learned_absolute")
    kinds = (swiglu, "rope" if rope else positions, norm)
    family = next((name for name, table in FAMILIES.items() if _kinds(table) == kinds), None)
    if family is None:
        refused.append(
            f"swiglu={swiglu} with position_embedding_type={positions!r} and normalization={norm!r} (only Llama's: "
            "true, 'rope', 'RMSNorm', or GPT-2's: false, 'learned_absolute', 'LayerNorm')"
        )
    if args.get("gated_linear_unit") and not swiglu:
        refused.append("gated_linear_unit without swiglu")
    if not swiglu and not args.get("bias_gelu_fusion"):
        refused.append("gelu without the tanh approximation (bias_gelu_fusion)")
    bias = not args["disable_bias_linear"] if "disable_bias_linear" in args else bool(args.get("add_bias_linear", True))
    untied = args.get("untie_embeddings_and_output_weights")
    shared = args.get("share_embeddings_and_output_weights")
    if untied is not None and shared is not None and bool(untied) == bool(shared):
        refused.append(
            f"untie_embeddings_and_output_weights={untied} with share_embeddings_and_output_weights={shared}"
        )
    tied = not untied if untied is not None else shared is None or bool(shared)
    heads, padded = args["num_attention_heads"], args["padded_vocab_size"]
    dropout = args.get("hidden_dropout") or 0.0
    section = {
        "family": family,
        "vocab_size": vocab_size or padded,
        "vocab_multiple": padded,
        "num_layers": args["num_layers"],
        "hidden_size": args["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": (args.get("num_query_groups") or heads) if args.get("group_query_attention") else heads,
        "head_dim": args.get("kv_channels") or args["hidden_size"] // heads,
        "ffn_size": args.get("ffn_hidden_size") or 4 * args["hidden_size"],
        "max_seq_len": args.get("max_position_embeddings") or args.get("seq_length") or 2048,
        "norm_eps": either("norm_epsilon", "layernorm_epsilon", default=1e-5),
        "bias": bias,
        "qkv_bias": bias or bool(args.get("add_qkv_bias")),
        "qk_norm": bool(args.get("qk_layernorm")),
        "tie_embeddings": tied,
        "attention_dropout": args.get("attention_dropout") or 0.0,
        "dropout": 0.0 if swiglu else dropout,
    }
    if rope:
        section |= _rope(args, either, refused)
    if refused:
        raise CheckpointError(f"{where}: cannot be honoured: {'; '.join(refused)}")
    notes = []
    if swiglu and dropout:
        notes.append(f"trained with hidden_dropout={dropout}; to go on with it, set model.dropout={dropout}")
    return section, notes


def _kinds(family: Family) -> tuple[bool, str, str]:
    """A family's switches in Megatron's words."""
    norm = {"rms": "RMSNorm", "layer": "LayerNorm"}[family.norm]
    return family.gated, "rope" if family.rotary else "learned_absolute", norm


def _rope(args: Mapping[str, Any], either: _Either, refused: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": float(args.get("rotary_base") or 10000)}
    linear = either("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor", default=None)
    if either("use_rope_scaling", "rope_scaling", default=False):
        found["rope_scaling"] = {"type": "llama3", "factor": args.get("rope_scaling_factor") or 8.0}
        if linear not in (None, 1):
            refused.append(f"rotary_seq_len_interpolation_factor={linear} with use_rope_scaling")
    elif linear not in (None, 1):
        found["rope_scaling"] = {"type": "linear", "factor": linear}
    return found


def of_the_model(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that define the model, which must be equal on all ranks of a checkpoint."""
    known = {name: value for name, value in args.items() if name in _HONOURED or name in _FIXED}
    return {name: value for name, value in known.items() if value in _UNSET or _set(value)}


class _Either:
    """Values of arguments that have two names; if both are given, they must agree."""

    def __init__(self, args: Mapping[str, Any], refused: list[str]) -> None:
        self.args, self.refused = args, refused

    def __call__(self, *names: str, default: Any) -> Any:
        found = {name: self.args[name] for name in names if self.args.get(name) is not None}
        if len(set(found.values())) > 1:
            self.refused.append(" but ".join(f"{name}={value!r}" for name, value in found.items()))
        return next(iter(found.values()), default)


def _unknown(name: str) -> bool:
    """Whether this is an unknown argument about the model."""
    known = name in _FIXED or name in _HONOURED or name in _HARMLESS or name.startswith(_DEPENDENT)
    return not known and _ABOUT_THE_MODEL.search(name) is not None


def _set(value: Any) -> bool:
    """Whether an argument is set."""
    return isinstance(value, (bool, int, float, str, list, tuple, dict)) and bool(value)
