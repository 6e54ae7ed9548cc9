"""Small checkpoints without a model: named global tensors, cut as a tensor-parallel model would cut them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from megatron_lite.checkpoint import BackgroundSaver, Checkpoint, Piece, newest, prepare, save
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import ShardSpec
from megatron_lite.training.faults import Faults

SOLO = Axis("world")
EXTRAS = {"tokenizer.model": b"pieces", "config.yaml": b"run: {}\n"}
SPECS = {
    "embedding.weight": (ShardSpec((12, 6), dim=0), torch.float32),
    "blocks.0.qkv.weight": (ShardSpec((24, 6), dim=0, chunks=(16, 4, 4)), torch.float32),
    "blocks.0.proj.weight": (ShardSpec((6, 8), dim=1), torch.bfloat16),
    "blocks.0.gate_up.weight": (ShardSpec((3, 16), dim=1, chunks=(8, 8)), torch.float64),
    "norm.weight": (ShardSpec((7,)), torch.float32),
    "optim.step": (ShardSpec(()), torch.int64),
}


def global_tensors(step: int) -> dict[str, Tensor]:
    """The whole tensors of a step, different for every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randint(-(2**15), 2**15, spec.shape, generator=generator).to(dtype)
        for name, (spec, dtype) in SPECS.items()
    }


def cut(tensors: dict[str, Tensor], rank: int = 0, size: int = 1) -> dict[str, Piece]:
    """The pieces that ``rank`` of ``size`` tensor-parallel ranks holds."""
    pieces = {}
    for name, (spec, dtype) in SPECS.items():
        pieces[name] = spec.piece(torch.empty(spec.local_shape(size), dtype=dtype), Axis("tp", rank, size))
        for tile in pieces[name].tiles:
            tile.data.copy_(tensors[name][tile.place])
    return pieces


def blank(rank: int = 0, size: int = 1) -> dict[str, Piece]:
    """Pieces with nothing of worth in them, to load into."""
    return cut({name: torch.full(spec.shape, 77, dtype=dtype) for name, (spec, dtype) in SPECS.items()}, rank, size)


def holds(pieces: dict[str, Piece], step: int) -> bool:
    """Whether every piece equals its part of the tensors of ``step``, bit for bit."""
    tensors = global_tensors(step)
    return all(
        torch.equal(tile.data, tensors[name][tile.place]) for name, piece in pieces.items() for tile in piece.tiles
    )


def world_of(rank: int, size: int) -> Axis:
    """The axis of all ranks that ``run_ranks`` started."""
    return Axis("world", rank, size, torch_dist.group.WORLD) if size > 1 else SOLO


def commit(folder: Path, step: int, rank: int = 0, size: int = 1, faults: Faults | None = None) -> Path:
    """Save the tensors of ``step``, cut over all ranks."""
    pieces = cut(global_tensors(step), rank, size)
    state = {"step": step, "samples": 8 * step, "rng": list(range(20))}
    return save(folder, step, pieces, state, EXTRAS, world_of(rank, size), faults or Faults.none())


def commit_beside(folder: Path, step: int, rank: int = 0, size: int = 1, faults: Faults | None = None) -> None:
    """``commit`` in the background, while the tensors become those of the next step."""
    pieces, saver = cut(global_tensors(step), rank, size), BackgroundSaver(world_of(rank, size), torch.device("cpu"))
    state = {"step": step, "samples": 8 * step, "rng": list(range(20))}
    saver.save(folder, step, pieces, state, EXTRAS, faults or Faults.none(), lambda path: None)
    saver.wait_for_copy()
    for name, piece in cut(global_tensors(step + 1), rank, size).items():
        for tile, later in zip(pieces[name].tiles, piece.tiles, strict=True):
            tile.data.copy_(later.data)
    saver.wait()


def ready(folder: Path, *steps: int) -> Path:
    """``folder``, prepared and with a checkpoint of each of ``steps``."""
    prepare(folder, SOLO)
    for step in steps:
        commit(folder, step)
    return folder


def resume(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """What a new start finds after ``prepare``, its tensors checked, and the warnings it prints."""
    warnings: list[str] = []
    prepare(folder, SOLO)
    checkpoint = newest(folder, SOLO, warnings.append)
    if checkpoint is not None:
        assert_whole(checkpoint)
    return checkpoint, warnings


def assert_whole(checkpoint: Checkpoint) -> None:
    """Tensors, state and extras are those of the checkpoint's step."""
    pieces = blank()
    checkpoint.load(pieces, SOLO)
    assert holds(pieces, checkpoint.step)
    assert checkpoint.state()["samples"] == 8 * checkpoint.step
    assert {name: checkpoint.extra(name) for name in EXTRAS} == EXTRAS


class OperationLog(Faults):
    """No fault; notes the file operations of a save in ``names``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def file_operation(self, name: str) -> None:
        self.names.append(name)


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def sign(path: Path, text: str) -> None:
    """Write a manifest with this JSON text and a digest that agrees, as whoever owns the folder could."""
    raw = text.removesuffix("}").encode()
    (path / "manifest.json").write_bytes(raw + b',"sha256":"%s"}\n' % hashlib.sha256(raw).hexdigest().encode())


def manifest_tree(path: Path) -> dict[str, Any]:
    """The manifest as it may be changed and signed again."""
    tree = json.loads((path / "manifest.json").read_text())
    del tree["sha256"]
    return tree


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of ``size`` bytes (as ``2m``) mounted at ``folder``; skips the test where mounting is forbidden."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
