"""One bit of one file of a checkpoint is wrong, wherever it is."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint import open_checkpoint
from megatron_lite.errors import CheckpointError
from tests.kit.pieces import SOLO, blank, names, ready, resume
from tests.kit.tiny import TinyRuns, assert_same_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ready(tmp_path_factory.mktemp("flipped") / "checkpoints", 1, 2)


@settings(max_examples=300)
@given(data=st.data())
def test_it_is_found_and_never_loaded(folder: Path, data: st.DataObject) -> None:
    checkpoint = folder / "step_00000002"
    file = checkpoint / data.draw(st.sampled_from(names(checkpoint)))
    intact = file.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(intact) - 1))
    damaged = bytearray(intact)
    damaged[bit // 8] ^= 1 << bit % 8
    file.write_bytes(damaged)
    try:
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")) as caught:
            open_checkpoint(checkpoint)
        assert caught.value.exit_code == 4
        some = dict(list(blank().items())[: data.draw(st.integers(0, 4))])  # nobody asks for the rest
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            open_checkpoint(checkpoint, lazy=True).load(some, SOLO, partial=True)
        found, warnings = resume(folder)
        assert found is not None
        assert found.step == 1
        assert warnings
    finally:
        file.write_bytes(intact)


def test_a_run_goes_on_from_the_checkpoint_before(tiny: TinyRuns, tmp_path: Path) -> None:
    tiny.run(tmp_path, "--train.steps=6").expect(exit_code=0)
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    for shard in newest.glob("*.safetensors"):
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told = r"passed over a checkpoint: \S+step_00000006: shard_00000.safetensors is damaged"
    again = tiny.run(tmp_path).expect(exit_code=0, stderr=told, stdout=r"resumed \S+step_00000003: step 3")
    assert "falling back to" in again.stderr
    assert_same_run(tmp_path / "run", tiny.reference)


def test_one_that_was_asked_for_is_refused(tiny: TinyRuns, tmp_path: Path) -> None:
    tiny.run(tmp_path, "--train.steps=3").expect(exit_code=0)
    asked = tmp_path / "run" / "checkpoints" / "step_00000003"
    shard = next(asked.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    told = rf"error: {asked}: {shard.name} is damaged \(its SHA-256 does not agree\)"
    tiny.run(tmp_path, f"--checkpoint.resume={asked}").expect(exit_code=4, stderr=told)


def test_unless_it_is_trusted(tmp_path: Path) -> None:
    """``trust`` saves the reading: what is there in its size is taken for what was written."""
    checkpoint = ready(tmp_path / "checkpoints", 2) / "step_00000002"
    shard = next(checkpoint.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert open_checkpoint(checkpoint, trust=True).step == 2
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name}: size"):
        open_checkpoint(checkpoint, trust=True)


def test_the_intact_one_loads(folder: Path) -> None:
    found, warnings = resume(folder)
    assert found is not None
    assert (found.step, warnings) == (2, [])
    assert len(names(folder / "step_00000002")) == 5  # a shard, the state, the manifest and two extras are all drawn
