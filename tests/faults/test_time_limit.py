"""Slurm announces the end of a job's time; the run saves, the job is queued again and goes on."""

from pathlib import Path

import pytest

from tests.kit.launches import HEALED, LIMIT, output, queued_again, submit
from tests.kit.slurm import Slurm
from tests.kit.tiny import TinyRuns, assert_same_run, checkpoint_steps


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_run_saves_before_its_time_is_over_and_is_queued_again(
    slurm: Slurm, tiny: TinyRuns, tmp_path: Path
) -> None:
    limits = ("--launch.slurm.time=1", "--launch.slurm.signal_seconds=45")  # Slurm looks each half minute
    faults = ";".join(f"sleep:step={step}:seconds=5:phase=fwd" for step in range(4, 12))
    (job,) = submit(slurm, tiny, tmp_path, *limits, HEALED, faults=faults)
    run_dir = tmp_path / "run"
    queued_again(slurm, job)
    slurm.run(["scontrol", "update", f"JobId={job}", "TimeLimit=10"], timeout=20).expect(exit_code=0)
    assert "SIGUSR1: the ranks finish their step, save and exit" in output(run_dir, job)
    saved = checkpoint_steps(run_dir)[-1]
    slurm.wait(job, "COMPLETED", LIMIT)
    assert f"resumed {run_dir}/checkpoints/step_{saved:08d}: step {saved}\n" in output(run_dir, job)
    assert_same_run(run_dir, tiny.reference)
