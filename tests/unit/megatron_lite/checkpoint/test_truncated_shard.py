"""A shard is shorter than it was."""

from pathlib import Path

import pytest

from megatron_lite.checkpoint import open_checkpoint
from megatron_lite.errors import CheckpointError
from tests.kit.pieces import ready, resume


@pytest.mark.parametrize("part", ["nothing", "one byte", "half", "all but one byte"])
def test_named_with_its_size_and_passed_over(tmp_path: Path, part: str) -> None:
    folder = ready(tmp_path / "checkpoints", 1, 2)
    shard = next((folder / "step_00000002").glob("*.safetensors"))
    size = shard.stat().st_size
    left = {"nothing": 0, "one byte": 1, "half": size // 2, "all but one byte": size - 1}[part]
    os_truncate(shard, left)
    told = rf"step_00000002: {shard.name}: size {left}, expected {size}"
    with pytest.raises(CheckpointError, match=told) as caught:
        open_checkpoint(folder / "step_00000002")
    assert caught.value.exit_code == 4
    found, warnings = resume(folder)
    assert found is not None
    assert found.step == 1
    assert f"{shard.name}: size {left}" in warnings[0]
    assert "falling back to" in warnings[1]


def os_truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
