"""Small corpora, a small tokenizer, and the data tools run as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from data_tools.tokenizer import train
from tests.kit.jobs import PYTHON, REPOSITORY, Result, RunningJob, start_job

CODE = "import os\n\ndef main(args):\n    return {name: [len(name), 0x1f] for name in args}  # naïve café\n"


def documents(count: int, start: int = 0) -> list[str]:
    """Short texts that look a little like code; document ``i`` is always the same."""
    words = CODE.split(" ")
    numbers = range(start, count)
    return [" ".join(words[i * k % len(words)] for k in range(3, 12 + i % 40)) + f"\n{i}" for i in numbers]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """One {"text": …} a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@lru_cache(maxsize=4)
def _model(model_type: str) -> bytes:
    return train(documents(300), vocab_size=400, model_type=model_type)


def write_tokenizer(path: Path, model_type: str = "bpe") -> Path:
    """A sentencepiece model of 400 entries."""
    path.write_bytes(_model(model_type))
    return path


def data_tools(
    *args: object, timeout: float = 60, env: Mapping[str, str | None] | None = None, cwd: Path = REPOSITORY
) -> Result:
    """``python -m data_tools …`` to its end."""
    with start_job([PYTHON, "-m", "data_tools", *map(str, args)], timeout=timeout, env=env, cwd=cwd) as job:
        return ended(job)


def ended(job: RunningJob) -> Result:
    """The result of a job that has workers: multiprocessing has a helper process of its own."""
    return job.finish(grace=3)


def dataset_bytes(prefix: Path) -> tuple[bytes, bytes]:
    """The two files of a dataset."""
    return Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()


CHATML = (  # a template that marks what the assistant wrote; without the marks, it means the same turns
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@lru_cache(maxsize=1)
def _json_model() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    model.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    model.train_from_iterator(documents(300), trainer)
    return model.to_str()


def write_json_tokenizer(folder: Path, template: str = CHATML, eos: str = "<|im_end|>") -> Path:
    """A folder with a byte-level tokenizer.json of 400 entries, its settings and a chat template."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(_json_model(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
