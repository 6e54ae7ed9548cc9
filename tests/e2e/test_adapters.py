"""An adapter's life: trained on a base, resumed to the last bit, and refused by every other base."""

import re
from pathlib import Path

import pytest

from megatron_lite.checkpoint.reading import read_manifest
from tests.kit.corpora import ended
from tests.kit.jobs import PYTHON, Result, run_job, start_job
from tests.kit.tiny import losses, tiny_config, tiny_data

LORA = ["--peft.method=lora", "--peft.targets=[q,v,blocks.1.mlp.*]", "--peft.dropout=0.1"]


def train(folder: Path, name: str, *flags: str) -> Result:
    argv = [PYTHON, "-m", "megatron_lite", "train", f"{folder}/tiny.yaml", f"--run.name={name}", *flags]
    return run_job(argv, timeout=100)


@pytest.mark.timeout(300)
def test_trained_resumed_and_refused(tmp_path: Path) -> None:
    tiny_config(tmp_path, tiny_data(tmp_path))
    train(tmp_path, "base", "--train.steps=6").expect(0)
    on_base, start = [*LORA, f"--init.from={tmp_path}/base"], tmp_path / "run" / "checkpoints" / "step_00000006"

    train(tmp_path, "run", *on_base).expect(
        0,
        stdout=r"adapting \S+step_00000006 \([0-9a-f]{12}\)\n(.*\n)*lora on blocks\.0-1 attention\.q, blocks\.0-1 "
        r"attention\.v, blocks\.1 mlp\.gate, .*\n"
        r"trained: 5,120 of 40,096 parameters \(12\.8 %\), which saves 0\.4 MiB",
    )
    assert losses(tmp_path / "run")[12] < losses(tmp_path / "run")[1]
    tensors = read_manifest(start).tensors
    assert tensors and all("lora_" in name for name in tensors)
    assert all(0 not in tensor.shape for tensor in tensors.values())

    resumed = f"--checkpoint.resume={start}"
    train(tmp_path, "again", *on_base, resumed).expect(0, stdout=r"resumed \S+step_00000006: step 6")
    last = "checkpoints/step_00000012/shard_00000.safetensors"
    assert (tmp_path / "again" / last).read_bytes() == (tmp_path / "run" / last).read_bytes()

    other = f"--init.from={tmp_path}/base/checkpoints/step_00000003"
    train(tmp_path, "other", *LORA, other, resumed).expect(
        4,
        stderr=r"\Aerror: \S+step_00000006 was trained on a base of fingerprint [0-9a-f]{12}, but \S+0003 has ",
    )
    train(tmp_path, "other", *on_base, "--peft.r=4", resumed).expect(4, stderr=r"\Aerror: \S+: peft\.r 8 there, 4 here")
    train(tmp_path, "other", f"--init.from={tmp_path}/run").expect(
        4, stderr=r"\Aerror: \S+ lacks model\.\S+ \(it holds a lora adapter, not the model that this belongs to\)"
    )
    train(tmp_path, "other", *LORA).expect(2, stderr=r"\Aerror: peft: init\.from is missing")


@pytest.mark.timeout(300)
def test_on_a_base_in_4_bits_it_belongs_to_the_base_on_disk(tmp_path: Path) -> None:
    tiny_config(tmp_path, tiny_data(tmp_path), model__hidden_size=64, model__ffn_size=192)
    train(tmp_path, "base", "--train.steps=3").expect(0)
    on_base = [*LORA, f"--init.from={tmp_path}/base", "--train.precision=bfloat16"]
    plain = train(tmp_path, "plain", *on_base, "--train.steps=2").expect(0)
    packed = train(tmp_path, "run", *on_base, "--peft.base_dtype=nf4")
    # 2 · (4 · 64 · 64 + 3 · 64 · 192) numbers in 36 / 64 bytes each, 8,512 in 2.
    packed.expect(0, stdout=r"memory per rank, MiB: frozen 0\.1 \+ weights 0\.0 \+ ")
    prints = [re.search(r"adapting \S+ \(([0-9a-f]{12})\)", result.stdout)[1] for result in (plain, packed)]
    assert prints[0] == prints[1]
    assert losses(tmp_path / "run")[12] < losses(tmp_path / "run")[1]

    on_packed = [*on_base, "--peft.base_dtype=nf4"]
    start = tmp_path / "run" / "checkpoints" / "step_00000006"
    train(tmp_path, "again", *on_packed, f"--checkpoint.resume={start}").expect(0, stdout=r"resumed \S+ step 6")
    last = "checkpoints/step_00000012/shard_00000.safetensors"
    assert (tmp_path / "again" / last).read_bytes() == (tmp_path / "run" / last).read_bytes()

    merge = [PYTHON, "-m", "megatron_lite", "ckpt", "merge_adapter", f"{tmp_path}/run", f"{tmp_path}/merged"]
    run_job(merge, timeout=100).expect(0)
    merged, base = (read_manifest(next(path.glob("**/step_*"))) for path in (tmp_path / "merged", tmp_path / "base"))
    assert merged.tensors.keys() == {name for name in base.tensors if name.startswith("model.")}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_two_layouts_of_it_are_proved_equal(tmp_path: Path, engine: str) -> None:
    tiny_config(tmp_path, tiny_data(tmp_path))
    train(tmp_path, "base", "--train.steps=2").expect(0)
    sides = ["--a=tp=1", f"--b=tp=2,sp=true,dp=2,engine={engine},zero=3", "--steps=2"]
    argv = [PYTHON, "-m", "megatron_lite", "prove", f"{tmp_path}/tiny.yaml", *LORA[:2], *sides]
    with start_job([*argv, f"--init.from={tmp_path}/base"], timeout=150) as job:
        ended(job).expect(0, stdout=r"gradients .*lora_(.*\n)*equal within 1e-10 over 2 steps in float64")
