"""A file is missing, too much, or that of another step."""

import shutil
from pathlib import Path

import pytest

from megatron_lite.checkpoint import open_checkpoint
from megatron_lite.errors import CheckpointError
from tests.kit.pieces import names, ready, resume

FILES = ["config.yaml", "manifest.json", "shard_00000.safetensors", "state.json", "tokenizer.model"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = ready(tmp_path / "checkpoints", 1, 2)
    assert names(folder / "step_00000002") == FILES
    return folder


def refused(folder: Path, told: str) -> None:
    """Step 2 is refused with exit code 4 and never chosen, whatever ``latest`` says."""
    with pytest.raises(CheckpointError, match=told) as caught:
        open_checkpoint(folder / "step_00000002")
    assert caught.value.exit_code == 4
    assert (folder / "latest").read_text() == "step_00000002\n"
    found, _ = resume(folder)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("name", FILES)
def test_missing(folder: Path, name: str) -> None:
    (folder / "step_00000002" / name).unlink()
    refused(folder, f"{name} is missing")


def test_all_that_are_missing_are_listed(folder: Path) -> None:
    for name in FILES:
        if name != "manifest.json":
            (folder / "step_00000002" / name).unlink()
    refused(folder, "; ".join(f"{name} is missing" for name in FILES if name != "manifest.json"))


@pytest.mark.parametrize("name", ["shard_00001.safetensors", "notes.txt", ".hidden", "optimizer.pt"])
def test_a_file_too_much(folder: Path, name: str) -> None:
    (folder / "step_00000002" / name).write_text("?")
    refused(folder, f"unexpected file '{name}'")


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("config.yaml", "tokenizer.model")])
def test_swapped_with_that_of_another_step(folder: Path, name: str) -> None:
    """Sizes agree, so only digests and the manifest's own step can tell."""
    shutil.copy(folder / "step_00000001" / name, folder / "step_00000002" / name)
    refused(folder, "is of step 1" if name == "manifest.json" else f"{name}( is damaged|: size)")


def test_a_link_is_not_followed(folder: Path) -> None:
    shard = folder / "step_00000002" / "shard_00000.safetensors"
    shard.rename(folder / "moved")
    shard.symlink_to(folder / "moved")
    refused(folder, r"shard_00000\.safetensors is not a regular file")


def test_without_a_sound_one_nothing_starts_afresh(folder: Path) -> None:
    for step in (1, 2):
        (folder / f"step_{step:08d}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is sound"):
        resume(folder)
