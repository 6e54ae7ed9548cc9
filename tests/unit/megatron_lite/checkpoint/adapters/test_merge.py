"""An adapter merged into its base computes what both compute together; taken out again, it leaves the base."""

import json

import pytest
import torch

from megatron_lite import convert
from megatron_lite.checkpoint import open_source
from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.distributed.mesh import solo_mesh
from megatron_lite.errors import CheckpointError
from megatron_lite.inference.loading import open_models
from megatron_lite.layers.context import Context
from tests.kit.adapters import decoder, saved

METHODS = {
    "lora": {"method": "lora", "targets": ["*"], "ranks": {"q": 4, "blocks.1.*": 2}, "alphas": {"v": 3.0}},
    "rslora": {"method": "lora", "targets": ["blocks.*"], "rslora": True, "r": 3},
    "dora": {"method": "lora", "targets": ["blocks.*"], "dora": True, "r": 3},
}
TOKENS = torch.tensor([[5, 17, 40, 2, 33, 21, 60, 8]])


def logits(source):
    with torch.no_grad():
        return convert.load_model(source)(TOKENS)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_computes_what_both_compute(tmp_path, name, family, capsys):
    method = dict(METHODS[name])
    if family == "gpt2" and name == "lora":
        method["targets"] = ["blocks.*"]  # its ends are one tensor
    saved(tmp_path / "base", decoder(family), 1)
    beside = decoder(family, method=method)
    saved(tmp_path / "adapter", beside, 2, method)
    with torch.no_grad():
        want = beside(TOKENS, Context(torch.float64))
        alone = logits(open_source(tmp_path / "base"))

    convert.merge_adapter(tmp_path / "adapter", tmp_path / "ours", None, "ours", "stored", unmerge=False, trust=False)
    assert "its logits equal those of base and adapter within" in capsys.readouterr().out
    torch.testing.assert_close(logits(open_source(tmp_path / "ours")).double(), want, rtol=1e-4, atol=1e-4)
    assert (want - alone).abs().max() > 0.1
    convert.merge_adapter(tmp_path / "adapter", tmp_path / "hf", None, "hf", "float32", unmerge=False, trust=False)
    convert.diff(tmp_path / "ours", tmp_path / "hf", 0.0, trust=False)
    assert logits(HuggingFaceSource(tmp_path / "hf")).allclose(want.float(), rtol=1e-4, atol=1e-4)

    again = (tmp_path / "adapter", tmp_path / "again", tmp_path / "ours", "ours", "stored")
    if name == "dora":
        with pytest.raises(CheckpointError, match="a DoRA adapter cannot be unmerged"):
            convert.merge_adapter(*again, unmerge=True, trust=False)
        return
    convert.merge_adapter(*again, unmerge=True, trust=False)
    convert.diff(tmp_path / "base", tmp_path / "again", 1e-5, trust=False)


