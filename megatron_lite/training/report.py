"""What a run reports: metrics.jsonl, TensorBoard, a progress line; and model FLOPs utilisation.

Only rank 0 reports. An I/O error, such as a full disk, is reported once and never stops training.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_lite.config import ModelConfig
from megatron_lite.families.family import block_weights

logger = logging.getLogger("megatron_lite")

# The makers' figures for dense peak FLOP/s, by part of the driver's device name and by compute dtype.
_PEAKS: dict[str, dict[torch.dtype, float]] = {
    "H200": {torch.bfloat16: 989e12, torch.float32: 67e12, torch.float64: 67e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 67e12, torch.float64: 67e12},
    "A100": {torch.bfloat16: 312e12, torch.float32: 19.5e12, torch.float64: 19.5e12},
    "B200": {torch.bfloat16: 2250e12, torch.float32: 80e12, torch.float64: 40e12},
    "L40S": {torch.bfloat16: 362e12, torch.float32: 91.6e12},
    "A10": {torch.bfloat16: 125e12, torch.float32: 31.2e12},
    "RTX 4090": {torch.bfloat16: 165e12, torch.float32: 82.6e12},
}


def flops_per_token(config: ModelConfig, seq_len: int, *, frozen: bool = False) -> float:
    """Forward and backward FLOPs of one token, after Chowdhery et al. 2022 (PaLM), appendix B.

    6 for each weight that takes part in a product (the output projection counts, the embedding lookup does not) plus
    12 · layers · heads · head_dim · seq_len for attention scores and values, halved because of the causal mask. With
    ``frozen`` weights, which need no gradient of their own: 4 for each.
    """
    assert config.vocab_size
    width = config.num_heads * config.head_dim
    weights = config.num_layers * block_weights(config) + config.vocab_size * config.hidden_size
    return (4 if frozen else 6) * weights + 6 * config.num_layers * width * seq_len


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The device's peak FLOP/s for matrix products in ``dtype``, and where the number comes from.

    Known GPUs are looked up by name; on other devices, a product of two square matrices is timed.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peaks in _PEAKS.items():
            if key in name and dtype in peaks:
                return peaks[dtype], f"{name}, the maker's figure"
    size = 8192 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds() -> float:
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    best = min(seconds() for _ in range(8))
    return 2 * size**3 / best, f"measured, {size}³ {str(dtype).removeprefix('torch.')} product"


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Writes a run's metrics to metrics.jsonl and TensorBoard, and to a progress line. ``done``: the steps before this
    start; the files of a resumed run are continued."""

    def __init__(self, folder: Path, steps: int, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.broken = folder / "metrics.jsonl", False
        with self._guarded(), self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a line that was cut short
                    file.write(b"\n")
        self.writer = SummaryWriter(str(folder / "tb"), purge_step=done + 1 if done else None)
        self.progress: Progress | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stdout))
            self.task = self.progress.add_task("starting", total=steps, completed=done)
            self.progress.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one TensorBoard point for each value, under ``step`` (from 1)."""
        with self._guarded():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A sample of generated text."""
        with self._guarded():
            self.writer.add_text(name, f"```\n{text}\n```", step)

    def advance(self, step: int, summary: str, *, log: bool) -> None:
        """Update the progress line on a terminal; elsewhere, log a plain line if ``log``."""
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=summary)
        elif log:
            logger.info("step %d  %s", step, summary)

    def close(self) -> None:
        """Flush everything and give the terminal back."""
        if self.progress is not None:
            self.progress.stop()
        with self._guarded():
            self.writer.close()

    def _guarded(self) -> Any:
        return _SayOnce(self)


class _SayOnce:
    """Turns an OSError from a log file into one warning for the whole run."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self.reporter.broken:
            logger.warning("cannot write metrics (%s); training goes on without them", error)
            self.reporter.broken = True
        return True
