"""Small corpora, a small tokenizer, and the data tools run as a user runs them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import psutil

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
    """The result of a job that has workers: multiprocessing's own helper process may take a moment to follow it."""
    with contextlib.suppress(psutil.TimeoutExpired):
        job.process.wait(max(0.0, job.deadline - time.monotonic()))
        job.wait_gone(3)
    return job.finish()


def dataset_bytes(prefix: Path) -> tuple[bytes, bytes]:
    """The two files of a dataset."""
    return Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
