"""The disk is full, at a save or under the logs."""

import re
from pathlib import Path

import pytest

from megatron_lite.errors import StorageError
from megatron_lite.training.faults import Faults
from tests.kit.pieces import OperationLog, commit, names, ready, resume, small_disk
from tests.kit.tiny import TinyRuns, assert_same_run, losses

FULL = r"disk full: need [\d.]+ [kM]?B, have [\d.]+ [kMG]?B at "


def test_a_save_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        folder = ready(disk / "checkpoints", 1)
        before = names(folder)
        (disk / "ballast").write_bytes(bytes((1 << 20) + (600 << 10)))
        with pytest.raises(StorageError, match=FULL + re.escape(str(folder))) as caught:
            commit(folder, 2)
        assert caught.value.exit_code == 7
        assert names(folder) == before
        found, warnings = resume(folder)
        assert found is not None
        assert (found.step, warnings) == (1, [])
        (disk / "ballast").unlink()
        commit(folder, 2)


def test_a_disk_that_fills_up_at_any_write(tmp_path: Path) -> None:
    log = OperationLog()
    commit(ready(tmp_path / "counted", 1), 2, faults=log)
    for point, operation in enumerate(log.names, 1):
        if operation.startswith("write") and "latest" not in operation:
            folder = ready(tmp_path / str(point), 1)
            before = names(folder)
            with pytest.raises(StorageError, match=FULL):
                commit(folder, 2, faults=Faults.parse(f"enospc:step=2:op={point}"))
            assert names(folder) == before, operation


def test_the_run_ends_with_the_documented_code_and_can_go_on(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, faults="enospc:rank=0:step=6:op=2")
    result.expect(exit_code=7, stderr=f"error: {FULL}")
    assert names(tmp_path / "run" / "checkpoints") == ["latest", "step_00000003"]
    tiny.run(tmp_path).expect(exit_code=0)
    assert_same_run(tmp_path / "run", tiny.reference)


def test_full_logs_do_not_stop_training(tiny: TinyRuns, tmp_path: Path) -> None:
    """The logs' disk is full from the start; checkpoints are elsewhere."""
    with small_disk(tmp_path / "run" / "tb", "4k"), small_disk(tmp_path / "run" / "logs", "64k"):
        result = tiny.run(tmp_path).expect(exit_code=0)
        assert losses(tmp_path / "run")[12] == losses(tiny.reference)[12]
    assert result.stdout.count("cannot write metrics") + result.stderr.count("cannot write metrics") <= 1
