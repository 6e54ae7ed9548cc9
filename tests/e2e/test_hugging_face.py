"""From a Hugging Face folder to a tensor-parallel run, and its checkpoint back to a folder that transformers loads."""

from pathlib import Path

import pytest
import torch

from tests.kit.jobs import PYTHON, run_job
from tests.kit.optional import optional
from tests.kit.tiny import TinyRuns, losses, tiny_data

transformers = optional("transformers", "hf")
CKPT = [PYTHON, "-m", "megatron_lite", "ckpt"]


def test_start_from_a_folder_and_go_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, intermediate_size=96, max_position_embeddings=32, rms_norm_eps=1e-5)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")

    flags = ["--optim.lr=1e-2", "--train.steps=3", "--optim.warmup_steps=0"]
    legs = {}
    for name, parallel in {"tp": {"tp": 2, "sp": True}, "zero": {"engine": "deepspeed", "zero": 3}}.items():
        (tmp_path / name).mkdir()
        runs = TinyRuns(tiny_data(tmp_path), tmp_path / name, parallel)
        runs.run(tmp_path / name, *flags, f"--init.from={tmp_path}/theirs").expect(
            exit_code=0, stdout=r"started from the weights of \S+theirs"
        )
        legs[name] = losses(tmp_path / name / "run")
    assert legs["tp"] == pytest.approx(legs["zero"], rel=1e-5)

    run = tmp_path / "tp" / "run"
    exported = run_job([*CKPT, "export_hf", str(run), str(tmp_path / "back")], timeout=60)
    exported.expect(0, stdout=r"back: 1\d\d\.?\d? kB, read back; transformers' logits equal ours within \S+")
    again = run_job([*CKPT, "export_hf", str(run), str(tmp_path / "back")], timeout=60)
    again.expect(7, stderr=r"\Aerror: \S+back is there already\n\Z")
    run_job([*CKPT, "diff", str(run), str(tmp_path / "back")], timeout=60).expect(0, stdout="equal, bit for bit")
    run_job([*CKPT, "diff", str(tmp_path / "theirs"), str(tmp_path / "back")], timeout=60).expect(
        1, stdout=r"model\.embedding\.weight: [\d,]+ elements differ", stderr=r"\Aerror: \S+ and \S+ differ in \d+ of"
    )
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.config.num_hidden_layers == 2

    # What was trained goes on from a checkpoint of weights alone as from the run itself.
    run_job([*CKPT, "average", f"{run}", str(tmp_path / "mean"), "--last=1"], timeout=60).expect(2)
    run_job([*CKPT, "reshard", str(run), str(tmp_path / "again"), "--files=3"], timeout=60).expect(0)
    files = sorted(path.name for path in (tmp_path / "again" / "step_00000003").glob("*.safetensors"))
    assert files == [f"shard_{i:05d}.safetensors" for i in range(3)]
    run_job([*CKPT, "diff", str(run), str(tmp_path / "again")], timeout=60).expect(0, stdout="equal, bit for bit")


def test_the_model_section_comes_with_the_weights(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    data = tiny_data(tmp_path)
    (tmp_path / "c.yaml").write_text(
        f"init: {{from: {tmp_path}/gpt2}}\ndata: {{train: [{{path: {data}}}], seq_len: 16}}\n"
        f"run: {{dir: {tmp_path}}}\ntrain: {{steps: 2}}\n"
    )
    trained = run_job([PYTHON, "-m", "megatron_lite", "train", str(tmp_path / "c.yaml")], timeout=60)
    trained.expect(0, stdout=r"started from the weights of \S+gpt2")
    wrong = run_job(
        [PYTHON, "-m", "megatron_lite", "train", str(tmp_path / "c.yaml"), "--run.name=b", "--model.hidden_size=64"],
        timeout=60,
    )
    wrong.expect(4, stderr=r"\Aerror: \S+gpt2: model\.hidden_size 32 there, 64 here")
    assert not (tmp_path / "b" / "checkpoints" / "step_00000002").exists()
