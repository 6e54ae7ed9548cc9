"""Adapters exchanged with the peft library, which is the reference: the same logits, whoever trained them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lite import convert
from megatron_lite.checkpoint import open_source
from megatron_lite.checkpoint.hf import HuggingFaceSource
from megatron_lite.checkpoint.peft_folder import PeftSource
from megatron_lite.errors import CheckpointError
from tests.kit.adapters import LENGTH, VOCAB, decoder, saved

peft = pytest.importorskip("peft", reason="the peft library is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOKENS = torch.tensor([[5, 17, 40, 2, 33, 21, 60, 8]])
THEIRS = {
    "lora": {
        "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "rslora, ends": {"target_modules": ["o_proj", "k_proj", "lm_head", "embed_tokens"], "r": 4, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "up_proj", "o_proj"], "r": 3, "use_dora": True},
}
OURS = {
    "lora": {"method": "lora", "targets": ["*"], "ranks": {"q": 4, "blocks.1.*": 2}, "alphas": {"v": 3.0}},
    "rslora": {"method": "lora", "targets": ["blocks.*.attention.*"], "rslora": True, "r": 3},
    "dora": {"method": "lora", "targets": ["blocks.*"], "dora": True, "r": 3},
}


def their_base(folder):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=1, max_position_embeddings=LENGTH, tie_word_embeddings=False, **sizes
    )
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def their_adapter(folder, base, settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def last(model):
    with torch.no_grad():
        return model(TOKENS).logits[:, -1]


def merged(tmp_path, adapter):
    """The logits of our model with an adapter of ours, merged."""
    convert.merge_adapter(adapter, tmp_path / "merged", None, "ours", "stored", unmerge=False, trust=False)
    with torch.no_grad():
        return convert.load_model(open_source(tmp_path / "merged"))(TOKENS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_theirs_is_read(tmp_path, name):
    base = their_base(tmp_path / "base")
    want = last(their_adapter(tmp_path / "theirs", base, THEIRS[name]))
    convert.import_peft(tmp_path / "theirs", tmp_path / "ours", base, trust=False)
    torch.testing.assert_close(merged(tmp_path, tmp_path / "ours"), want, rtol=1e-4, atol=1e-5)
    assert (want - last(transformers.AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OURS)
def test_they_read_ours(tmp_path, name):
    saved(tmp_path / "base", decoder("llama"), 1)
    convert.export_hf(tmp_path / "base", tmp_path / "base_hf", "float32", 1 << 30, trust=False)
    saved(tmp_path / "ours", decoder("llama", method=OURS[name]), 2, OURS[name])
    convert.export_peft(tmp_path / "ours", tmp_path / "theirs", None, trust=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base_hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "theirs").eval()
    torch.testing.assert_close(last(theirs), merged(tmp_path, tmp_path / "ours"), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_what_is_hostile_or_not_done_is_refused_by_name(tmp_path):
    base = their_base(tmp_path / "base")
    folder = tmp_path / "theirs"
    their_adapter(folder, base, THEIRS["lora"])
    weights, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )

    def refused(match, tensors=weights, **changes):
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=match):
            PeftSource(folder, HuggingFaceSource(base))

    one = next(name for name in weights if "lora_A" in name)
    refused("peft_type='IA3': only LORA is read", peft_type="IA3")
    refused(r"modules_to_save=\['lm_head'\]: not done here", modules_to_save=["lm_head"])
    refused("bias='all': not done here", bias="all")
    refused(r"peft\.alpha: .*greater than 0", lora_alpha=-1)
    refused(r"alpha_pattern: '\(a\+\)\+': only names of modules are read", alpha_pattern={"(a+)+": 3})
    refused("should be", {**weights, one: torch.zeros(4, 31)})
    refused(r"should be .*, is None", {n: t for n, t in weights.items() if n != one.replace("lora_A", "lora_B")})
    refused("there is no use for what.ever", {**weights, "what.ever": torch.zeros(1)})
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        PeftSource(folder, HuggingFaceSource(base))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, which may run code"):
        PeftSource(folder, HuggingFaceSource(base))
