"""From instructions to answers: conversations, a fine-tuned model, and what it says when it is asked."""

import json
import random

import yaml

from tests.kit.corpora import data_tools, write_json_tokenizer
from tests.kit.jobs import PYTHON, run_job
from tests.kit.tiny import losses

NAMES = {"red": "apple", "yellow": "lemon", "green": "lime", "blue": "plum"}


def test_a_model_learns_the_answers_and_gives_them(tmp_path):
    rng = random.Random(0)
    noise = ["".join(rng.choices("abcdef", k=6)) for _ in range(200)]  # in every question: not to be learnt
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{extra} {colour}?"},
                {"role": "assistant", "content": f"a {fruit}"},
            ]
        }
        for extra in noise
        for colour, fruit in NAMES.items()
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = write_json_tokenizer(tmp_path / "hf")
    data_tools("chat", f"--input={tmp_path}/x.jsonl", f"--tokenizer={folder}", f"--out={tmp_path}/data").expect(0)
    tree = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 128},
        "data": {
            "tokenizer": str(folder),
            "train": [{"path": f"{tmp_path}/data"}],
            "seq_len": 128,
            "packing": "conversations",
        },
        "optim": {"lr": 1e-2, "warmup_steps": 5},
        "train": {"steps": 80, "global_batch_size": 8, "micro_batch_size": 4, "eval_every": 80, "eval_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    run = run_job([PYTHON, "-m", "launch", "run", f"{tmp_path}/run.yaml", "--nproc=2"], timeout=100)
    run.expect(
        0, stdout=r"conversations in \d+ windows of 128, \d\d\.\d% filled; 0 truncated, 0 tokens lost, 0 without"
    )
    assert losses(tmp_path / "run")[80] < 0.2  # far below what is in the questions: 1.8 nats a letter
    for colour, fruit in list(NAMES.items())[:2]:
        asked = ["generate", f"{tmp_path}/run", f"--prompt=fedcba {colour}?", "--chat=true"]
        answer = run_job([PYTHON, "-m", "megatron_lite", *asked], timeout=60).expect(0)
        assert answer.stdout == f"a {fruit}\n"
