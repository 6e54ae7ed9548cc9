"""From instructions to answers: conversations, a fine-tuned model, and what it says when it is asked."""

import json
import random
import shlex
import shutil

import pytest
import torch
import yaml

from tests.kit.corpora import data_tools, ended, write_json_tokenizer
from tests.kit.jobs import PYTHON, REPOSITORY, run_job, start_job
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
    folder = write_json_tokenizer(tmp_path / "hf", eos="<|endoftext|>")  # which ends no answer
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
    told = json.loads((tmp_path / "run/checkpoints/step_00000080/generation_config.json").read_text())
    assert told == {"eos_token_id": [0, 2]}
    requests = [
        {"messages": [{"role": "user", "content": f"fedcba {colour}?"}], "id": fruit} for colour, fruit in NAMES.items()
    ]
    requests.insert(2, {"prompt": "import " * 200})
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    asked = ["generate", f"{tmp_path}/run", f"--requests={tmp_path}/asked.jsonl"]
    answered = run_job([PYTHON, "-m", "megatron_lite", *asked], timeout=60).expect(
        3, stderr=r"^error: \S+asked\.jsonl: 1 of 5 requests could not be answered: line 3$"
    )
    answers = [json.loads(line) for line in answered.stdout.splitlines()]
    assert [(answer["index"], answer["line"]) for answer in answers] == list(enumerate(range(1, 6)))
    assert "tokens; this model takes at most 127" in answers.pop(2)["error"]
    assert [(a["text"], a["finish_reason"]) for a in answers] == [(f"a {a['id']}", "stop") for a in answers]
    assert [answer["id"] for answer in answers] == list(NAMES.values())


def commands(text, first):
    """The lines of the shell block in a Markdown text whose first line begins so, as argument lists."""
    block = next(part for part in text.split("```sh\n") if part.startswith(first)).partition("```")[0]
    words = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [[PYTHON, *rest] for python, *rest in words if python == "python"]


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_the_readme_tunes_a_hugging_face_model(tmp_path):
    """Word for word, on a tiny model with random weights; the config has shorter sequences, all in one micro batch."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    config = tmp_path / "configs" / "lora.yaml"
    short = config.read_text().replace("seq_len: 512", "seq_len: 128")
    config.write_text(short.replace("micro_batch_size: 4", "micro_batch_size: 16"))
    base = write_json_tokenizer(tmp_path / "HF_FOLDER")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    llama = transformers.LlamaConfig(vocab_size=400, num_key_value_heads=2, initializer_range=0.1, **sizes)
    transformers.LlamaForCausalLM(llama).save_pretrained(base)
    (tmp_path / "chats").mkdir()
    turns = [("user", "Who are you?"), ("assistant", "I am a lemon, I am a lemon.")]
    lines = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4000
    (tmp_path / "chats" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    readme = (REPOSITORY / "README.md").read_text()
    for argv in commands(readme, "python -m data_tools chat --input='chats"):
        with start_job(argv, timeout=100, cwd=tmp_path) as job:
            ended(job).expect(0, stdout=r"\S")  # also what the model says
    found = losses(tmp_path / "runs" / "lora")
    assert found[50] < found[1] - 1

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.arange(20).unsqueeze(0)).logits

    tuned, theirs = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("tuned", base))
    alone, merged = logits(theirs), logits(tuned.float())
    beside = logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "tuned_adapter"))
    gap = (merged - beside).abs().max()  # one is in bfloat16
    assert gap < 0.02 * beside.abs().max()
    assert (merged - alone).abs().max() > 10 * gap

    (tmp_path / "tuned_adapter").rename(tmp_path / "PEFT_FOLDER")
    asked = [{"prompt": "I", "adapter": "a"}, {"prompt": "I", "adapter": "b"}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    for argv in commands(readme, "python -m megatron_lite ckpt import_peft"):
        said = run_job(argv, timeout=60, cwd=tmp_path).expect(0).stdout
    texts = [json.loads(line)["text"] for line in said.splitlines()]
    assert len(texts) == 2 and texts[0] == texts[1]
