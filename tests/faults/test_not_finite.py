"""The loss becomes NaN on one rank."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.kit.tiny import TinyRuns, checkpoint_steps, every_engine, losses


def assert_finite(run_dir: Path) -> None:
    """Every tensor in every checkpoint is finite."""
    shards = list((run_dir / "checkpoints").glob("step_*/*.safetensors"))
    assert shards
    for shard in shards:
        assert all(tensor.isfinite().all() for tensor in load_file(shard).values() if tensor.is_floating_point())


@every_engine
def test_all_ranks_stop_before_the_update(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, faults="nan:rank=1:step=5").expect(
        exit_code=6, stderr=r"error: .*step 5: loss nan, gradient norm nan on samples 32 to 39; the weights of step 4"
    )
    assert result.stderr.count("step 5: loss nan") == 1, "said by one rank, not by all"
    run_dir = tmp_path / "run"
    assert checkpoint_steps(run_dir) == [3]
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]
    assert json.loads((run_dir / "outcome.json").read_text())["exit_code"] == 6
    assert_finite(run_dir)


@every_engine
def test_a_bad_batch_is_skipped_where_that_is_allowed(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, "--train.skip_bad_batches=1", faults="nan:rank=1:step=5").expect(exit_code=0)
    assert "SKIPPED: not finite, weights unchanged" in result.stdout
    run_dir, reference = tmp_path / "run", losses(tiny.reference)
    found = losses(run_dir)
    assert [found[step] for step in range(1, 5)] == [reference[step] for step in range(1, 5)]
    assert sorted(found) == [1, 2, 3, 4, *range(6, 13)]
    state = json.loads((run_dir / "checkpoints" / "step_00000012" / "state.json").read_text())["train"]
    assert state == {"step": 12, "updates": 11, "samples": 96, "skipped": 1}
    assert_finite(run_dir)
    assert torch.tensor(list(found.values())).isfinite().all()
