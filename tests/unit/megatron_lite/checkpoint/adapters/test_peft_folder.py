"""Adapters exchanged with the peft library, which is the reference: the same logits, whoever trained them."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lite import convert
from megatron_lite.checkpoint import open_source
from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.checkpoint.opening import open_peft
from megatron_lite.distributed.mesh import build_mesh, solo_mesh
from megatron_lite.errors import CheckpointError
from megatron_lite.inference.loading import Models
from tests.kit.adapters import LENGTH, VOCAB, decoder, saved
from tests.kit.foreign import their_adapter
from tests.kit.optional import optional
from tests.kit.world import run_ranks

peft = optional("peft")
transformers = optional("transformers", "hf")

TOKENS = torch.tensor([[5, 17, 40, 2, 33, 21, 60, 8]])
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}
BASES = {
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "tied, one kv head": ("llama", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
}
LORA = {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"], "r": 4, "lora_alpha": 6}
CONV = {"target_modules": ["c_attn", "attn.c_proj", "c_fc"], "r": 4, "fan_in_fan_out": True}
PREFIX = {"num_virtual_tokens": 5}
THEIRS = {
    "lora": ("llama", {**LORA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    "rslora, ends": (
        "llama",
        {"target_modules": ["o_proj", "k_proj", "lm_head", "embed_tokens"], "r": 4, "use_rslora": True},
    ),
    "dora": ("tied, one kv head", {"target_modules": ["q_proj", "up_proj", "o_proj"], "r": 3, "use_dora": True}),
    "prefix": ("llama", PREFIX),
    "prefix of one head": ("tied, one kv head", PREFIX),
    "prefix by an mlp": ("llama", {**PREFIX, "prefix_projection": True, "encoder_hidden_size": 7}),
    "lora on gpt2": ("gpt2", {**CONV, "lora_alpha": 6, "alpha_pattern": {"c_attn": 10}, "rank_pattern": {"c_fc": 3}}),
    "rslora on gpt2": ("gpt2", {**CONV, "use_rslora": True}),
    "dora on gpt2": ("gpt2", {**CONV, "use_dora": True}),
    "prefix on gpt2": ("gpt2", PREFIX),
}
OURS = {
    "lora": ("llama", {"method": "lora", "targets": ["*"], "ranks": {"q": 4, "blocks.1.*": 2}, "alphas": {"v": 3.0}}),
    "rslora": ("llama", {"method": "lora", "targets": ["blocks.*.attention.*"], "rslora": True, "r": 3}),
    "dora": ("llama", {"method": "lora", "targets": ["blocks.*"], "dora": True, "r": 3}),
    "prefix": ("llama", {"method": "prefix", "length": 5}),
    "prefix by an mlp": ("gpt2", {"method": "prefix", "length": 5, "reparameterize": 7}),
    "lora on gpt2": ("gpt2", {"method": "lora", "targets": ["blocks.*"], "ranks": {"q": 4}, "alphas": {"v": 3.0}}),
    "rslora on gpt2": ("gpt2", {"method": "lora", "targets": ["k", "v", "up"], "rslora": True, "ranks": {"k": 2}}),
    "dora on gpt2": ("gpt2", {"method": "lora", "targets": ["q", "v", "o"], "dora": True, "r": 3}),
}


def their_base(folder, family="llama"):
    kind, sizes = BASES[family]
    config = transformers.AutoConfig.for_model(kind, **sizes, initializer_range=0.2)
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def last(model):
    with torch.no_grad():
        return model(TOKENS).logits[:, -1]


def ours(base, adapter, mesh=None):
    """The logits of our model with an adapter of ours beside it."""
    models = Models(open_source(base), mesh or solo_mesh(), torch.float32, {"a": open_source(adapter)})
    with torch.no_grad():
        return models["a"](TOKENS)


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """For each of THEIRS: the base, the adapter as a checkpoint of ours, and the logits there."""
    found = {}
    for name, (family, settings) in THEIRS.items():
        folder = tmp_path_factory.mktemp("theirs")
        base = their_base(folder / "base", family)
        want = last(their_adapter(folder / "theirs", base, settings))
        assert (want - last(transformers.AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
        convert.import_peft(folder / "theirs", folder / "ours", base, trust=False)
        found[name] = base, folder / "ours", want
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_theirs_is_read(imported, name):
    base, adapter, want = imported[name]
    assert_same(ours(base, adapter), want)


def on_two_ranks(rank, size, found):
    mesh = build_mesh({"tp": 2}, torch.device("cpu"))
    return [ours(base, adapter, mesh) for base, adapter, _ in found]


@pytest.mark.filterwarnings("ignore")
def test_theirs_is_read_by_two_ranks(imported):
    for rank in run_ranks(on_two_ranks, 2, list(imported.values())):
        for got, (_, _, want) in zip(rank, imported.values(), strict=True):
            assert_same(got, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OURS)
def test_they_read_ours(tmp_path, name):
    family, method = OURS[name]
    saved(tmp_path / "base", decoder(family), 1)
    convert.export_hf(tmp_path / "base", tmp_path / "base_hf", "float32", 1 << 30, trust=False)
    ends = {"generation_config.json": b'{"eos_token_id": [5, 7]}'}
    saved(tmp_path / "ours", decoder(family, method=method), 2, method, ends)
    convert.export_peft(tmp_path / "ours", tmp_path / "theirs", None, trust=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base_hf", dtype=torch.float32)
    alone = last(model)
    theirs = last(peft.PeftModel.from_pretrained(model, tmp_path / "theirs").eval())
    assert_same(ours(tmp_path / "base", tmp_path / "ours"), theirs)
    assert (theirs - alone).abs().max() > 0.1
    convert.import_peft(tmp_path / "theirs", tmp_path / "again", tmp_path / "base", trust=False)
    assert_same(ours(tmp_path / "base", tmp_path / "again"), theirs)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "theirs").eos_token_id == [5, 7]
    assert open_source(tmp_path / "again").extras().items() >= ends.items()


@pytest.mark.filterwarnings("ignore")
def test_what_is_hostile_or_not_done_is_refused_by_name(tmp_path):
    base = their_base(tmp_path / "base")
    folder = tmp_path / "theirs"
    their_adapter(folder, base, THEIRS["lora"][1])
    weights, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )

    def refused(match, tensors=weights, **changes):
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=match):
            open_peft(folder, HuggingFaceSource(base))

    one = next(name for name in weights if "lora_A" in name)
    refused("peft_type='IA3': only LORA, PREFIX_TUNING are read", peft_type="IA3")
    refused(r"modules_to_save=\['lm_head'\]: not supported", modules_to_save=["lm_head"])
    refused("bias='all': not supported", bias="all")
    refused(r"peft\.alpha: .*greater than 0", lora_alpha=-1)
    refused(r"alpha_pattern: '\(a\+\)\+': only module names are supported", alpha_pattern={"(a+)+": 3})
    refused("should be", {**weights, one: torch.zeros(4, 31)})
    refused(r"should be .*, is None", {n: t for n, t in weights.items() if n != one.replace("lora_A", "lora_B")})
    refused("there is no use for .what.ever.", {**weights, "what.ever": torch.zeros(1)})
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        open_peft(folder, HuggingFaceSource(base))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, which may run code"):
        open_peft(folder, HuggingFaceSource(base))


TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def adapter(tmp_path):
    """A small adapter of theirs with its base."""
    base = their_base(tmp_path / "base")
    their_adapter(tmp_path / "theirs", base, {"target_modules": TARGETS, "r": 4, "lora_alpha": 6})
    return tmp_path


def changed(folder, tensors=None, **keys):
    """Change an adapter's config and tensors."""
    path = folder / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    if tensors is not None:
        path = folder / "theirs" / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path)


