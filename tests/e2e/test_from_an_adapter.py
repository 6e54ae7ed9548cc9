"""Training that starts from an adapter: the peft library's, with the loss that its own model has, or one of ours."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from megatron_lite.config import load_config
from megatron_lite.data.dataset import build_dataset
from megatron_lite.data.loader import Loader
from tests.kit.foreign import their_adapter
from tests.kit.jobs import PYTHON, Result, run_job
from tests.kit.optional import optional
from tests.kit.tiny import LAYOUTS, VOCAB, losses, tiny_config, tiny_data

peft = optional("peft")
transformers = optional("transformers", "hf")

WORDS = VOCAB + 5  # no multiple of anything
LORA = {"target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"], "r": 4, "lora_alpha": 6}
METHODS = {  # as the peft library says it, and as we do
    "lora": (
        {**LORA, "rank_pattern": {"v_proj": 2}},
        {"method": "lora", "targets": ["q", "v", "down", "embedding"], "r": 4, "alpha": 6, "ranks": {"v": 2}},
    ),
    "dora": (
        {"target_modules": ["q_proj", "up_proj", "o_proj"], "r": 3, "use_dora": True},
        {"method": "lora", "targets": ["q", "up", "o"], "r": 3, "alpha": 8, "dora": True},
    ),
    "prefix": ({"num_virtual_tokens": 5}, {"method": "prefix", "length": 5}),
}
CASES = [
    pytest.param(method, engine, marks=() if (method, engine) == ("lora", "tp") else pytest.mark.slow)
    for method in METHODS
    for engine in LAYOUTS
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small Llama of transformers'."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(
        vocab_size=WORDS, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **sizes
    )
    folder = tmp_path_factory.mktemp("from_an_adapter") / "base"
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config(folder: Path, base: Path, section: dict, engine: str) -> Path:
    data = tiny_data(folder)
    path = tiny_config(
        folder,
        data,
        train__steps=4,
        checkpoint__every=2,
        **{f"init__{k}": v for k, v in (("from", str(base)), ("adapter", str(folder / "theirs")))},
    )
    tree = yaml.safe_load(path.read_text())
    tree["model"] = {"vocab_multiple": 8}  # other padding than an import would choose
    tree["peft"], tree["parallel"] = section, LAYOUTS[engine]
    tree["data"]["train"] = [{"path": str(data)}]
    path.write_text(yaml.safe_dump(tree))
    return path


def launch(folder: Path, name: str, *flags: str) -> Result:
    argv = [PYTHON, "-m", "launch", "run", f"{folder}/tiny.yaml", "--nproc=2", f"--run.name={name}", *flags]
    return run_job(argv, timeout=150)


def first_batch(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of the first step."""
    loaded = load_config(str(path), {})
    dataset = build_dataset(loaded.data, loaded.run.seed, "train", WORDS)
    loader = Loader(
        dataset,
        micro_batch_size=8,
        num_micro_batches=1,
        dp_rank=0,
        dp_size=1,
        consumed_samples=0,
        prefetch=0,
        device=torch.device("cpu"),
    )
    batch = next(loader)[0]
    return batch.tokens, batch.targets


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("method", "engine"), CASES)
def test_it_begins_with_the_loss_of_their_model_and_resumes_exactly(tmp_path, base, method, engine):
    settings, section = METHODS[method]
    theirs = their_adapter(tmp_path / "theirs", base, settings)
    tokens, targets = first_batch(config(tmp_path, base, section, engine))
    with torch.no_grad():
        want, alone = (
            float(F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()))
            for model in (theirs, transformers.AutoModelForCausalLM.from_pretrained(base))
        )
    assert abs(want - alone) > 1e-3

    launch(tmp_path, "run").expect(0, stdout=rf"started from the adapter in {re.escape(str(tmp_path))}/theirs\n")
    found = losses(tmp_path / "run")
    assert found[1] == pytest.approx(want, rel=1e-5)
    assert found[4] != found[1]

    (tmp_path / "theirs").rename(tmp_path / "gone")  # a run that has begun needs it no more
    start = tmp_path / "run" / "checkpoints" / "step_00000002"
    again = launch(tmp_path, "again", f"--checkpoint.resume={start}")
    again.expect(0, stdout=r"resumed \S+step_00000002: step 2")
    assert "started from" not in again.stdout
    shards = [path.name for path in (tmp_path / "run" / "checkpoints" / "step_00000004").glob("*.safetensors")]
    assert shards
    for name in shards:
        ours, other = (tmp_path / run / "checkpoints" / "step_00000004" / name for run in ("run", "again"))
        assert ours.read_bytes() == other.read_bytes()


def alone(folder: Path, name: str, *flags: str) -> Result:
    """One rank."""
    argv = [PYTHON, "-m", "megatron_lite", "train", f"{folder}/tiny.yaml", f"--run.name={name}", *flags]
    return run_job(argv, timeout=100)


def validation_loss(run: Path) -> float:
    """The last one."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line][-1]


@pytest.mark.timeout(300)
def test_it_begins_where_another_of_ours_has_ended_or_says_why_not(tmp_path):
    tiny_config(tmp_path, tiny_data(tmp_path), train__steps=3, train__eval_every=3, train__eval_steps=1)
    alone(tmp_path, "base").expect(0)
    tuned = ["--peft.method=lora", f"--init.from={tmp_path}/base"]
    alone(tmp_path, "first", *tuned).expect(0)
    second = [*tuned, f"--init.adapter={tmp_path}/first", "--optim.lr=1e-30", "--train.steps=2"]
    alone(tmp_path, "second", *second).expect(0)
    assert validation_loss(tmp_path / "second") == validation_loss(tmp_path / "first")
    assert validation_loss(tmp_path / "first") < validation_loss(tmp_path / "base")

    alone(tmp_path, "no", *second, "--peft.r=4", "--peft.targets=[q,k]").expect(
        4,
        stderr=r"\Aerror: \S+/first/checkpoints/step_00000003: peft\.targets: blocks\.0-1 attention\.v, .* only there; "
        r"peft\.r of blocks\.0-1 attention\.q, blocks\.0-1 attention\.k 8 there, 4 here\n\Z",
    )
    another = [*second[:1], f"--init.from={tmp_path}/other", *second[2:]]
    alone(tmp_path, "other", "--run.seed=9").expect(0)
    alone(tmp_path, "no", *another).expect(4, stderr=r"\Aerror: \S+ was trained on a base of fingerprint \w{12}, but ")
    alone(tmp_path, "no", *tuned, f"--init.adapter={tmp_path}/base").expect(
        4, stderr=r"\Aerror: \S+ holds no adapter\n"
    )
    alone(tmp_path, "no", *second[1:]).expect(2, stderr=r"\Aerror: init\.adapter: needs a peft section")
    assert not list((tmp_path / "no" / "checkpoints").glob("step_*"))
