"""From instructions to answers: conversations, a fine-tuned model, and what it says when it is asked."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.kit.corpora import data_tools, write_json_tokenizer
from tests.kit.jobs import PYTHON, REPOSITORY, run_job
from tests.kit.tiny import losses

NAMES = {"red": "apple", "yellow": "lemon", "green": "lime", "blue": "plum"}


def write_conversations(path: Path, count: int) -> None:
    """Questions about colours, each answered by a fruit."""
    rng = random.Random(0)
    noise = ["".join(rng.choices("abcdef", k=6)) for _ in range(count)]  # in every question: not to be learnt
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
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_model_learns_the_answers_and_gives_them(tmp_path):
    write_conversations(tmp_path / "x.jsonl", 200)
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


def readme_commands(mark: str) -> list[list[str]]:
    """The commands of README's block of them that has ``mark`` in it, as a shell would split them."""
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if mark in block)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.mark.timeout(400)
def test_what_the_readme_says_of_fine_tuning_works_word_for_word(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / "chats").mkdir()
    write_conversations(tmp_path / "chats" / "fruit.jsonl", 400)
    commands = readme_commands("configs/lora.yaml")
    (base,) = {word.partition("=")[2] for command in commands for word in command if word.startswith("--tokenizer=")}
    folder = write_json_tokenizer(tmp_path / base)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=400, max_position_embeddings=1024, initializer_range=0.3, tie_word_embeddings=True, **sizes
    )
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)

    said = []
    for program, *arguments in commands:
        assert program == "python"
        said.append(run_job([PYTHON, *arguments], timeout=150, cwd=tmp_path).expect(0).stdout)
    curve = losses(tmp_path / "runs" / "lora")
    assert curve[100] < curve[10] - 0.5
    (merged,) = (word for word in commands[-1] if (tmp_path / word).is_dir() and word != base)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / merged)
    asked = next(word.partition("=")[2] for word in commands[-1] if word.startswith("--prompt="))
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = model.generate(**tokens, max_new_tokens=16, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert said[-1].startswith(tokenizer.decode(found, skip_special_tokens=True)[:8])
