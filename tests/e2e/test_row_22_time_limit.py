"""FAULTS row 22: Slurm announces the end of a job's time; the run saves, the job is queued again and goes on."""

from pathlib import Path

import pytest

from tests.e2e.test_slurm import LIMIT, output, start_again, submit
from tests.kit.cluster import eventually
from tests.kit.slurm import Slurm
from tests.kit.tiny import TinyRuns, assert_same_run, checkpoint_steps


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_run_saves_before_its_time_is_over_and_is_queued_again(
    slurm: Slurm, tiny: TinyRuns, tmp_path: Path
) -> None:
    limits = ("--launch.slurm.time=4", "--launch.slurm.signal_seconds=10")
    (job,) = submit(slurm, tiny, tmp_path, *limits, slow=0.2)
    run_dir = tmp_path / "run"
    eventually(lambda: "step 2 " in output(run_dir, job), f"{job} trains", LIMIT)
    slurm.run(["scontrol", "update", f"JobId={job}", "TimeLimit=1"], timeout=20).expect(exit_code=0)  # now, or in 50 s
    start_again(slurm, job, "TimeLimit=10")
    assert "SIGUSR1: the ranks finish their step, save and exit" in output(run_dir, job)
    saved = checkpoint_steps(run_dir)[-1]
    assert 2 <= saved < 12
    slurm.wait(job, "COMPLETED", LIMIT)
    assert f"resumed from {run_dir}/checkpoints/step_{saved:08d}" in output(run_dir, job)
    assert_same_run(run_dir, tiny.reference)
