"""The checkpoint folder is read-only, gone, not a folder, or returns errors: said at the start."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from megatron_lite.checkpoint import prepare
from megatron_lite.checkpoint import storage as module
from megatron_lite.errors import StorageError
from tests.kit.pieces import SOLO, commit, names, ready, small_disk
from tests.kit.tiny import TinyRuns


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(StorageError, match=reason) as caught:
        prepare(folder, SOLO)
    assert caught.value.exit_code == 7
    assert "\n" not in str(caught.value)


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    refused(tmp_path / "checkpoints", "checkpoints: (file exists|not a directory)")


def test_a_read_only_file_system(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        ready(disk / "checkpoints", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused(disk / "checkpoints", "read-only file system")
        assert names(disk / "checkpoints") == ["latest", "step_00000001"]


def test_an_input_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.os, "fsync", broken)
    refused(tmp_path / "checkpoints", r"checkpoints: input/output error")


def test_it_vanishes_while_training(tmp_path: Path) -> None:
    folder = ready(tmp_path / "checkpoints", 1)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="checkpoints: no such directory"):
        commit(folder, 2)
    assert not folder.exists()
    assert names(tmp_path / "elsewhere") == ["latest", "step_00000001"]


def test_no_run_starts_that_could_not_save(tiny: TinyRuns, tmp_path: Path) -> None:
    with small_disk(tmp_path / "run", "4m") as disk:
        (disk / "logs").mkdir()
        (disk / "checkpoints").symlink_to("/proc/self")  # there, and nothing can be written
        result = tiny.run(tmp_path)
    result.expect(exit_code=7, stderr=r"(?m)^error: \S*checkpoints\S*: ")
    assert "step 1 " not in result.stdout
