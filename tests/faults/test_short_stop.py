"""A rank is stopped and continues before anyone has waited too long."""

import os
import signal
import time
from pathlib import Path

from tests.kit.tiny import TinyRuns, assert_same_run, every_engine


@every_engine
def test_a_short_stop_changes_nothing(tiny: TinyRuns, tmp_path: Path) -> None:
    with tiny.start(tmp_path, slow=0.05) as job:
        job.wait_for("step 3 ")
        pid = job.rank_pid(tmp_path / "run", 1)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)
        job.finish().expect(exit_code=0)
    assert_same_run(tmp_path / "run", tiny.reference)
