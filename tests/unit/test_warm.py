"""A warm start cannot be told from a true one, and is made only where it is one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import warm
from tests.kit.jobs import start_job

PROBE = [sys.executable, "-m", "tests.kit.probe"]
ENDINGS = [
    *(["exit", "0"], ["exit", "75"], ["exit", "300"], ["exit", "a message"], ["raise"], ["thread"]),
    *(["signal", str(int(number))] for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)),
    *(["child", "exit", "5"], ["child", "raise"], ["child", "signal", "15"], ["child", "child", "exit", "0"]),
]


def told(argv: list[str], *, cold: bool, **options) -> list[str]:
    """All that can be seen of a program, its exit code last."""
    env = {**os.environ, "ASKER": str(os.getpid()), **options.pop("env", {})}
    with contextlib.nullcontext() if cold else warm.starts():
        options = {"stdin": subprocess.DEVNULL, "env": env, **options}
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    out, err = process.communicate(timeout=60)
    lines = []
    for line in out.decode().splitlines():
        if line.startswith("{"):
            seen = json.loads(line)
            assert seen.pop("torch is there") != cold
            del seen["env"]["ASKER"]
            lines += [f"{key}: {value}" for key, value in seen.items()]
        else:
            lines.append(line)
    return [*lines, *err.decode().splitlines(), f"exit code {process.returncode}"]


@pytest.mark.parametrize("ending", ENDINGS, ids=" ".join)
def test_nothing_of_a_program_tells_how_it_was_started(ending):
    assert told([*PROBE, *ending], cold=False) == told([*PROBE, *ending], cold=True)


def test_descriptors_that_are_passed_keep_their_numbers() -> None:
    with Path("/dev/null").open() as some, Path("/dev/null").open() as other:
        fds = [some.fileno(), other.fileno()]
        ways = [told([*PROBE, "exit", "0"], cold=cold, pass_fds=fds) for cold in (False, True)]
    assert ways[0] == ways[1]


@pytest.mark.parametrize("cold", [False, True])
def test_it_reads_what_it_is_given(tmp_path: Path, cold: bool) -> None:
    (tmp_path / "text").write_text("a line")
    with (tmp_path / "text").open() as text:
        assert "a line" in told([*PROBE, "read"], cold=cold, stdin=text)


def test_what_it_starts_is_found_by_its_mark_and_dies_alone_or_with_it() -> None:
    with start_job([*PROBE, "child", "sleep"], timeout=30) as job:
        job.wait_for("sleeps")
        parent, child = sorted(job.family(), key=lambda one: one.ppid() != os.getpid())
        assert (parent.pid, child.ppid()) == (job.pid, job.pid)
        assert parent.cmdline()[: len(job.argv)] == job.argv
        child.kill()
        job.finish().expect(exit_code=0, stdout="it ended with -9")
    with start_job([*PROBE, "child", "sleep"], timeout=30) as job:
        job.wait_for("sleeps")
        job.process.kill()
        result = job.finish()
    assert result.exit_code == -signal.SIGKILL
    assert len(result.orphans) == 1 and "tests.kit.probe sleep" in result.orphans[0]


def test_another_interpreter_or_other_code_is_executed(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    with warm.starts():
        for changed in ({"env": {**os.environ, "OMP_NUM_THREADS": "3"}}, {"cwd": tmp_path}):
            shown = subprocess.run([*PROBE, "exit", "0"], capture_output=True, text=True, **changed).stdout
            assert not json.loads(shown.splitlines()[0])["torch is there"]
        with pytest.raises(FileNotFoundError, match="nowhere"):
            subprocess.run([*PROBE, "exit", "0"], cwd=tmp_path / "nowhere")
