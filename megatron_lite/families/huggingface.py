"""Hugging Face's names for our models: config fields and tensors, both ways. No torch.

A field of a ``config.json`` is honoured, known to change nothing, or refused by name: none is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.config import ModelConfig
from megatron_lite.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """What a ``model_type`` of theirs is here.

    ``fields``: the keys that are honoured, by ours. ``defaults``: what their config class says where a folder says
    nothing; its type is the key's. ``fixed``: keys that have to have one of these values, as the model knows nothing
    else, the first where a folder says nothing. ``aliases``: second names that their class has for a key.
    ``harmless``: keys that this family's code never reads.
    """

    architecture: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # not the model's: they go with its tokenizer
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
_NULLABLE = ("num_key_value_heads", "sliding_window")  # null although their class has a default: as many as heads; none
_SIZES: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
_SIZES |= {"initializer_range": 0.02, "tie_word_embeddings": False, "attention_dropout": 0.0}
_QWEN = _SIZES | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN |= {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_LLAMA_FIXED = {"hidden_act": ("silu", "swish"), "is_encoder_decoder": (False,), "is_causal": (True,)}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {**_LLAMA, "attention_bias": "qkv_bias", "mlp_bias": "bias"},
        {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048, **_SIZES}
        | {"attention_bias": False, "mlp_bias": False},
        _LLAMA_FIXED,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _LLAMA,
        {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072, **_SIZES}
        | {"num_key_value_heads": 8, "sliding_window": 4096},
        _LLAMA_FIXED,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA, _QWEN, _LLAMA_FIXED, harmless=frozenset({"attention_bias"})),
    "qwen3": Family(
        "Qwen3ForCausalLM", _LLAMA, {**_QWEN, "head_dim": 128}, {**_LLAMA_FIXED, "attention_bias": (False,)}
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _GPT2,
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
        | {"tie_word_embeddings": True}
        | {"layer_norm_epsilon": 1e-5, "initializer_range": 0.02}
        | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
        {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,)}
        | dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"), (False,))
        | {"is_encoder_decoder": (False,), "is_causal": (True,)},
        aliases={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        | {"max_position_embeddings": "n_positions"},
    ),
}
# Of no consequence for what any of these models computes: what the folder is, classifiers, how to compute and return.
_HARMLESS = set(
    """architectures model_type torch_dtype dtype transformers_version name_or_path _name_or_path _model_name_or_path
    _commit_hash tokenizer_class transformers.js_config use_cache n_ctx is_decoder pretraining_tp tie_encoder_decoder
    tie_last_hidden_states chunk_size_feed_forward return_dict output_hidden_states output_attentions torchscript
    output_past tf_legacy_loss gradient_checkpointing attn_implementation _attn_implementation
    _attn_implementation_autoset id2label label2id num_labels _num_labels problem_type task_specific_params
    finetuning_task classifier_dropout summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout bos_token_id eos_token_id pad_token_id unk_token_id mask_token_id sep_token_id""".split()  # noqa: SIM905
)
# How to generate, which older folders say here and newer ones in generation_config.json.
_GENERATION = set(
    """max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams
    num_beam_groups diversity_penalty penalty_alpha temperature top_k top_p min_p top_h typical_p epsilon_cutoff
    eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids force_words_ids renormalize_logits constraints forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    sequence_bias token_healing guidance_scale num_return_sequences output_scores output_logits
    return_dict_in_generate prefix cache_implementation prefill_chunk_size watermarking_config
    decoder_start_token_id num_assistant_tokens num_assistant_tokens_schedule""".split()  # noqa: SIM905
)
# Of a window over tokens, and of rotary positions.
_WINDOW = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"}
# No code of theirs for these families reads any other key. One that is named as what changes numbers in some model is
# refused all the same, where its value does something: whoever trained these weights may have meant it.
_NUMBERS = re.compile(
    "rope|rotary|yarn|ntk|norm|bias|scal|multipl|softcap|clip|clamp|quant|compress|expert|moe|window|chunk|spars|sink"
    "|alibi|resid|logit|softmax|parallel_block|multi_query|mup|causal|bidirectional|prun|per_layer|layer_types|lora"
    "|position_emb|adapter|glu|gate|shar(e|ing)|attn|attention|activation|transformers_weights|dim_model_base|skip"
)
_NO_NUMBERS = re.compile("^_|fuse|flash|implementation|memory_efficient|drop|checkpoint|output_|label")
_SCALE = re.compile("multipl|scal|factor|ratio|pct|percent")


def model_section(tree: Mapping[str, Any], where: str, *, strict: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The ``model`` section that a ``config.json`` describes, and what the user should know about it.

    Raises CheckpointError naming every field that cannot be honoured; with ``strict``, every unknown one, too.
    """
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    if "auto_map" in tree:
        raise CheckpointError(f"{where}: auto_map names code to run, which is never done")
    family, notes = FAMILIES[kind], []
    values, refused = _values(tree, family)
    if refused:
        raise CheckpointError(f"{where}: cannot be honoured: {'; '.join(refused)}")
    section: dict[str, Any] = {"family": "gpt2" if kind == "gpt2" else "llama"}
    for key, ours in family.fields.items():
        if (value := values.get(key)) is not None:
            section[ours] = value
    if kind == "gpt2":
        if values["embd_pdrop"] != values["resid_pdrop"]:
            refused.append("embd_pdrop differs from resid_pdrop")
    else:
        if kind != "llama":
            section |= {"bias": False, "qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3"}
        elif values["attention_bias"] != values["mlp_bias"]:
            refused.append(f"attention_bias={values['attention_bias']} with mlp_bias={values['mlp_bias']}")
        section |= _rope(values, refused)
        window = _window(values, family, refused)
        if window is not None and window < section.get("max_seq_len", 0):
            section["max_seq_len"] = window
            notes.append(
                f"model.max_seq_len is cut to sliding_window={window}: attention over all tokens is the same there"
            )
    read = {*family.fields, *family.defaults, *family.fixed, *family.aliases, *family.harmless}
    read |= set() if kind == "gpt2" else _WINDOW | _ROPE
    unknown = {ascii(key)[1:-1]: tree[key] for key in sorted(tree.keys() - read - _HARMLESS - _GENERATION)}
    for key, value in unknown.items():
        if _changes_numbers(key, value):
            refused.append(f"{key}={value!a:.200} is unknown, and may change numbers")
        elif strict:
            refused.append(f"{key} is unknown")
    if refused:
        raise CheckpointError(f"{where}: cannot be honoured: {'; '.join(refused)}")
    if unknown:
        names = ", ".join(unknown)
        notes.append(f"read neither here nor by transformers' {family.architecture}: {names} of config.json")
    return section, notes


