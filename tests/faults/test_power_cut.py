"""Everything dies at once, as in a power cut; what was committed is on the disk."""

import os
import signal
from pathlib import Path

from tests.kit.pieces import OperationLog, commit, ready
from tests.kit.tiny import TinyRuns, assert_same_run


def test_a_cold_restart_ends_like_a_run_that_nothing_happened_to(tiny: TinyRuns, tmp_path: Path) -> None:
    with tiny.start(tmp_path, slow=0.1) as job:
        job.wait_for("step 7 ")
        family = job.family()
        assert len(family) >= 4  # launcher, agent, two ranks
        for process in family:
            os.kill(process.pid, signal.SIGKILL)
        job.wait_gone(5)
    tiny.run(tmp_path).expect(exit_code=0, stdout=r"resumed \S+step_00000006")
    assert_same_run(tmp_path / "run", tiny.reference)


def test_every_name_is_durable_before_anything_points_at_it(tmp_path: Path) -> None:
    log = OperationLog()
    folder = ready(tmp_path / "checkpoints", 1)
    commit(folder, 2, faults=log)
    steps = [(verb, rest) for verb, _, rest in (name.partition(" ") for name in log.names)]

    def at(verb: str, start: str) -> int:
        return next(i for i, (v, rest) in enumerate(steps) if v == verb and rest.startswith(start))

    last_file = max(
        i for i, (verb, rest) in enumerate(steps) if verb == "fsync" and rest.endswith((".safetensors", "json"))
    )
    rename = at("rename", "step_00000002.tmp-")
    assert at("fsync", "manifest.json") == last_file  # everything else is synced before the manifest vouches for it
    assert last_file < at("fsync", "step_00000002.tmp-") < rename
    parent = next(i for i, (v, r) in enumerate(steps) if i > rename and (v, r) == ("fsync", "checkpoints/"))
    pointer = at("replace", "latest")
    assert rename < parent < at("fsync", ".latest") < pointer
    assert steps[-1] == ("fsync", "checkpoints/")
    written = {rest for verb, rest in steps if verb == "write"}
    assert written == {rest for verb, rest in steps if verb == "fsync" and not rest.endswith("/")}
