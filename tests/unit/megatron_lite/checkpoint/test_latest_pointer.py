"""``latest`` is garbage, or points where it should not."""

from pathlib import Path

import pytest

from tests.kit.pieces import commit, ready, resume

POINTERS = {
    "empty": b"",
    "blank": b" \n",
    "of a step that is not there": b"step_00000099\n",
    "a path": b"../../x",
    "an absolute path": b"/etc/passwd",
    "a path to a real one": b"./step_00000001",
    "a temporary name": b"step_00000002.tmp-1234",
    "binary": bytes(range(256)),
    "not ASCII": "step_0000000２".encode(),
    "long": b"step_" + b"0" * 5000,
    "two names": b"step_00000001\nstep_00000002\n",
}


@pytest.mark.parametrize("pointer", POINTERS)
def test_it_is_ignored_with_a_warning(tmp_path: Path, pointer: str) -> None:
    folder = ready(tmp_path / "checkpoints", 1, 2)
    (folder / "latest").write_bytes(POINTERS[pointer])
    found, warnings = resume(folder)
    assert found is not None
    assert found.step == 2
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{folder / 'latest'} does not name a checkpoint")
    commit(folder, 3)
    assert (folder / "latest").read_text() == "step_00000003\n"


@pytest.mark.parametrize("kind", ["missing", "folder", "dangling link"])
def test_not_a_file(tmp_path: Path, kind: str) -> None:
    folder = ready(tmp_path / "checkpoints", 1, 2)
    latest = folder / "latest"
    latest.unlink()
    if kind == "folder":
        latest.mkdir()
    elif kind == "dangling link":
        latest.symlink_to("nowhere")
    found, warnings = resume(folder)
    assert found is not None
    assert (found.step, len(warnings)) == (2, 1)