def _values(tree: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """Every key that a family has, from the folder or by default, and what is wrong with it."""
    values, wrong = {**family.defaults, **tree}, []
    for alias, name in family.aliases.items():
        if alias in tree:
            values[name] = tree[alias]
            if tree.get(name, tree[alias]) != tree[alias]:
                wrong.append(f"{alias}={tree[alias]!a:.100} beside {name}={tree[name]!a:.100}")
    for key, default in family.defaults.items():
        fits = isinstance(values[key], bool) if isinstance(default, bool) else _is_number(values[key])
        if not fits and not (values[key] is None and key in _NULLABLE):
            wrong.append(f"{key}={values[key]!a:.100}")
    for key, allowed in family.fixed.items():
        value = values.get(key, allowed[0])
        if value not in allowed or type(value) is not type(allowed[0]):
            wrong.append(f"{key}={value!a:.100} (only {' or '.join(map(repr, allowed))})")
    return values, wrong


def _changes_numbers(key: str, value: Any) -> bool:
    """Whether an unknown key may change what the model computes."""
    if not _NUMBERS.search(key.lower()) or _NO_NUMBERS.search(key.lower()):
        return False
    if _is_number(value) and _SCALE.search(key.lower()):
        return not _neutral(key, value)
    return value not in (None, False, 0, "", [], {})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _neutral(key: str, value: Any) -> bool:
    """Whether this is a factor of one."""
    return _is_number(value) and value == 1 and _SCALE.search(key.lower()) is not None


def _window(values: Mapping[str, Any], family: Family, refused: list[str]) -> int | None:
    """Over how many tokens layers attend, if not over all."""
    layers, window, count = values.get("layer_types"), values.get("sliding_window"), values["num_hidden_layers"]
    by_layer = "max_window_layers" in family.defaults  # others slide in all layers, whatever layer_types says
    if by_layer and not values["use_sliding_window"]:
        window = None
    if layers is None:
        slides = not by_layer or values["max_window_layers"] < count
    elif not isinstance(layers, list) or len(layers) != count:
        refused.append(f"layer_types: expected one for each of num_hidden_layers={count}")
        return None
    else:
        if odd := [kind for kind in layers if kind not in ("full_attention", "sliding_attention")]:
            refused.append(f"layer_types has {odd[0]!a:.100} (only 'full_attention' or 'sliding_attention')")
        if window is None and "sliding_attention" in layers:
            refused.append("layer_types has 'sliding_attention', and there is no sliding_window")
        slides = not by_layer or "sliding_attention" in layers
    if window is None or not slides:
        return None
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        refused.append(f"sliding_window={window!a:.100}")
        return None
    return window


_SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
    | {"original_max_position_embeddings": "original_max_seq_len"},
}


