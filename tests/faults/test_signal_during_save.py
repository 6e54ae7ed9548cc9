"""The run is asked to stop while it saves."""

import os
import signal
import time
from pathlib import Path

from tests.kit.pieces import names
from tests.kit.tiny import TinyRuns, assert_same_run, checkpoint_steps


def test_the_save_is_finished(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, faults="term:rank=0:step=3:op=4").expect(exit_code=75)
    steps = checkpoint_steps(tmp_path / "run")
    assert steps[0] == 3
    assert f"saved {tmp_path / 'run' / 'checkpoints' / 'step_00000003'}" in result.stdout
    assert not [name for name in names(tmp_path / "run" / "checkpoints") if "tmp" in name]
    tiny.run(tmp_path).expect(exit_code=0)
    assert_same_run(tmp_path / "run", tiny.reference)


def test_a_second_signal_ends_it_and_leaves_only_what_a_restart_removes(tiny: TinyRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with tiny.start(tmp_path, faults="sleep:rank=0:step=6:op=4:seconds=30") as job:
        while not list(folder.glob("step_00000006.tmp-*/*.safetensors")):
            assert job.process.poll() is None
            time.sleep(0.02)
        for _ in range(2):
            os.kill(job.rank_pid(tmp_path / "run", 0), signal.SIGTERM)
            time.sleep(0.8)  # what comes sooner may be the same wish
        job.finish().expect(exit_code=128 + signal.SIGTERM)
    assert checkpoint_steps(tmp_path / "run") == [3]
    tiny.run(tmp_path).expect(exit_code=0)
    assert_same_run(tmp_path / "run", tiny.reference)
