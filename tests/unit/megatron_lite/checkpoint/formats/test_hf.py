"""Hugging Face's folders, against the library that owns them: in and out, the same weights, logits and tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_lite import convert
from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.checkpoint.opening import open_source
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import materialize, pieces_of
from megatron_lite.errors import CheckpointError
from megatron_lite.inference.requests import Sampling
from megatron_lite.inference.sampling import generate
from megatron_lite.models.decoder import Decoder
from tests.kit.optional import optional

transformers = optional("transformers", "hf")

VOCAB = 101
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.2}
SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama 3.1": ("Llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 5e5}}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "smollm (tied)": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "gpt2": ("GPT2", {}),
}


def model_of(family: str):
    """Their model with weights that leave nothing at one or zero."""
    kind, changes = FAMILIES[family]
    sizes = dict(SIZES)
    if kind == "GPT2":
        sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128}
        sizes |= {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Their model, and the folder that they saved it in, in several files."""
    model, folder = model_of(request.param), tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder, max_shard_size="20kB")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(f"{name} of {request.param}")
    assert (folder / "model.safetensors.index.json").exists()
    return model, folder


def assert_same(ours: Decoder, theirs) -> None:
    tokens = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(tokens).logits[:, -1]
        assert (ours(tokens) - want).abs().max() <= 1e-5 * want.abs().max()
        greedy = theirs.generate(tokens, max_new_tokens=50)[0, 24:].tolist()
    assert generate(ours, tokens[0].tolist(), Sampling(max_new_tokens=50), (), torch.float32) == greedy


def test_in_and_out_again(family, tmp_path):
    theirs, folder = family
    assert_same(convert.load_model(open_source(folder)), theirs)
    convert.import_hf(folder, tmp_path / "ours", files=2, vocab_multiple=16)
    source = open_source(tmp_path / "ours")
    assert source.model.padded_vocab_size == 112
    assert_same(convert.load_model(source), theirs)
    convert.export_hf(tmp_path / "ours", tmp_path / "back", "stored", 30_000, trust=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    want, got = theirs.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    HuggingFaceSource(tmp_path / "back", strict=True)
    convert.verify(folder)
    assert_same(convert.load_model(open_source(tmp_path / "back")), theirs)
    convert.diff(folder, tmp_path / "back", 0.0, trust=False)
    with torch.no_grad():
        next(iter(again.parameters()))[3, 3] += 1e-3
    again.save_pretrained(tmp_path / "changed")
    with pytest.raises(convert.CheckpointsDifferError, match="differ in 1 of"):
        convert.diff(tmp_path / "ours", tmp_path / "changed", 0.0, trust=False)


@pytest.mark.parametrize("size", [2, 4])
def test_straight_into_shards(family, size):
    """Every tensor-parallel rank reads its own parts, with fewer key-value heads than ranks, too."""
    source = open_source(family[1])
    whole = dict(convert.load_model(source).named_parameters())
    for rank in range(size):
        axis = Axis("tp", rank, size)
        with torch.device("meta"):
            model = Decoder(source.model, axis, sp=False)
        materialize(model, torch.device("cpu"))
        source.load({f"model.{n}": piece for n, piece in pieces_of(model, axis).items()})
        for name, piece in pieces_of(model, axis).items():
            assert all(torch.equal(tile.data, whole[name][tile.place]) for tile in piece.tiles), name


def test_narrower_export(family, tmp_path):
    theirs, folder = family
    convert.import_hf(folder, tmp_path / "ours", files=1, vocab_multiple=128)
    convert.export_hf(tmp_path / "ours", tmp_path / "narrow", "bfloat16", 1 << 30, trust=False)
    stored = load_file(tmp_path / "narrow" / "model.safetensors")
    want = {name: value for name, value in theirs.state_dict().items() if name in stored}
    assert len(want) == len(stored)
    assert all(torch.equal(stored[name], value.bfloat16()) for name, value in want.items())


def test_the_ends_of_a_text_are_known_to_an_export(tmp_path):
    """Also where only config.json says which tokens they are; transformers would take those of another model."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=3, eos_token_id=5)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").unlink()
    for source, ids in ((tmp_path / "theirs", (3, 5, None)), (tmp_path / "theirs", (None, None, None))):
        convert.import_hf(source, tmp_path / f"ours{ids[0]}", files=1, vocab_multiple=128)
        convert.export_hf(tmp_path / f"ours{ids[0]}", tmp_path / f"back{ids[0]}", "stored", 1 << 30, trust=False)
        written = transformers.AutoConfig.from_pretrained(tmp_path / f"back{ids[0]}")
        assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == ids
        tree = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if not k.endswith("_token_id")}))


CONFIG = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
CONFIG |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, r"model_type 'mamba' is not supported; supported: llama, mistral"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code to run, which is never done"),
        ({"hidden_act": "relu"}, r"hidden_act='relu' \(only 'silu' or 'swish'\)"),
        ({"attention_bias": True}, "attention_bias=True with mlp_bias=False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta with rope_type='linear'"),
        ({"no_rope_layers": [1]}, r"no_rope_layers=\[1\] is unknown, and may change numbers"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"]},
            "layer_types has 'sliding_attention', and there is no",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 33}, r"config\.json: model: num_heads=4 must divide hidden_size=33"),
        ({"hidden_size": 2**60}, r"config\.json: model\.hidden_size: input should be less than"),
        ({"hidden_size": None}, r"embed_tokens\.weight has shape"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, changes, said):
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in {**CONFIG, **changes}.items() if v is not None}))
    with pytest.raises(CheckpointError, match=said):
        HuggingFaceSource(tmp_path)


def test_a_sliding_window_bounds_the_length(tmp_path):
    config = {k: v for k, v in CONFIG.items() if k != "model_type"}
    transformers.MistralForCausalLM(
        transformers.MistralConfig(**config, num_key_value_heads=4, sliding_window=16)
    ).save_pretrained(tmp_path)
    source = HuggingFaceSource(tmp_path)
    assert source.model.max_seq_len == 16
    assert "sliding_window=16" in source.notes[0]
