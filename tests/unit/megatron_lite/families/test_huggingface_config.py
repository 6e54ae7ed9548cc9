"""Every key of config.json against the class that owns it: honoured as it does, harmless, or refused by name."""

import dataclasses
import json

import pytest

from megatron_lite.checkpoint.formats.hf import HuggingFaceSource, read_model
from megatron_lite.errors import CheckpointError
from megatron_lite.families.huggingface import MODEL_TYPES, from_config_json
from tests.kit.foreign import assert_read_as_theirs, owner_of, random_folder, small_config
from tests.kit.optional import optional

optional("transformers", "hf")

ROPE = {"rope_theta": 500.0, "rope_type": "default"}
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# A value of its own for every key of the config classes, and what becomes of it.
HONOURED = {
    **{"vocab_size": 77, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 16},
    **{"num_key_value_heads": 1, "intermediate_size": 40, "max_position_embeddings": 128, "rms_norm_eps": 0.01},
    **{"initializer_range": 0.3, "tie_word_embeddings": True, "attention_dropout": 0.1, "rope_parameters": ROPE},
    **{"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 16, "n_inner": 40, "layer_norm_epsilon": 0.01},
    **{"attn_pdrop": 0.3},
}
REFUSED = {
    **{"hidden_act": "gelu", "activation_function": "relu", "is_encoder_decoder": True, "attention_bias": True},
    **{"mlp_bias": True, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "resid_pdrop": 0.3},
    **{"reorder_and_upcast_attn": True, "add_cross_attention": True, "embd_pdrop": 0.3},
    **{"layer_types": ["full_attention", "sliding_attention"]},
}
HARMLESS = {
    **{"architectures": ["ByAnotherName"], "transformers_version": "4.1.0", "dtype": "float32", "use_cache": False},
    **{"output_hidden_states": True, "return_dict": False, "chunk_size_feed_forward": 8, "pretraining_tp": 4},
    **{"id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": "regression", "pad_token_id": 3},
    **{"bos_token_id": 5, "eos_token_id": [6, 7], "max_window_layers": 1, "summary_type": "mean"},
    **{"summary_use_proj": False, "summary_activation": "tanh", "summary_proj_to_labels": False},
    **{"summary_first_dropout": 0.3},
}
OWN = {("mistral", "sliding_window"): (HONOURED, 9), ("gpt2", "tie_word_embeddings"): (HONOURED, False)}
OWN |= {(kind, "sliding_window"): (HARMLESS, 9) for kind in ("qwen2", "qwen3")}  # where use_sliding_window is false
OWN |= {(kind, "use_sliding_window"): (HARMLESS, True) for kind in ("qwen2", "qwen3")}  # with 28 full layers first


KEYS = [(kind, field.name) for kind in MODEL_TYPES for field in dataclasses.fields(owner_of(kind)[0])]


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_every_key_of_the_owners_class(tmp_path, kind, key):
    found = [group for group in (HONOURED, REFUSED, HARMLESS) if key in group]
    group, value = OWN.get((kind, key)) or (found[0], found[0][key])  # a new key is to be put into one of them
    tree = {**small_config(kind), key: value}
    if group is REFUSED:
        with pytest.raises(CheckpointError, match=key):
            from_config_json(tree, "config.json")
        return
    theirs = random_folder(tmp_path, tree)
    assert_read_as_theirs(tmp_path, theirs)
    changed = from_config_json(tree, "config.json")[0] != from_config_json(small_config(kind), "config.json")[0]
    assert changed == (group is HONOURED)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_what_is_missing_is_what_their_class_says(kind):
    theirs, (section, _) = owner_of(kind)[0](), from_config_json({"model_type": kind}, "config.json")
    for key, ours in MODEL_TYPES[kind].fields.items():
        want = getattr(theirs, key, None)
        if key == "max_position_embeddings" and kind == "mistral":
            want = theirs.sliding_window
        if ours in section or key not in ("num_key_value_heads", "head_dim", "n_inner"):
            assert section[ours] == want, key
    if kind != "gpt2":
        assert section["rope_theta"] == theirs.rope_parameters["rope_theta"]
        assert "rope_scaling" not in section


def test_what_a_window_cuts_is_said():
    section, notes = from_config_json({**small_config("mistral"), "sliding_window": 9}, "config.json")
    assert section["max_seq_len"] == 9
    assert notes == ["model.max_seq_len is cut to sliding_window=9: attention over all tokens is the same there"]


LINEAR = {"type": "linear", "factor": 2.0}
READ = {
    "old": ("llama", {"rope_theta": 500.0, "rope_scaling": LINEAR}),
    "new": ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    "both, agreeing": ("qwen2", {"rope_theta": 500.0, "rope_scaling": None, "rope_parameters": ROPE}),
    "both with a scaling": (
        "mistral",
        {"rope_theta": 500, "rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 500.0}},
    ),
    "theta inside of the old": (
        "llama",
        {"rope_scaling": {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 16}},
    ),
    "original length by default": (
        "llama",
        {"rope_scaling": LLAMA3, "rope_theta": 500.0, "max_position_embeddings": 32},
    ),
    "original length outside": (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 16},
    ),
    "both types": ("llama", {"rope_scaling": {**LINEAR, "rope_type": "linear"}}),
    "one type null": ("llama", {"rope_scaling": {"factor": 2.0, "rope_type": "linear", "type": None}}),
    "a factor of one": (
        "llama",
        {"rope_scaling": {"rope_type": "default", "factor": 1.0}, "partial_rotary_factor": 1.0},
    ),
    "no window": ("mistral", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "a window that its own switch does not close": ("mistral", {"sliding_window": 9, "use_sliding_window": False}),
    "a window in the last layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "a window in no layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "a window by layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "a bias that their code has anyway": ("qwen2", {"attention_bias": False}),
    "no kv heads": ("llama", {"num_key_value_heads": None, "head_dim": None}),
    "qwen2's kv heads are 32": ("qwen2", {"num_attention_heads": 32, "num_key_value_heads": ..., "head_dim": 2}),
    "qwen3's heads are 128 wide": ("qwen3", {"head_dim": ...}),
    "mistral's kv heads are 8": ("mistral", {"num_attention_heads": 16, "num_key_value_heads": ..., "head_dim": 2}),
    "the common names of gpt2's": ("gpt2", {"hidden_size": 64, "num_hidden_layers": 1, "n_embd": ..., "n_layer": ...}),
    "both names of gpt2's": ("gpt2", {"hidden_size": 32}),
    "another name for it": ("llama", {"hidden_act": "swish"}),
    "how to generate": ("llama", {"temperature": 0.6, "top_k": 20, "max_length": 9, "sequence_bias": [[1, 2.0]]}),
    "unknown": ("qwen2", {"use_mrope": False, "unsloth_fixed": True, "model_max_length": 9, "rope_interleaved": None}),
    "neutral": (
        "llama",
        {"logit_scale": 1.0, "embedding_multiplier": 1, "quantization_config": None, "num_experts": 0},
    ),
    "how to compute": ("llama", {"use_flash_attn": True, "_flash_attn_2_enabled": True, "attn_dropout": 0.5}),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_honoured_is_read_as_they_read_it(tmp_path, name):
    kind, changes = READ[name]
    tree = {key: value for key, value in {**small_config(kind), **changes}.items() if value is not ...}
    assert_read_as_theirs(tmp_path, random_folder(tmp_path, tree))


CONTRADICTIONS = [
    ("llama", {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 1000.0}}, "rope_theta=1000.0 and 500.0"),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": ROPE}, "rope_parameters and rope_scaling contradict"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "rope_type='default' and"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling.low_freq_factor is missing"),
    ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor=4.0 is not below high"),
    ("llama", {"rope_scaling": {**LLAMA3, ORIGINAL: 16}, ORIGINAL: 8}, f"{ORIGINAL} differs from the 8 outside of it"),
    ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor with rope_type='default'"),
    ("llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "rope_scaling.mrope_section"),
    ("llama", {"rope_parameters": {"full_attention": ROPE}}, "rope_parameters.full_attention with rope_type='default'"),
    ("llama", {"rope_scaling": [2.0]}, r"rope_scaling=\[2.0\]"),
    ("llama", {"rope_theta": None}, "rope_theta=None"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"is_causal": False}, r"is_causal=False \(only True\)"),
    ("llama", {"is_causal": None}, "is_causal=None"),
    ("qwen3", {"head_dim": None}, "head_dim=None"),
    ("llama", {"hidden_size": "32"}, "hidden_size='32'"),
    ("llama", {"attention_bias": "false", "mlp_bias": "false"}, "attention_bias='false'; mlp_bias='false'"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": "9", "max_window_layers": 0}, "sliding_window='9'"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: expected one for each of num_hidden_layers=2"),
    ("mistral", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has 'chunked_attention'"),
    ("gpt2", {"hidden_size": 64}, "hidden_size=64 beside n_embd=32"),
    ("gpt2", {"rotary_dim": 4}, "rotary_dim=4 is unknown, and may change numbers"),
]  # fmt: skip
# Each acts in some model, whoever reads it.
CONTRADICTIONS += [
    ("llama", {key: value}, f"{key}=.* is unknown, and may change numbers")
    for key, value in {
        **{"use_mrope": True, "logits_scaling": 8.0, "logit_scale": 0.0625, "final_logit_softcapping": 30.0},
        **{"embedding_multiplier": 12, "residual_multiplier": 0.22, "attention_multiplier": 0.0078, "scale_emb": 12},
        **{"no_rope_layers": [1], "clip_qkv": 8.0, "use_qk_norm": True, "alibi": True, "attn_logit_softcapping": 50.0},
        **{"quantization_config": {"bits": 4}, "num_local_experts": 8, "use_logn_attn": True, "parallel_attn": True},
        **{"per_layer_config": {"0": {"rms_norm_eps": 1.0}}, "attention_chunk_size": 8, "query_pre_attn_scalar": 256},
        **{
            "rope_local_base_freq": 1e4,
            "transformers_weights": "other.safetensors",
            "use_bidirectional_attention": True,
        },
    }.items()
]


@pytest.mark.parametrize(("kind", "changes", "said"), CONTRADICTIONS)
def test_what_is_not_is_refused_by_name(kind, changes, said):
    with pytest.raises(CheckpointError, match=said):
        from_config_json({**small_config(kind), **changes}, "config.json")


def test_unknown_keys_are_one_note_and_an_error_where_asked_to(tmp_path):
    changes = {"unsloth_version": "2025.8", "use_mrope": False, "max_sequence_length": 2048}
    random_folder(tmp_path, {**small_config("llama"), **changes})
    (note,) = read_model(tmp_path)[1]
    assert note.startswith(
        "config.json: ignored, as in transformers' LlamaForCausalLM: max_sequence_length, unsloth_version,"
    )
    with pytest.raises(CheckpointError, match="max_sequence_length is unknown; unsloth_version is unknown; use_mrope"):
        HuggingFaceSource(tmp_path, strict=True)
    generation = {"eos_token_id": 5, "do_sample": True, "temperature": 0.6, "of_tomorrow": {}, "top_p": None}
    (tmp_path / "config.json").write_text(json.dumps(small_config("llama")))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (note,) = HuggingFaceSource(tmp_path, strict=True).notes
    assert note.startswith("generation_config.json: do_sample=True, temperature=0.6, of_tomorrow={}: kept for exports;")
