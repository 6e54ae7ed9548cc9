"""What is kept, what is deleted, and what a path stands for."""

import shutil

import pytest

from megatron_lite.checkpoint import find, prune
from megatron_lite.checkpoint.inspect import inspect, verify
from megatron_lite.errors import CheckpointError, StorageError
from tests.kit.pieces import commit, names, ready, resume

STEPS = (10, 20, 30, 40, 50)


def kept(folder):
    return [int(name.removeprefix("step_")) for name in names(folder) if name.startswith("step_")]


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (1, None, [50]),
        (2, None, [40, 50]),
        (9, None, [10, 20, 30, 40, 50]),
        (1, 20, [20, 40, 50]),
        (2, 10, [10, 20, 30, 40, 50]),
    ],
)
def test_the_last_k_and_every_nth_step_are_kept(keep, every, left, tmp_path):
    folder = ready(tmp_path, *STEPS)
    prune(folder, keep, every)
    assert kept(folder) == left
    assert "latest" in names(folder)


def test_what_latest_names_and_what_is_newer_are_never_deleted(tmp_path):
    folder = ready(tmp_path, *STEPS)
    (folder / "latest").write_text("step_00000020\n")
    prune(folder, 1)
    assert kept(folder) == [20, 30, 40, 50]
    (folder / "latest").write_text("nonsense")
    prune(folder, 1)
    assert kept(folder) == [20, 30, 40, 50]


def test_a_later_one_than_the_latest_is_no_way_back(tmp_path):
    folder = ready(tmp_path, *STEPS)
    (folder / "latest").write_text("step_00000010\n")
    assert resume(folder)[0].step == 10
    (folder / "step_00000010" / "state.json").write_bytes(b"{}")
    with pytest.raises(
        CheckpointError,
        match=r"none of 1 checkpoints is sound; .*; later than latest, and not tried: step_00000050, step_00000040",
    ):
        resume(folder)


@pytest.mark.parametrize(
    "name", ["step_00000030", "step_00000030.tmp-x", "step_00000030.old-x", ".probe.x", ".latest.x"]
)
@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_whatever_has_a_name_of_ours_a_run_starts_and_saves(tmp_path, name, kind):
    folder, elsewhere = ready(tmp_path / "here", 10, 20), ready(tmp_path / "elsewhere", 30) / "step_00000030"
    if kind == "link":
        (folder / name).symlink_to(elsewhere)
    elif kind == "file":
        (folder / name).write_text("")
    else:
        shutil.copytree(elsewhere, folder / name)
    for step in (30, 40):
        assert resume(folder)[0] is not None
        commit(folder, step)
    assert resume(folder)[0].step == 40
    assert names(folder) == ["latest", *(f"step_000000{step}" for step in (10, 20, 30, 40))]
    assert not (folder / "step_00000030").is_symlink() and "step 30" in verify(elsewhere)


def test_what_cannot_be_removed_is_named_and_stays(tmp_path, monkeypatch, capsys):
    folder = ready(tmp_path / "checkpoints", 10)
    shutil.copytree(folder / "step_00000010", folder / "step_00000020.tmp-x")

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    assert resume(folder)[0].step == 10
    told = f"warning: {folder}/step_00000020.tmp-x is left over, and could not be removed: Permission denied\n"
    assert capsys.readouterr().err == told
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    with pytest.raises(StorageError, match=r"checkpoints/latest: is a directory\Z"):
        commit(folder, 20)


def test_an_interrupted_deletion_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    folder = ready(tmp_path, *STEPS)

    def fail(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(StorageError, match="input/output error"):
            prune(folder, 2)
    assert len(names(folder)) == 6 and sum(".tmp-" in name for name in names(folder)) == 1
    checkpoint, warnings = resume(folder)
    assert checkpoint.step == 50 and not warnings
    assert not [name for name in names(folder) if ".tmp-" in name]


def test_a_run_or_its_checkpoints_stand_for_the_latest_one(tmp_path):
    folder = ready(tmp_path / "run" / "checkpoints", 10, 20)
    for path in (tmp_path / "run", folder, folder / "step_00000020"):
        assert find(path) == folder / "step_00000020"
    copied = shutil.copytree(folder / "step_00000010", tmp_path / "copy")
    assert find(copied) == copied
    assert "step 10" in verify(copied)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        find(tmp_path)


def test_inspect_prints_a_table(tmp_path, capsys):
    inspect(commit(ready(tmp_path), 10))
    out = capsys.readouterr().out
    for text in ("blocks.0.qkv.weight", "24 × 6", "BF16", "scalar", "samples: 80", "step 10: 6 tensors, 320 elements"):
        assert text in out
