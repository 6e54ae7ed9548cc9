"""The run is asked to stop, and is started again later."""

import os
import signal
from pathlib import Path

from tests.kit.jobs import RunningJob
from tests.kit.tiny import TinyRuns, assert_same_run, checkpoint_steps, every_engine


@every_engine
def test_whoever_is_asked_all_ranks_save_the_same_step(tiny: TinyRuns, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def asked(job: RunningJob) -> list[int]:
        return [job.pid, job.agent_pid(), job.rank_pid(run_dir, 1)]

    requests = [(1, signal.SIGTERM, 0), (4, signal.SIGTERM, 1), (7, signal.SIGUSR1, 2)]
    for step, signum, target in requests if tiny.thorough else requests[-1:]:
        with tiny.start(tmp_path, slow=0.2) as job:
            job.wait_for(f"step {step} ")
            os.kill(asked(job)[target], signum)
            job.finish().expect(exit_code=75)
        assert step <= checkpoint_steps(run_dir)[-1] <= step + 2

    tiny.run(tmp_path).expect(exit_code=0)
    assert_same_run(run_dir, tiny.reference)
