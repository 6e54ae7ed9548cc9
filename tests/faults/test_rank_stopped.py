"""A rank is stopped (SIGSTOP), or stuck in its own code, and does not come back."""

import json
import re
import time
from pathlib import Path

from tests.kit.tiny import TinyRuns, every_engine


@every_engine
def test_it_is_found_named_and_killed_in_time(tiny: TinyRuns, tmp_path: Path) -> None:
    hang_timeout = 4.0
    result = tiny.run(tmp_path, f"--train.hang_timeout={hang_timeout}", faults="stop:rank=1:step=5:phase=bwd")
    ended = time.time()
    result.expect(
        exit_code=5,
        stderr=r"error: rank 1 \(\S+, pid \d+\) was stopped \(SIGSTOP\?\) and killed: it has not entered \w+ #\d+ "
        r"\(group \w+, .*step 5\); rank 0 has waited for it for [4-6] s; stacks: ",
    )
    stopped = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime  # its last line is that of step 4
    assert hang_timeout < ended - stopped < hang_timeout + 12  # of a busy machine
    stacks = (tmp_path / "run" / "logs" / "rank_0.stacks.txt").read_text()
    assert "train_step" in stacks


@every_engine
def test_a_rank_stuck_in_its_own_code_is_named_with_the_line(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, "--train.hang_timeout=3", faults="sleep:rank=1:step=5:phase=bwd:seconds=60")
    result.expect(
        exit_code=5,
        stderr=r"error: rank 1 \(\S+, pid \d+\) hangs in megatron_lite/training/faults.py:\d+ \(_strike\)",
    )
    logs = tmp_path / "run" / "logs"
    stacks = re.findall(r"stacks: (\S+)", result.stderr)
    assert stacks == [str(logs / "rank_1.stacks.txt")]
    assert "_strike" in Path(stacks[0]).read_text()
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["rank"], outcome["step"]) == (5, 1, 4)
    if tiny.parallel.get("tp", 1) > 1:
        assert "(group tp, loss backward, " in outcome["cause"]
