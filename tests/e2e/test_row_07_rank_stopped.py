"""FAULTS row 7: a rank is stopped (SIGSTOP) and does not come back."""

import time
from pathlib import Path

from tests.kit.tiny import TinyRuns, every_engine


@every_engine
def test_it_is_found_named_and_killed_in_time(tiny: TinyRuns, tmp_path: Path) -> None:
    hang_timeout = 4.0
    result = tiny.run(tmp_path, f"--train.hang_timeout={hang_timeout}", faults="stop:rank=1:step=5:phase=bwd")
    ended = time.time()
    result.expect(exit_code=5, stderr=r"error: rank 1 \(\S+, pid \d+\) was stopped \(SIGSTOP\?\) and killed; log: ")
    stopped = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime  # its last line is that of step 4
    assert hang_timeout < ended - stopped < hang_timeout + 5
    stacks = (tmp_path / "run" / "logs" / "rank_0.stacks.txt").read_text()
    assert "train_step" in stacks
