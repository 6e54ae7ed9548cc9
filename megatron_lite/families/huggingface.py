"""Hugging Face's names for our models: config fields and tensors, both ways. No torch.

A field of a ``config.json`` is honoured, known to change nothing, or refused by name: none is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lite.errors import CheckpointError
from megatron_lite.families import FAMILIES
from megatron_lite.families.family import ModelType, linears

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # these belong to the tokenizer
_NULLABLE = ("num_key_value_heads", "sliding_window")  # null has a meaning of its own: num_attention_heads; no window
# Every model type, and the family that computes it.
MODEL_TYPES = {kind: row for family in FAMILIES.values() for kind, row in family.model_types.items()}
_FAMILY = {kind: name for name, family in FAMILIES.items() for kind in family.model_types}
# Without effect on what these models compute: what the folder is, classifiers, how to compute, what to return.
_HARMLESS = set(
    """architectures model_type torch_dtype dtype transformers_version name_or_path _name_or_path _model_name_or_path
    _commit_hash tokenizer_class transformers.js_config use_cache n_ctx is_decoder pretraining_tp tie_encoder_decoder
    tie_last_hidden_states chunk_size_feed_forward return_dict output_hidden_states output_attentions torchscript
    output_past tf_legacy_loss gradient_checkpointing attn_implementation _attn_implementation
    _attn_implementation_autoset id2label label2id num_labels _num_labels problem_type task_specific_params
    finetuning_task classifier_dropout summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout bos_token_id eos_token_id pad_token_id unk_token_id mask_token_id sep_token_id""".split()  # noqa: SIM905
)
# Settings of generation, which older folders have here and newer ones in generation_config.json.
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
# Keys of sliding windows and of rotary positions.
_WINDOW = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"}
# Their code for these families reads no other key. A key is refused nevertheless if its name suggests that it changes
# the computation and its value is not neutral: whoever trained these weights may have relied on it.
_NUMBERS = re.compile(
    "rope|rotary|yarn|ntk|norm|bias|scal|multipl|softcap|clip|clamp|quant|compress|expert|moe|window|chunk|spars|sink"
    "|alibi|resid|logit|softmax|parallel_block|multi_query|mup|causal|bidirectional|prun|per_layer|layer_types|lora"
    "|position_emb|adapter|glu|gate|shar(e|ing)|attn|attention|activation|transformers_weights|dim_model_base|skip"
)
_NO_NUMBERS = re.compile("^_|fuse|flash|implementation|memory_efficient|drop|checkpoint|output_|label")
_SCALE = re.compile("multipl|scal|factor|ratio|pct|percent")


def from_config_json(tree: Mapping[str, Any], where: str, *, strict: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The ``model`` section that a ``config.json`` describes, and what the user should know about it.

    Raises CheckpointError naming every field that cannot be honoured; with ``strict``, every unknown one, too.
    """
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise CheckpointError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    if "auto_map" in tree:
        raise CheckpointError(f"{where}: auto_map names code to run, which is never done")
    row, rotary, notes = MODEL_TYPES[kind], FAMILIES[_FAMILY[kind]].rotary, []
    values, refused = _values(tree, row)
    if refused:
        raise CheckpointError(f"{where}: cannot be honoured: {'; '.join(refused)}")
    section: dict[str, Any] = {"family": _FAMILY[kind]}
    for key, ours in row.fields.items():
        if (value := values.get(key)) is not None:
            section[ours] = value
    section |= row.section
    refused += row.contradictions(values)
    if rotary:
        section |= _rope(values, refused)
        window = _window(values, row, refused)
        if window is not None and window < section.get("max_seq_len", 0):
            section["max_seq_len"] = window
            notes.append(
                f"model.max_seq_len is cut to sliding_window={window}: attention over all tokens is the same there"
            )
    read = {*row.fields, *row.defaults, *row.fixed, *row.aliases, *row.harmless}
    read |= _WINDOW | _ROPE if rotary else set()
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
        notes.append(f"config.json: ignored, as in transformers' {row.architecture}: {names}")
    return section, notes


def _values(tree: Mapping[str, Any], row: ModelType) -> tuple[dict[str, Any], list[str]]:
    """Every key of a model type, from the folder or by default, and what is wrong with their values."""
    values, wrong = {**row.defaults, **tree}, []
    for alias, name in row.aliases.items():
        if alias in tree:
            values[name] = tree[alias]
            if tree.get(name, tree[alias]) != tree[alias]:
                wrong.append(f"{alias}={tree[alias]!a:.100} beside {name}={tree[name]!a:.100}")
    for key, default in row.defaults.items():
        fits = isinstance(values[key], bool) if isinstance(default, bool) else _is_number(values[key])
        if not fits and not (values[key] is None and key in _NULLABLE):
            wrong.append(f"{key}={values[key]!a:.100}")
    for key, allowed in row.fixed.items():
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


