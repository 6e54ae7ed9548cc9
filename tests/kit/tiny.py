"""A model and a dataset small enough to train for real in a test, and the oracle that two runs came out the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from tests.kit.jobs import PYTHON, Result, RunningJob, run_job, start_job
from tests.kit.terminal import run_on_terminal
from tests.kit.warm import DEEPSPEED

VOCAB, SEQ_LEN = 64, 32


def tiny_data(folder: Path, *, descending: bool = False) -> Path:
    """A dataset of 400 short documents that a model can learn something from; returns its prefix. They count upwards by
    1 to 3, or downwards."""
    rng = np.random.default_rng(7)
    with IndexedWriter(folder / "data", np.dtype(np.uint16)) as writer:
        for length in rng.integers(8, 60, size=400):
            start, stride = rng.integers(0, VOCAB), rng.integers(1, 4)
            steps = stride * np.arange(length) * (-1 if descending else 1)
            writer.add_document(((start + steps) % VOCAB).astype(np.uint16))
    return folder / "data"


def append_document(data: Path) -> None:
    """One short document more at the end."""
    dataset = IndexedDataset(data)
    texts = [np.array(dataset[i]) for i in range(dataset.num_sequences)]
    with IndexedWriter(data, np.dtype(np.uint16)) as writer:
        for text in [*texts, texts[0]]:
            writer.add_document(text)


def edit_token(data: Path) -> None:
    """Another token in the middle; sizes stay as they are."""
    path = Path(f"{data}.bin")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 4 * 2] ^= 1
    path.write_bytes(raw)


def tiny_config(folder: Path, data: Path, **changes: Any) -> Path:
    """A config file in ``folder``: 12 steps on ``data``, a save every third; ``changes`` as ``train__steps=5``."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(folder), "seed": 3},
        "model": {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": SEQ_LEN},
        "data": {"train": [{"path": str(data)}], "seq_len": SEQ_LEN},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 12, "global_batch_size": 8, "micro_batch_size": 4, "log_every": 1, "hang_timeout": 30},
        "checkpoint": {"every": 3, "keep": 10},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def short_config(folder: Path, data: Path) -> Path:
    """Three steps without a save: enough to compare launches by."""
    return tiny_config(folder, data, train__steps=3, checkpoint__every=0)


def train_argv(config: Path) -> list[str]:
    """Two steps as one of two tensor-parallel ranks, without a launcher."""
    return [PYTHON, "-m", "megatron_lite", "train", str(config), "--parallel.tp=2", "--train.steps=2"]


def rank_env(rank: int, port: int, job: str = "") -> dict[str, str]:
    """What a launcher would tell ``rank`` of two."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", "MLITE_JOB": job, **{name: str(value) for name, value in place.items()}}


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of every step; of a step that was done again after a restart, the last one."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of which a checkpoint has been committed."""
    found = (path.name.removeprefix("step_") for path in (run_dir / "checkpoints").glob("step_*"))
    return sorted(int(name) for name in found if name.isdecimal())


def assert_same_run(run_dir: Path, reference: Path, *, steps: int = 12) -> None:
    """The oracle of every recovery: losses of all steps, and weights, optimizer state and position after the last one,
    are those of a run that nothing happened to, bit for bit."""
    wanted, got = losses(reference), losses(run_dir)
    assert sorted(wanted) == list(range(1, steps + 1))
    assert got == wanted
    name = f"step_{steps:08d}"
    ours, theirs = ({p.name: p for p in (d / "checkpoints" / name).iterdir()} for d in (run_dir, reference))
    assert sorted(ours) == sorted(theirs)
    shards = [file for file in ours if file.endswith(".safetensors")]
    assert shards
    for file in shards:
        assert ours[file].read_bytes() == theirs[file].read_bytes(), f"{name}/{file} differs"
    states = [json.loads((d / "checkpoints" / name / "state.json").read_text()) for d in (run_dir, reference)]
    assert states[0] == states[1]


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2},
    "fsdp": {"zero": 3},
    "deepspeed": {"engine": "deepspeed", "zero": 3},
}
every_engine = pytest.mark.parametrize(
    "tiny",
    ["tp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in LAYOUTS if engine != "tp")],
    indirect=True,
    scope="session",
)


class TinyRuns:
    """Real launches of the tiny model on two ranks, tensor-parallel unless ``parallel`` says otherwise; the run folder
    is ``FOLDER/run``.

    ``faults`` is the trainer's fault language (``megatron_lite/training/faults.py``); ``slow`` makes each phase of a
    step take that many seconds longer, so that there is time to do something to the run. ``thorough``: tests go through
    every way that the launcher has a part in; under the other engines one of each kind will do.
    """

    def __init__(self, data: Path, folder: Path, parallel: Mapping[str, Any] = LAYOUTS["tp"]) -> None:
        self.data, self.folder, self.parallel = data, folder, parallel
        self.thorough = parallel == LAYOUTS["tp"]
        self._loaded = DEEPSPEED if parallel.get("engine") == "deepspeed" else ()

    @cached_property
    def reference(self) -> Path:
        """The folder of a run that nothing happened to, started as users start theirs."""
        self.run(self.folder, cold=True).expect(exit_code=0)
        return self.folder / "run"

    def run(
        self, folder: Path, *flags: str, faults: str = "", slow: float = 0, timeout: float = 120, cold: bool = False
    ) -> Result:
        return run_job(
            self._argv(folder, flags), timeout=timeout, env=self._env(faults, slow), cold=cold, loaded=self._loaded
        )

    def start(
        self, folder: Path, *flags: str, faults: str = "", slow: float = 0, timeout: float = 120, cold: bool = False
    ) -> AbstractContextManager[RunningJob]:
        return start_job(
            self._argv(folder, flags), timeout=timeout, env=self._env(faults, slow), cold=cold, loaded=self._loaded
        )

    def on_terminal(
        self, folder: Path, typed: Sequence[tuple[str, bytes]], *flags: str, slow: float = 0, timeout: float = 120
    ) -> Result:
        return run_on_terminal(self._argv(folder, flags), typed, timeout=timeout, env=self._env("", slow))

    def _argv(self, folder: Path, flags: Sequence[str]) -> list[str]:
        config = tiny_config(folder, self.data, **{f"parallel__{key}": value for key, value in self.parallel.items()})
        return [PYTHON, "-m", "launch", "run", str(config), "--nproc=2", *flags]

    def _env(self, faults: str, slow: float) -> dict[str, str]:
        return {"MLITE_FAULT": ";".join(filter(None, [faults, f"sleep:seconds={slow}" if slow else ""]))}
