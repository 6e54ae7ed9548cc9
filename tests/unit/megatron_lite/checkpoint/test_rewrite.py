"""Rewriting a checkpoint takes no more memory than was said, whatever its size."""

from pathlib import Path

import torch

from megatron_lite.checkpoint import prepare, save
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Piece
from megatron_lite.training.faults import Faults
from tests.benchmarks.checkpoint import LITE, outside


def test_resharding_stays_under_its_cap(tmp_path: Path) -> None:
    source = tmp_path / "source"
    pieces = {f"model.t{i}": Piece.whole(torch.ones(2441, 6400)) for i in range(10)}  # 62.5 MB each
    prepare(source, Axis("world"))
    save(source, 1, pieces, {}, {"config.yaml": b"model: {vocab_size: 64}\n"}, Axis("world"), Faults.none())
    _, idle = outside(LITE, "inspect", str(source))
    _, needed = outside(LITE, "reshard", str(source), str(tmp_path / "again"), "--files=5", "--max_ram=64M")
    assert needed - idle < 64  # MB
