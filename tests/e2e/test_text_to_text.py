"""The whole way as the README goes it: text, tokenizer, dataset, training on two ranks, resuming on others, text."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.kit.corpora import data_tools, documents, ended, write_jsonl
from tests.kit.jobs import PYTHON, Result, run_job, start_job
from tests.kit.tiny import checkpoint_steps, losses

TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
LITE = ["-m", "megatron_lite"]


def config(folder: Path) -> dict:
    return {
        "run": {"name": "run", "dir": str(folder)},
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64},
        "data": {"tokenizer": f"{folder}/tok.model", "train": [{"path": f"{folder}/data"}], "seq_len": 32},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "parallel": {"tp": 2, "sp": True},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 4, "log_every": 5, "eval_every": 10},
        "checkpoint": {"every": 10},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps, made by the commands alone."""
    folder = tmp_path_factory.mktemp("text")
    texts = write_jsonl(folder / "texts.jsonl", documents(2000))
    data_tools("tokenizer", f"--input={texts}", "--vocab_size=400", f"--out={folder}/tok").expect(0)
    data_tools("tokenize", f"--input={texts}", f"--tokenizer={folder}/tok.model", f"--out={folder}/data").expect(0)
    tree = config(folder)
    tree["train"] |= {"sample_every": 10, "sample_prompt": "import", "profile": {"start": 3, "steps": 1}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    launch(folder, nproc=2).expect(0, stdout=r"step 20  loss [\d.]+ .*tok/s  mfu")
    return folder


def launch(folder: Path, *flags: str, nproc: int) -> Result:
    argv = [PYTHON, "-m", "launch", "run", f"{folder}/run.yaml", f"--nproc={nproc}", *flags]
    return run_job(argv, timeout=100)


def test_what_a_run_leaves(folder: Path) -> None:
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 21))
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert {"grad_norm", "lr", "tokens_per_second", "mfu", "memory_gib"} <= training[0].keys()
    assert [line["step"] for line in lines if "validation_perplexity" in line] == [10, 20]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["vocab_size"] == 400
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 0
    assert json.loads((run / "trace.json").read_text())["traceEvents"]
    assert checkpoint_steps(run) == [10, 20]
    assert {path.name for path in (run / "logs").glob("rank_*.log")} == {"rank_0.log", "rank_1.log"}


def samples(run: Path, steps: int) -> dict[int, str]:
    """What TensorBoard shows of the text that was sampled, by step; the loss is there of all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb")).Reload()
    assert [point.step for point in events.Scalars("loss")] == list(range(1, steps + 1))
    shown = events.Tensors("sample/text_summary")
    return {point.step: point.tensor_proto.string_val[0].decode() for point in shown}


def test_what_tensorboard_shows(folder: Path) -> None:
    shown = samples(folder / "run", 20)
    assert list(shown) == [10, 20]
    assert "import" in shown[20]


def test_what_an_adapter_says_while_it_is_trained(folder: Path) -> None:
    prefix = ["--peft.method=prefix", "--peft.length=4", "--peft.reparameterize=8", "--optim.lr=0.5"]
    often = ["--train.steps=3", "--train.sample_every=1", "--train.profile=null"]
    launch(folder, "--run.name=prefix", f"--init.from={folder}/run", *prefix, *often, nproc=2).expect(0)
    shown = samples(folder / "prefix", 3)
    assert list(shown) == [1, 2, 3]
    assert all("import" in text and len(text) > 40 for text in shown.values())
    assert len(set(shown.values())) > 1


def test_the_same_text_on_one_rank_and_on_two(folder: Path) -> None:
    flags, lines = ["generate", str(folder / "run"), "--max_new_tokens=24"], 3 * ['{"prompt": "import os"}\n']
    (folder / "asked.jsonl").write_text("".join(lines))
    sampled = [f"--requests={folder}/asked.jsonl", "--temperature=0.9", "--top_k=50", "--top_p=0.95", "--seed=3"]
    for asked in (["--prompt=import os"], sampled):
        one = run_job([PYTHON, *LITE, *flags, *asked], timeout=60).expect(0)
        two = run_job([*TORCHRUN, *LITE, *flags, *asked], timeout=60).expect(0)
        assert two.stdout == one.stdout
        assert one.stdout.startswith("import os" if asked is not sampled else '{"index": 0, "line": 1, ')
    assert len({json.loads(line)["text"] for line in one.stdout.splitlines()}) == 3


@pytest.mark.parametrize(
    ("flags", "nproc"), [(["--parallel.tp=1"], 2), (["--parallel.tp=1", "--parallel.sp=false"], 1)]
)
def test_it_goes_on_under_another_layout(folder: Path, tmp_path: Path, flags: list[str], nproc: int) -> None:
    """From step 10 to 20 as dp 2 and as one process: the losses of tp 2 with sequence parallelism, up to rounding."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "checkpoints" / "step_00000020")
    (run / "checkpoints" / "latest").write_text("step_00000010\n")
    (run / "metrics.jsonl").unlink()
    resumed = launch(folder, f"--run.dir={tmp_path}", *flags, nproc=nproc)
    resumed.expect(0, stdout=r"resumed \S+step_00000010: step 10")
    got, want = losses(run), losses(folder / "run")
    assert sorted(got) == list(range(11, 21))
    assert all(abs(got[step] - want[step]) < 1e-4 * want[step] for step in got)


def test_a_checkpoint_can_be_looked_at(folder: Path) -> None:
    shown = run_job([PYTHON, *LITE, "ckpt", "inspect", str(folder / "run")], timeout=60).expect(0).stdout
    assert re.search(r"step\D+20\b", shown)
    assert "blocks.1.mlp.down.weight" in shown
    run_job([PYTHON, *LITE, "ckpt", "verify", str(folder / "run")], timeout=60).expect(0, stdout="step_00000020")


def test_two_layouts_are_proved_equal(folder: Path) -> None:
    sides = ["--a=tp=1", "--b=tp=2,sp=true,dp=2,accumulation=2"]
    argv = [PYTHON, *LITE, "prove", f"{folder}/run.yaml", *sides, "--steps=2"]
    with start_job(argv, timeout=60) as job:
        proved = ended(job).expect(0, stdout="equal within 1e-10 over 2 steps in float64")
    assert proved.stdout.count("clipped gradients") == 2
    with start_job([*argv[:-1], "--steps=1", "--tolerance=1e-30"], timeout=60) as job:
        ended(job).expect(
            1, stderr=r"^error: the layouts differ: first at step 1 in the \w[\w ]+ of \S+: relative difference"
        )