def _rope(values: Mapping[str, Any], refused: list[str]) -> dict[str, Any]:
    """Rotary frequencies, from either of the spellings that are in use, or from both where they agree."""
    said = {key: values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)}
    read = [_scaling(values, key, value, refused) for key, value in said.items()]
    if len(read) == 2 and read[0] != read[1]:
        refused.append("rope_parameters and rope_scaling contradict each other")
    thetas = [value["rope_theta"] for value in said.values() if isinstance(value, dict) and "rope_theta" in value]
    if values.get("rope_theta") is not None or ("rope_theta" in values and not thetas):
        thetas.append(values["rope_theta"])
    if any(theta is None or theta != thetas[0] for theta in thetas):
        refused.append(f"rope_theta={' and '.join(f'{theta!a:.100}' for theta in thetas)}")
    if values.get("partial_rotary_factor") not in (None, 1):
        refused.append(f"partial_rotary_factor={values['partial_rotary_factor']!a:.100}")
    section = {"rope_theta": thetas[0] if thetas else 10000.0}
    return section | ({"rope_scaling": read[0]} if read and read[0] else {})


def _scaling(values: Mapping[str, Any], where: str, tree: Any, refused: list[str]) -> dict[str, Any] | None:
    """The ``model.rope_scaling`` that one spelling means."""
    if not isinstance(tree, dict):
        refused.append(f"{where}={tree!a:.100}")
        return None
    kinds = [tree[key] for key in ("rope_type", "type") if tree.get(key) is not None] or ["default"]
    if kinds[0] != kinds[-1]:
        refused.append(f"{where}: rope_type={kinds[0]!a:.100} and type={kinds[-1]!a:.100}")
        return None
    if not isinstance(kinds[0], str) or kinds[0] not in _SCALINGS:
        refused.append(f"{where}: rope_type={kinds[0]!a:.100} (only {', '.join(map(repr, _SCALINGS))})")
        return None
    names = _SCALINGS[kinds[0]]
    given = {key: value for key, value in tree.items() if key not in ("rope_type", "type", "rope_theta")}
    if kinds[0] == "llama3":
        outside = values.get("original_max_position_embeddings")  # which transformers would take instead
        if outside is not None and outside != given.get("original_max_position_embeddings", outside):
            refused.append(f"{where}: original_max_position_embeddings differs from the {outside!a:.100} outside of it")
        given.setdefault("original_max_position_embeddings", outside or values["max_position_embeddings"])
    odd = [key for key in given.keys() - names.keys() if given[key] is not None and not _neutral(key, given[key])]
    refused += [f"{where}.{ascii(key)[1:-1]} with rope_type={kinds[0]!r}" for key in sorted(odd)]
    refused += [f"{where}.{key} is missing" for key in names if given.get(key) is None]
    low, high = (given.get(key, i) for i, key in enumerate(("low_freq_factor", "high_freq_factor")))
    if _is_number(low) and _is_number(high) and low >= high:
        refused.append(f"{where}: low_freq_factor={low} is not below high_freq_factor={high}")
    return {"type": kinds[0], **{ours: given.get(key) for key, ours in names.items()}} if names else None


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
    family = FAMILIES[kind]
    tree: dict[str, Any] = {"architectures": [family.architecture], "model_type": kind, "torch_dtype": dtype}
    tree |= {name: token_ids.get(name) for name in TOKEN_IDS}  # what is left out would be some other model's
    tree |= {theirs: section[ours] for theirs, ours in family.fields.items()}
    if kind == "gpt2":
        return tree | {"activation_function": "gelu_new", "embd_pdrop": config.dropout}
    if config.dropout:
        raise CheckpointError(f"model.dropout={config.dropout}: Hugging Face's {family.architecture} has none")
    tree |= {"hidden_act": "silu", "rope_theta": config.rope_theta, "rope_scaling": None}
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


# Mistral's own names, in the consolidated.safetensors beside a folder's other files.
_MISTRAL = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"feed_forward.w{i}": f"mlp.{x}_proj" for i, x in ((1, "gate"), (2, "down"), (3, "up"))},
}


def from_mistral(name: str) -> tuple[str, bool]:
    """The name of a tensor that Mistral's own files name so, or an empty string, and whether it rotates pairs of
    neighbours, not of halves."""
    layer, stem = re.fullmatch(r"((?:layers\.\d+\.)?)(.*?)(?:\.weight)?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if stem not in _MISTRAL:
        return "", False
    return f"{'model.' if layer else ''}{layer}{_MISTRAL[stem]}.weight", stem in ("attention.wq", "attention.wk")


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
