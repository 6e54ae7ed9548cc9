"""Checkpoints that DeepSpeed and Megatron wrote themselves, read without running anything of theirs."""

import pytest
import torch

from megatron_lite import convert
from megatron_lite.checkpoint.formats.deepspeed import DeepSpeedSource
from megatron_lite.checkpoint.formats.hf import read_model
from megatron_lite.checkpoint.formats.megatron import open_megatron
from megatron_lite.checkpoint.opening import open_source
from megatron_lite.distributed.shard import Piece
from megatron_lite.errors import CheckpointError
from megatron_lite.families.huggingface import tensor_parts
from tests.kit.foreign import save_with_megatron, train_with_deepspeed
from tests.kit.world import run_ranks


@pytest.mark.parametrize(("stage", "bf16", "ranks"), [(1, False, 2), (2, False, 3), (3, False, 2), (3, True, 3)])
def test_what_deepspeed_wrote(worlds, tmp_path, stage, bf16, ranks):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install '.[deepspeed]')")
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    worlds(ranks).run(train_with_deepspeed, str(tmp_path), stage, bf16)
    want = torch.load(tmp_path / "want.pt")
    model, _ = read_model(tmp_path / "model")
    source = DeepSpeedSource(tmp_path / "ds", model)
    assert source.step == 2
    compared = 0
    for name, parts in tensor_parts(model).items():
        for kind in ("", ".exp_avg", ".exp_avg_sq"):
            whole = torch.cat([want[part.name + kind] for part in parts])
            ours = f"optimizer.{name}{kind}" if kind else f"model.{name}"
            got = torch.empty(source.tensors[ours].shape)
            source.load({ours: Piece.whole(got)})
            if not kind:
                assert torch.equal(got[: len(whole)], whole), ours
            else:
                assert (got[: len(whole)] - whole).abs().max() <= (0.3 if bf16 else 1e-4) * whole.abs().max(), ours
            assert not got[len(whole) :].any()
            compared += 1
    assert compared == len(source.tensors)
    convert.import_deepspeed(tmp_path / "ds", tmp_path / "ours", tmp_path / "model", files=2)
    assert open_source(tmp_path / "ours").step == 2
    convert.diff(tmp_path / "ds", tmp_path / "ours", 0.0, trust=False)
    with pytest.raises(convert.CheckpointsDifferError, match=f"differ in {compared // 3} of"):
        convert.diff(tmp_path / "model", tmp_path / "ds", 0.0, trust=False)
    with pytest.raises(CheckpointError, match="does not describe its model; use ckpt import_deepspeed"):
        convert.inspect(tmp_path / "ds")


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (2, True), (3, False)])
def test_frozen_parameters_that_deepspeed_wrote(worlds, tmp_path, stage, bf16):
    """Each stage keeps them in another place; with a tied head beside them."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install '.[deepspeed]')")
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    frozen = ("embed_tokens", "layers.0.self_attn", "layers.1.mlp.up_proj", "layers.0.input_layernorm")
    worlds(2).run(train_with_deepspeed, str(tmp_path), stage, bf16, frozen, True)
    want = torch.load(tmp_path / "want.pt")
    model, _ = read_model(tmp_path / "model")
    source = DeepSpeedSource(tmp_path / "ds", model)
    assert source.notes == ["without the optimizer: 7 of its parameters were frozen"]
    assert {name.partition(".")[0] for name in source.tensors} == {"model"}
    for name, parts in tensor_parts(model).items():
        whole = torch.cat([want[part.name].float() for part in parts])
        got = torch.empty(source.tensors[f"model.{name}"].shape)
        source.load({f"model.{name}": Piece.whole(got)})
        assert torch.equal(got[: len(whole)], whole), name
    with pytest.raises(CheckpointError, match=r"the model has no use for model.layers.1"):
        DeepSpeedSource(tmp_path / "ds", model.model_copy(update={"num_layers": 1}))
    files = sorted((tmp_path / "ds" / "global_step2").glob("*zero_pp_rank_1_*optim_states.pt"))
    files[0].unlink()
    with pytest.raises(CheckpointError, match=r"1 \*_optim_states.pt for .*2.* ranks"):
        DeepSpeedSource(tmp_path / "ds", model)


@pytest.fixture(scope="module", params=[("llama", 2), ("gpt2", 2)], ids=lambda p: f"{p[0]}, tp {p[1]}")
def megatron(request, tmp_path_factory):
    """A folder with a model as Megatron saves it in both ways, and its logits."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install '.[dev]')")
    folder = tmp_path_factory.mktemp("megatron")
    run_ranks(save_with_megatron, request.param[1], str(folder), request.param[0], timeout=280)
    return folder


@pytest.mark.parametrize("kind", ["dist", "legacy"])
def test_what_megatron_wrote(megatron, tmp_path, kind):
    """Its model and ours compute the same from it."""
    convert.import_megatron(megatron / kind, tmp_path / "ours", files=1, vocab_size=99)
    convert.diff(tmp_path / "ours", megatron / kind, 0.0, trust=False)
    source = open_source(tmp_path / "ours")
    assert (source.step, source.model.vocab_size, source.model.padded_vocab_size) == (7, 99, 112)
    tokens = torch.arange(24).unsqueeze(0) * 5 % 99
    with torch.no_grad():
        logits = convert.load_model(source)(tokens)
    want = torch.load(megatron / "logits.pt")[:, :99]
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_mismatch_is_said(megatron, tmp_path):
    with pytest.raises(CheckpointError, match="vocab_size=500 exceeds the padded size 112"):
        open_megatron(megatron / "dist", 500)
    with pytest.raises(CheckpointError, match="neither a torch_dist checkpoint"):
        open_megatron(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match="is not an iteration"):
        open_megatron(tmp_path)
