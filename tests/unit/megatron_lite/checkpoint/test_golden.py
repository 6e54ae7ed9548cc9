"""Checkpoints that were written once are read for ever: the files in tests/golden are never written anew."""

import hashlib
import json
from pathlib import Path

from megatron_lite.checkpoint import open_checkpoint
from tests.kit.pieces import SOLO, assert_whole, commit, ready

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "checkpoint_v1" / "step_00000002"


def test_version_1_is_read():
    checkpoint = open_checkpoint(GOLDEN, SOLO)
    assert (checkpoint.manifest.version, checkpoint.step) == (1, 2)
    assert_whole(checkpoint)


def test_version_1_is_written_as_ever(tmp_path):
    """Another byte in a file is another version of the format."""
    path = commit(ready(tmp_path), 2)
    for file in GOLDEN.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes(), file.name


def test_nobody_changed_the_golden_files():
    listed = json.loads((GOLDEN / "manifest.json").read_text())["files"]
    assert {f.name for f in GOLDEN.iterdir()} == {"manifest.json", *listed}
    assert hashlib.sha256((GOLDEN / "manifest.json").read_bytes()).hexdigest() == (
        "37a04ab3f7ad1d8f78028da707d8458a8f33bfeece25d8b92cf9cff02077b69f"
    )