def read(folder):
    """What we compute from it; the command compares that with the peft library's own reading."""
    shutil.rmtree(folder / "ours", ignore_errors=True)
    convert.import_peft(folder / "theirs", folder / "ours", folder / "base", trust=False)
    return ours(folder / "base", folder / "ours")


def theirs_reading(folder):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    return last(peft.PeftModel.from_pretrained(base, folder / "theirs").eval())


OWN = {  # a value of its own for each field that has none by its type
    "target_modules": ["q_proj"],
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 3},
    "layers_to_transform": [0],
    "exclude_modules": ["v_proj"],
    "bias": "all",
    "init_lora_weights": "pissa",
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2]],
    "target_parameters": ["q_proj.weight"],
}
REFUSED = {
    *("bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "lora_bias"),
    *("init_lora_weights", "use_qalora", "megatron_config", "use_dora", "r", "target_modules", "exclude_modules"),
    *("layers_to_transform", "rank_pattern", "alora_invocation_tokens", "arrow_config", "use_bdlora", "peft_type"),
}


@pytest.mark.filterwarnings("ignore")
def test_every_setting_of_theirs_is_honoured_harmless_or_refused(adapter):
    """What is read with a setting changed is what the peft library computes then; else it is refused by name."""
    path = adapter / "theirs" / "adapter_config.json"
    plain, before, base = path.read_text(), read(adapter), open_source(adapter / "base")
    unchanged = open_peft(adapter / "theirs", base).peft
    found: dict[str, set] = {"honoured": set(), "harmless": set(), "refused": set()}
    for field in dataclasses.fields(peft.LoraConfig):
        own = {int: 7, float: 0.3, bool: field.default is False}.get(type(field.default), {"a": 1})
        changed(adapter, **{field.name: OWN.get(field.name, own)})
        try:
            section = open_peft(adapter / "theirs", base).peft
            found["harmless" if section == unchanged else "honoured"].add(field.name)
        except CheckpointError as error:
            assert {"use_dora": "magnitude"}.get(field.name, field.name) in str(error)
            found["refused"].add(field.name)
        path.write_text(plain)
    assert found["refused"] >= REFUSED
    assert found["honoured"] == {"lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout"}
    for name in ("lora_alpha", "alpha_pattern", "use_rslora"):
        changed(adapter, **{name: OWN.get(name, 3)})
        assert not torch.allclose(read(adapter), before)
        assert_same(read(adapter), theirs_reading(adapter))
        path.write_text(plain)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_a_changed_base_is_refused(adapter, start):
    changed(adapter, init_lora_weights=start)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{start}' changed the base's weights"):
        read(adapter)
    assert not (adapter / "ours").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": r".*self_attn\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": r".*o_proj"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_modules_are_meant_as_they_mean_them(adapter, keys):
    changed(adapter, **keys)
    assert_same(read(adapter), theirs_reading(adapter))


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"layers_to_transform": 1},
    ],
    ids=str,
)
def test_a_tensor_that_they_would_not_use_is_refused(adapter, keys):
    changed(adapter, **keys)
    with pytest.raises(CheckpointError, match=r"leaves out model\.layers\.\d\.self_attn.*there is .*lora_A.weight"):
        read(adapter)


