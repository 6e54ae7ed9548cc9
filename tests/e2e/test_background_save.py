"""``checkpoint.async``: the same checkpoints, written beside training; faults in the background come to the front."""

import json
import re
import time
from pathlib import Path

from tests.kit.pieces import names
from tests.kit.tiny import TinyRuns, assert_same_run, checkpoint_steps, every_engine

ASYNC = "--checkpoint.async=true"


@every_engine
def test_the_same_checkpoints(tiny: TinyRuns, tmp_path: Path) -> None:
    """While a save takes a while, training goes on: the copy is what is written. An update waits for the copy."""
    faults = "sleep:op=2:seconds=0.3;sleep:rank=0:step=3:op=3:seconds=4;sleep:rank=1:step=6:phase=copy:seconds=1"
    with tiny.start(tmp_path, ASYNC, faults=faults) as job:
        steps = 0
        while checkpoint_steps(tmp_path / "run") == []:
            assert job.process.poll() is None
            metrics = tmp_path / "run" / "metrics.jsonl"
            steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            time.sleep(0.01)
        assert steps >= 5  # up to the next save, which waits
        job.finish().expect(exit_code=0, stdout=r"saved \S+step_00000012")
    assert checkpoint_steps(tmp_path / "run") == checkpoint_steps(tiny.reference) == [3, 6, 9, 12]
    assert_same_run(tmp_path / "run", tiny.reference)
    for step in (3, 6, 9):
        ours, theirs = (
            json.loads((run / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())["files"]
            for run in (tmp_path / "run", tiny.reference)
        )
        shards = {name: entry for name, entry in ours.items() if name.startswith("shard")}
        assert shards and shards.items() <= theirs.items()


def test_a_full_disk_in_the_background(tiny: TinyRuns, tmp_path: Path) -> None:
    """Every rank ends alike, soon; what was committed before stays, nothing else is left."""
    for rank, step in ((0, 6), (1, 9)):
        failed = tiny.run(tmp_path, ASYNC, faults=f"enospc:rank={rank}:step={step}:op=2", slow=0.1)
        failed.expect(exit_code=7, stderr=rf"disk full: need \S+ \S+, have .* \(rank {rank}\)")
        assert names(tmp_path / "run" / "checkpoints") == ["latest", *(f"step_{s:08d}" for s in range(3, step, 3))]
        done = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert max(line["step"] for line in done) <= step + 2
    tiny.run(tmp_path, ASYNC).expect(exit_code=0)
    assert_same_run(tmp_path / "run", tiny.reference)


def test_killed_and_stopped_meanwhile(tiny: TinyRuns, tmp_path: Path) -> None:
    """Killed on either rank, twice restarted, then asked to stop while a save is under way."""
    faults = "kill:rank=0:step=6:op=5;kill:rank=1:step=6:op=2:attempt=1;term:rank=1:step=6:op=2:attempt=2"
    ended = tiny.run(tmp_path, ASYNC, "--max_restarts=2", faults=faults).expect(exit_code=75)
    assert [line.split(" (")[0] for line in ended.stderr.splitlines() if "was killed by SIGKILL" in line] == [
        "error: rank 0",
        "error: rank 1",
    ]
    assert len(re.findall(r"resumed \S+step_00000003", ended.stdout)) == 2
    tiny.run(tmp_path, ASYNC).expect(exit_code=0)
    assert_same_run(tmp_path / "run", tiny.reference)
