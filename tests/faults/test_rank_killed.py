"""A rank is killed in the middle of a step."""

import json
import time
from pathlib import Path

from tests.kit.tiny import TinyRuns, assert_same_run, every_engine


@every_engine
def test_the_job_ends_at_once_and_names_the_rank(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, faults="kill:rank=1:step=7:phase=bwd")
    ended = time.time()
    result.expect(
        exit_code=5, stderr=r"error: rank 1 \(\S+, pid \d+\) was killed by SIGKILL \(out of memory\?\); log: "
    )
    killed = json.loads((tmp_path / "run" / "logs" / "rank_1.exit.json").read_text())["time"]
    assert ended - killed < 5
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["rank"], outcome["step"]) == (5, 1, 6)


@every_engine
def test_restarts_end_like_a_run_that_nothing_happened_to(tiny: TinyRuns, tmp_path: Path) -> None:
    deaths = [(1, 5, "fwd"), (0, 7, "bwd"), (1, 8, "optim")] if tiny.thorough else [(1, 5, "optim")]
    faults = ";".join(f"kill:rank={r}:step={s}:phase={phase}:attempt={i}" for i, (r, s, phase) in enumerate(deaths))
    result = tiny.run(tmp_path, f"--max_restarts={len(deaths)}", faults=faults).expect(exit_code=0)
    named = [line.split(" (")[0] for line in result.stderr.splitlines() if "was killed by SIGKILL" in line]
    assert named == [f"error: rank {rank}" for rank, _, _ in deaths]
    assert_same_run(tmp_path / "run", tiny.reference)