def test_a_pattern_that_takes_for_ever_is_given_up(adapter):
    changed(adapter, target_modules=r"(([a-z0-9._]+)+[a-z0-9._]+)+!")
    with pytest.raises(CheckpointError, match=r"target_modules: .* is not a pattern that can be matched"):
        read(adapter)


@pytest.mark.filterwarnings("ignore")
def test_embeddings_saved_along_are_those_of_the_base(adapter):
    weight = load_file(adapter / "base" / "model.safetensors")["model.embed_tokens.weight"]
    before = read(adapter)
    for name in ("base_model.model.model.embed_tokens.weight", "base_model.model.model.embed_tokens.base_layer.weight"):
        changed(adapter, lambda tensors, name=name: {**tensors, name: weight})
        assert torch.equal(read(adapter), before)
        changed(adapter, lambda tensors, name=name: {**tensors, name: weight + 0.001})
        with pytest.raises(CheckpointError, match=r"there is no use for .*embed_tokens"):
            read(adapter)
        changed(adapter, lambda tensors, name=name: {n: t for n, t in tensors.items() if n != name})


def test_what_is_no_adapter_of_this_model_is_named(adapter):
    changed(adapter, lambda tensors: {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()})
    with pytest.raises(CheckpointError, match=r"lora_\w\.default\.weight' does not belong to any module of this model"):
        read(adapter)


def test_a_note_of_others_beside_the_settings_is_harmless(adapter):
    changed(adapter, unsloth_fixed=True)
    assert open_peft(adapter / "theirs", open_source(adapter / "base")).peft.method == "lora"


def test_a_rank_other_than_the_config_says_is_refused(adapter):
    changed(adapter, r=3)
    with pytest.raises(CheckpointError, match="has rank 4, r and rank_pattern give 3"):
        read(adapter)


@pytest.mark.filterwarnings("ignore")
def test_what_was_compared_is_said(adapter, capsys):
    read(adapter)
    assert "the peft library's logits equal ours within" in capsys.readouterr().out
    convert.export_peft(adapter / "ours", adapter / "again", None, trust=False)
    assert "the peft library's logits equal ours within" in capsys.readouterr().out
    convert.import_hf(adapter / "base", adapter / "base_of_ours", 1, 128)
    shutil.rmtree(adapter / "ours")
    convert.import_peft(adapter / "theirs", adapter / "ours", adapter / "base_of_ours", trust=False)
    assert "not compared with the peft library's: the base is no Hugging Face folder" in capsys.readouterr().out
