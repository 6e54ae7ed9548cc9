"""Hugging Face's names for our models: config fields and tensors, both ways. No torch.

A field of a ``config.json`` is honoured, known to change nothing, or refused by name: none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lite.config import ModelConfig
from megatron_lite.errors import CheckpointError

# Of no consequence for what the model computes.
_HARMLESS = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "return_dict", "output_hidden_states"),
    *("output_attentions", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "task_specific_params"),
    *("max_window_layers", "_attn_implementation", "_attn_implementation_autoset", "rope_theta", "rope_scaling"),
    *("rope_parameters", "n_ctx", "tokenizer_class", "summary_type", "summary_use_proj", "summary_activation"),
    *("summary_proj_to_labels", "summary_first_dropout", "embd_pdrop", "layer_types", "is_llama_config"),
    *("rope_interleaved", "transformers.js_config", "sliding_window", "use_sliding_window", "attention_bias"),
    *("_num_labels", "num_labels", "gradient_checkpointing", "output_past", "torchscript", "tf_legacy_loss"),
}
# What has to have one of these values, because the model knows nothing else.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "rope_interleaved": (False,),
    "quantization_config": (None,),
}
_LLAMA = {
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
    "mlp_bias": "bias",
}
_GPT2 = {
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
}
_FIELDS = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # not the model's: they go with its tokenizer
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_DEFAULTS = {"llama": 1e-6, "mistral": 1e-6, "qwen2": 1e-6, "qwen3": 1e-6, "gpt2": 1e-5}  # of the norms' epsilon


def model_section(tree: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The ``model`` section that a ``config.json`` describes, and what the user should know about it.

    Raises CheckpointError naming every field that cannot be honoured.
    """
    kind = tree.get("model_type")
    if kind not in _FIELDS:
        raise CheckpointError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(_FIELDS)}")
    if "auto_map" in tree:
        raise CheckpointError(f"{where}: auto_map names code to run, which is never done")
    fields, notes = _FIELDS[kind], []
    refused = [
        f"{key}={tree[key]!r} (only {' or '.join(map(repr, values))})"
        for key, values in _FIXED.items()
        if key in tree and tree[key] not in values
    ]
    refused += sorted(f"{key} is unknown" for key in tree.keys() - fields.keys() - _HARMLESS - _FIXED.keys())
    section: dict[str, Any] = {"family": "gpt2" if kind == "gpt2" else "llama"}
    section |= {ours: tree[theirs] for theirs, ours in fields.items() if tree.get(theirs) is not None}
    section.setdefault("norm_eps", _DEFAULTS[kind])
    section.setdefault("tie_embeddings", kind == "gpt2")
    if kind == "gpt2":
        if tree.get("embd_pdrop", 0.1) != tree.get("resid_pdrop", 0.1):
            refused.append("embd_pdrop differs from resid_pdrop")
        section.setdefault("dropout", 0.1)
        section.setdefault("attention_dropout", 0.1)
    else:
        section |= {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3"}
        bias, mlp_bias = bool(tree.get("attention_bias", False)), bool(tree.get("mlp_bias", False))
        if bias != mlp_bias:
            refused.append(f"attention_bias={bias} with mlp_bias={mlp_bias}")
        elif bias and kind == "llama":
            section["qkv_bias"] = True
        section |= _rope(tree, refused)
        window = tree.get("sliding_window") if tree.get("use_sliding_window", kind == "mistral") else None
        if window is not None and window < section.get("max_seq_len", 0):
            section["max_seq_len"] = window
            notes.append(f"attention is over all tokens, which is the same within sliding_window={window}: so long are "
                         "the sequences it takes (model.max_seq_len)")  # fmt: skip
        if any(layer != "full_attention" for layer in tree.get("layer_types") or ()) and window is None:
            refused.append("layer_types other than full_attention")
    if refused:
        raise CheckpointError(f"{where}: cannot be honoured: {'; '.join(refused)}")
    return section, notes


def _rope(tree: Mapping[str, Any], refused: list[str]) -> dict[str, Any]:
    """Rotary frequencies, from either of the spellings that are in use."""
    scaling = dict(tree.get("rope_parameters") or tree.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", tree.get("rope_theta", 10000.0))
    kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    scaling.pop("type", None)
    if kind == "default":
        return {"rope_theta": theta}
    names = {"factor": "factor"}
    if kind == "llama3":
        names |= {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
        names["original_max_position_embeddings"] = "original_max_seq_len"
    elif kind != "linear":
        refused.append(f"rope_type={kind!r} (only 'default', 'linear' or 'llama3')")
        return {}
    if extra := sorted(scaling.keys() - names.keys()):
        refused.append(f"rope_scaling.{', '.join(extra)} with rope_type={kind!r}")
    return {
        "rope_theta": theta,
        "rope_scaling": {"type": kind, **{ours: scaling[t] for t, ours in names.items() if t in scaling}},
    }


def model_type(config: ModelConfig) -> str:
    """The architecture that computes what this config says. Raises CheckpointError where there is none."""
    if config.family == "gpt2":
        wrong = [
            text
            for text, differs in (
                ("bias", not config.bias),
                ("qkv_bias", not config.qkv_bias),
                ("num_kv_heads", config.num_kv_heads != config.num_heads),
                ("head_dim", (config.head_dim or 0) * config.num_heads != config.hidden_size),
            )
            if differs
        ]
        if wrong:
            raise CheckpointError(f"Hugging Face's GPT-2 has no model.{' nor model.'.join(wrong)} other than its own")
        return "gpt2"
    if config.qk_norm:
        if config.bias or config.qkv_bias:
            raise CheckpointError("Hugging Face has no Llama with model.qk_norm and biases as these")
        return "qwen3"
    if config.bias != config.qkv_bias:
        if config.bias or (config.head_dim or 0) * config.num_heads != config.hidden_size:
            raise CheckpointError("Hugging Face has no Llama with model.bias and model.qkv_bias as these")
        return "qwen2"
    return "llama"


def config_json(config: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a model, as ``model_section`` reads it. Raises CheckpointError where there is none."""
    kind = model_type(config)
    section = config.model_dump()
    tree: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "torch_dtype": dtype}
    tree |= {name: token_ids.get(name) for name in TOKEN_IDS}  # what is left out would be some other model's
    tree |= {theirs: section[ours] for theirs, ours in _FIELDS[kind].items()}
    if kind == "gpt2":
        return tree | {"activation_function": "gelu_new", "embd_pdrop": config.dropout}
    if config.dropout:
        raise CheckpointError(f"model.dropout={config.dropout}: Hugging Face's {ARCHITECTURES[kind]} has none")
    tree |= {"hidden_act": "silu", "rope_theta": config.rope_theta, "rope_scaling": None}
    if kind == "llama":
        tree["attention_bias"] = bool(config.bias)
    else:
        del tree["mlp_bias"]
    if kind == "qwen3":
        tree["attention_bias"] = False
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        tree["rope_scaling"] = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            tree["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    return tree


@dataclass(frozen=True)
class Part:
    """Rows of one of our tensors that are a tensor of theirs. ``shape``: ours; ``transposed``: theirs is [in, out]."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """Its shape in their files."""
        return self.shape[::-1] if self.transposed else self.shape


def tensor_parts(config: ModelConfig) -> dict[str, list[Part]]:
    """Every tensor of ours as those of theirs, one below the other; the vocabulary in its true size."""
    assert config.vocab_size and config.ffn_size and config.num_kv_heads and config.head_dim
    hidden, ffn, gpt2 = config.hidden_size, config.ffn_size, config.family == "gpt2"
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    top = "transformer" if gpt2 else "model"
    vocabulary = (config.vocab_size, hidden)
    parts = {"embedding.weight": [Part(f"{top}.{'wte' if gpt2 else 'embed_tokens'}.weight", vocabulary)]}
    if gpt2:
        parts["positions.weight"] = [Part(f"{top}.wpe.weight", (config.max_seq_len, hidden))]
        qkv, up = {"attn.c_attn": q + 2 * kv}, {"mlp.c_fc": ffn}
        out, down, norms = "attn.c_proj", "mlp.c_proj", ("ln_1", "ln_2", "ln_f")
    else:
        qkv = {f"self_attn.{x}_proj": rows for x, rows in zip("qkv", (q, kv, kv), strict=True)}
        up = {f"mlp.{x}_proj": ffn for x in ("gate", "up")}
        out, down, norms = "self_attn.o_proj", "mlp.down_proj", ("input_layernorm", "post_attention_layernorm", "norm")

    def norm(ours: str, theirs: str, size: int = hidden) -> dict[str, list[Part]]:
        ends = ("weight", "bias") if gpt2 else ("weight",)
        return {f"{ours}.{end}": [Part(f"{theirs}.{end}", (size,))] for end in ends}

    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{top}.{'h' if gpt2 else 'layers'}.{i}"
        linears = (
            ("attention.qkv", qkv, hidden, config.qkv_bias),
            ("attention.out", {out: hidden}, q, config.bias),
            ("mlp.up", up, hidden, config.bias),
            ("mlp.down", {down: hidden}, ffn, config.bias),
        )
        for name, rows, columns, bias in linears:
            parts[f"{ours}.{name}.weight"] = [Part(f"{theirs}.{n}.weight", (r, columns), gpt2) for n, r in rows.items()]
            if bias:
                parts[f"{ours}.{name}.bias"] = [Part(f"{theirs}.{n}.bias", (r,)) for n, r in rows.items()]
        parts |= norm(f"{ours}.attention_norm", f"{theirs}.{norms[0]}")
        parts |= norm(f"{ours}.mlp_norm", f"{theirs}.{norms[1]}")
        if config.qk_norm:
            for x in "qk":
                parts |= norm(f"{ours}.attention.{x}_norm", f"{theirs}.self_attn.{x}_norm", config.head_dim)
    parts |= norm("norm", f"{top}.{norms[2]}")
    if not config.tie_embeddings:
        parts["head.weight"] = [Part("lm_head.weight", vocabulary)]
    return parts
