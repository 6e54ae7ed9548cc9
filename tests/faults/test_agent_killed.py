"""Torchrun's agent, or the launcher itself, is killed; and the locks on the run folder."""

import os
import signal
import time
from pathlib import Path

from tests.kit.jobs import PYTHON, run_job
from tests.kit.tiny import TinyRuns, assert_same_run, every_engine


@every_engine
def test_no_rank_survives_and_the_run_can_go_on(tiny: TinyRuns, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with tiny.start(tmp_path, slow=0.5, cold=True) as job:  # there is time for two commands before the next save
        job.wait_for("step 4 ")

        tiny.run(tmp_path).expect(exit_code=2, stderr=rf"{run_dir} is in use by a launcher \(pid {job.pid} on ")
        by_hand = [PYTHON, "-m", "megatron_lite", "train", str(tmp_path / "tiny.yaml"), "--parallel.tp=1"]
        held = rf"error: {run_dir} is in use by pid {job.rank_pid(run_dir, 0)} on "
        run_job(by_hand, timeout=30).expect(exit_code=2, stderr=held)

        began = time.monotonic()
        os.kill(job.agent_pid(), signal.SIGKILL)
        job.finish().expect(exit_code=5, stderr="error: torchrun was killed by SIGKILL; its ranks were stopped with it")
        assert time.monotonic() - began < 10

    if tiny.thorough:
        with tiny.start(tmp_path, slow=0.3) as job:
            job.wait_for("step 7 ")
            job.process.kill()
            job.wait_gone(10)

    tiny.run(tmp_path).expect(exit_code=0)
    assert_same_run(run_dir, tiny.reference)
