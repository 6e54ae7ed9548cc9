"""The output of ``ckpt inspect`` and ``ckpt verify``."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_lite.checkpoint.reading import Checkpoint, open_checkpoint, read_manifest
from megatron_lite.checkpoint.source import Source
from megatron_lite.checkpoint.storage import amount


def inspect(path: Path, console: Console | None = None) -> None:
    """Print step, size, state and tensors of a checkpoint without reading its shards."""
    console = console or Console()
    checkpoint = Checkpoint(path, read_manifest(path))
    tensors, files = checkpoint.manifest.tensors, checkpoint.manifest.files
    table = Table("tensor", "dtype", "shape", "boxes")
    table.columns[0].overflow = "fold"
    for name, tensor in tensors.items():
        table.add_row(name, tensor.dtype, " × ".join(map(str, tensor.shape)) or "scalar", str(len(tensor.boxes)))
    elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
    size = amount(sum(file.size for file in files.values()))
    console.print(table)
    for key, value in checkpoint.state().items():
        text = json.dumps(value)
        console.print(f"[bold]{escape(key)}[/bold]: {escape(text if len(text) <= 100 else text[:97] + '...')}")
    console.print(
        f"step {checkpoint.step}: {len(tensors)} tensors, {elements:,} elements, {len(files)} files, {size}",
        highlight=False,
    )


def inspect_source(source: Source, console: Console | None = None) -> None:
    """Print the tensors of a checkpoint in another format, under our names."""
    table = Table("tensor", "dtype", "shape")
    table.columns[0].overflow = "fold"
    for name, info in source.tensors.items():
        table.add_row(name, str(info.dtype).removeprefix("torch."), " × ".join(map(str, info.shape)))
    console = console or Console()
    console.print(table)
    for note in source.notes:
        console.print(f"note: {note}", markup=False)
    elements = sum(math.prod(info.shape) for info in source.tensors.values())
    console.print(f"{len(source.tensors)} tensors, {elements:,} elements", highlight=False)


def verify(path: Path) -> str:
    """Check every byte of a checkpoint; returns the line to print. Raises CheckpointError."""
    checkpoint = open_checkpoint(path)
    size = amount(sum(file.size for file in checkpoint.manifest.files.values()))
    return f"{path}: step {checkpoint.step}, {len(checkpoint.manifest.files)} files, {size}: all SHA-256 digests agree"