def test_the_ends_of_a_text_are_those_of_all_its_parts(tmp_path):
    method, written = METHODS["rslora"], "generation_config.json"
    files = [{written: json.dumps({"eos_token_id": ids}).encode()} for ids in (5, [7], [5, 9])]
    base = saved(tmp_path / "base", decoder("llama"), 1, files=files[0])
    saved(tmp_path / "lora", decoder("llama", method=method), 2, method, files[1])
    convert.merge_adapter(tmp_path / "lora", tmp_path / "hf", None, "hf", "float32", unmerge=False, trust=False)
    for name in (written, "config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == [7, 5]
    other = saved(tmp_path / "other", decoder("llama", seed=3), 1, files=files[2])
    third = saved(tmp_path / "third", decoder("llama", seed=4), 1, files=files[1])
    convert.average([other, base, third], tmp_path / "mean", 0, trust=False)
    extras = open_source(tmp_path / "mean").extras()
    assert json.loads(extras[written])["eos_token_id"] == [7, 5, 9]
    convert.reshard(tmp_path / "mean", tmp_path / "cut", 2, 256 << 20, trust=False)
    assert open_source(tmp_path / "cut").extras()[written] == extras[written]


def test_what_cannot_be_merged_is_told(tmp_path):
    saved(tmp_path / "base", decoder("llama"), 1)
    saved(tmp_path / "other", decoder("llama", seed=7), 1)
    lora, prefix = METHODS["rslora"], {"method": "prefix", "length": 3}
    saved(tmp_path / "lora", decoder("llama", method=lora), 2, lora)
    saved(tmp_path / "prefix", decoder("llama", method=prefix), 2, prefix)

    def merged(adapter, base, match):
        with pytest.raises(CheckpointError, match=match):
            convert.merge_adapter(
                tmp_path / adapter, tmp_path / "out", tmp_path / base, "ours", "stored", unmerge=False, trust=False
            )
        assert not (tmp_path / "out").exists()

    merged("prefix", "base", r"peft\.method=prefix changes no weights: nothing to merge")
    merged("base", "base", "holds no adapter")
    merged("lora", "other", "was trained on a base of fingerprint [0-9a-f]{12}, but .* has [0-9a-f]{12}")
    merged("lora", "none", "is an adapter of .*none, which does not exist")
    with pytest.raises(CheckpointError, match=r"holds a lora adapter, no model: ckpt merge_adapter --to=hf writes it"):
        convert.export_hf(tmp_path / "lora", tmp_path / "out", "stored", 1 << 30, trust=False)
    with pytest.raises(CheckpointError, match="no such folder"):
        convert.import_hf(tmp_path / "none", tmp_path / "out", 1, 8)
    with pytest.raises(CheckpointError, match=r"no Hugging Face folder: it has no config\.json"):
        convert.import_hf(tmp_path / "base", tmp_path / "out", 1, 8)


@pytest.mark.parametrize("to", ["ours", "hf"])
def test_an_adapter_is_computed_with_as_it_was_trained(tmp_path, to, capsys):
    """Its training may have had other keys of the model than its base."""
    method = METHODS["rslora"]
    saved(tmp_path / "base", decoder("llama"), 1)
    beside = decoder("llama", method=method)
    keys = {"rope_theta": 3.0, "norm_eps": 0.5, "max_seq_len": 64}
    other = decoder("llama", method=method, **keys)
    saved(tmp_path / "adapter", other, 2, method)
    beside.load_state_dict(other.state_dict())
    with torch.no_grad():
        want, as_base = (model(TOKENS, Context(torch.float64)) for model in (other, beside))
    assert (want - as_base).abs().max() > 0.1
    convert.merge_adapter(tmp_path / "adapter", tmp_path / "out", None, to, "float32", unmerge=False, trust=False)
    out = capsys.readouterr().out
    assert "note: model.rope_theta is 3.0, as " in out and "; its base has 10000.0\n" in out
    torch.testing.assert_close(logits(open_source(tmp_path / "out")).double(), want, rtol=1e-4, atol=1e-4)
    with open_models(tmp_path / "adapter", solo_mesh(), torch.float64, {}, None) as (models, _, name), torch.no_grad():
        torch.testing.assert_close(models[name](TOKENS, Context(torch.float64)), want)
        assert models[name].config.max_seq_len == open_source(tmp_path / "out").model.max_seq_len == 64
    with pytest.raises(
        CheckpointError, match=r"was trained with model\.norm_eps=0\.5 \(its base: 1e-05\), model\.rope"
    ):
        convert.export_peft(tmp_path / "adapter", tmp_path / "peft", None, trust=False)
    assert not (tmp_path / "peft").exists()


def test_the_last_checkpoints_are_those_up_to_the_latest(tmp_path):
    for step in (1, 2, 3, 4):
        saved(tmp_path / "checkpoints", decoder("llama", seed=step), 1, step=step)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000002\n")
    convert.average([tmp_path], tmp_path / "mean", 2, trust=False)
    convert.average([tmp_path / "checkpoints" / f"step_0000000{i}" for i in (1, 2)], tmp_path / "same", 0, trust=False)
    convert.diff(tmp_path / "mean", tmp_path / "same", 0.0, trust=False)
    with pytest.raises(CheckpointError, match="holds 2 checkpoints up to step_00000002, not 3"):
        convert.average([tmp_path], tmp_path / "more", 3, trust=False)