def _window(values: Mapping[str, Any], row: ModelType, refused: list[str]) -> int | None:
    """The sliding window of the layers, in tokens; None for attention over all tokens."""
    layers, window, count = values.get("layer_types"), values.get("sliding_window"), values["num_hidden_layers"]
    by_layer = "max_window_layers" in row.defaults  # other models have windows in all layers, ignoring layer_types
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
    """The keys of rotary positions in our section, from either spelling in use, or from both if they agree."""
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
    """Our ``model.rope_scaling`` from one of the spellings; None for no scaling, or if it is refused."""
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
        outside = values.get("original_max_position_embeddings")  # transformers would prefer this one
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


def config_json(config: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a model, read by ``from_config_json``. Raises CheckpointError if no model type fits."""
    kind = config.traits.model_type(config)
    row, section = MODEL_TYPES[kind], config.model_dump()
    tree: dict[str, Any] = {"architectures": [row.architecture], "model_type": kind, "torch_dtype": dtype}
    tree |= {name: token_ids.get(name) for name in TOKEN_IDS}  # missing ids would get the defaults of their class
    tree |= {theirs: section[ours] for theirs, ours in row.fields.items()} | config.traits.written(config)
    return tree | _rope_json(config) if config.traits.rotary else tree


def _rope_json(config: ModelConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling.model_dump()
        names = _SCALINGS[config.rope_scaling.type]
        tree["rope_scaling"] = {"rope_type": scaling["type"], **{key: scaling[ours] for key, ours in names.items()}}
    return tree


@dataclass(frozen=True)
class Part:
    """Rows of one of our tensors that are one tensor of theirs. ``shape``: of these rows; ``transposed``: theirs is
    [in, out]."""

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
    """Hugging Face's name for a tensor with this name in Mistral's own files, or an empty string, and whether its
    rotary pairs are neighbouring dims instead of halves."""
    layer, stem = re.fullmatch(r"((?:layers\.\d+\.)?)(.*?)(?:\.weight)?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if stem not in _MISTRAL:
        return "", False
    return f"{'model.' if layer else ''}{layer}{_MISTRAL[stem]}.weight", stem in ("attention.wq", "attention.wk")


def tensor_parts(config: ModelConfig) -> dict[str, list[Part]]:
    """For each of our tensors its parts, in row order; the vocabulary without padding."""
    assert config.vocab_size
    traits, hidden, vocabulary = config.traits, config.hidden_size, (config.vocab_size, config.hidden_size)
    names = traits.names
    parts = {"embedding.weight": [Part(f"{names.top}.{names.embedding}.weight", vocabulary)]}
    if names.positions:
        parts["positions.weight"] = [Part(f"{names.top}.{names.positions}.weight", (config.max_seq_len, hidden))]

    def norm(ours: str, theirs: str, size: int) -> dict[str, list[Part]]:
        return {f"{ours}.{end}": [Part(f"{theirs}.{end}", (size,))] for end in traits.norm_parameters}

    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{names.top}.{names.layers}.{i}"
        for linear in linears(config):
            own = names.linears[linear.name]
            rows = list(linear.parts.values()) if len(own) > 1 else [linear.rows]
            held = list(zip(own, rows, strict=True))
            weights = [Part(f"{theirs}.{n}.weight", (r, linear.columns), names.transposed) for n, r in held]
            parts[f"{ours}.{linear.name}.weight"] = weights
            if linear.bias:
                parts[f"{ours}.{linear.name}.bias"] = [Part(f"{theirs}.{n}.bias", (r,)) for n, r in held]
        for place in ("attention_norm", "mlp_norm"):
            parts |= norm(f"{ours}.{place}", f"{theirs}.{names.norms[place]}", hidden)
        for place in ("attention.q_norm", "attention.k_norm") if config.qk_norm else ():
            parts |= norm(f"{ours}.{place}", f"{theirs}.{names.norms[place]}", config.head_dim)
    parts |= norm("norm", f"{names.top}.{names.norms['norm']}", hidden)
    if not config.tie_embeddings:
        parts["head.weight"] = [Part("lm_head.weight", vocabulary)]
    return parts
