"""Real launches for tests: bounded in time, watched from outside, and never leaving a process behind.

result = run_job([sys.executable, "-m", "launch", "run", str(config), "--nproc=2"], timeout=60)
result.expect(exit_code=0)

with start_job(argv, timeout=60) as job:
    job.wait_for("step 3")
    os.kill(job.rank_pid(run_dir, 1), signal.SIGKILL)
    job.finish().expect(exit_code=5, stderr="rank 1")

Programs of ours start without their imports (``tests/kit/warm.py``), unless they are to be ``cold``; with
``loaded`` modules there, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.kit import warm
from tests.kit.warm import MARK, REPOSITORY

PYTHON = sys.executable


@dataclass(frozen=True)
class Result:
    """What a job left: its exit code, its output, how long it took, and processes that outlived it (killed by now).

    ``seconds`` since its start, or what ``strike`` or ``wait_for_end_of`` last saw; ``busy``: seconds of a core's time.
    """

    argv: list[str]
    exit_code: int | None  # None: it ran past its time
    stdout: str
    stderr: str
    seconds: float
    orphans: list[str] = field(default_factory=list)
    busy: float = 0.0

    def expect(
        self,
        exit_code: int,
        *,
        stderr: str = "",
        stdout: str = "",
        within: float | None = None,
        busy: float | None = None,
        traceback: bool = False,
    ) -> Result:
        """Assert on the exit code, on regular expressions found in the output, on time, and on a clean end.

        How long a program takes to start depends on what else runs: ``within`` is for what a job waits for.
        """
        told = f"\n$ {' '.join(self.argv)}\nexit {self.exit_code} after {self.seconds:.1f} s"
        told += f"\n--- stdout\n{self.stdout[-6000:]}\n--- stderr\n{self.stderr[-6000:]}"
        assert self.exit_code is not None, f"ran past its time{told}"
        assert self.exit_code == exit_code, f"exit code {self.exit_code}, wanted {exit_code}{told}"
        assert re.search(stderr, self.stderr), f"stderr lacks {stderr!r}{told}"
        assert re.search(stdout, self.stdout), f"stdout lacks {stdout!r}{told}"
        assert within is None or self.seconds <= within, f"took {self.seconds:.1f} s, wanted {within:g} s{told}"
        assert busy is None or self.busy <= busy, f"kept a core busy for {self.busy:.2f} s, wanted {busy:g} s{told}"
        assert traceback or "Traceback (most recent call last)" not in self.stderr, f"a traceback{told}"
        assert not self.orphans, f"left behind: {self.orphans}{told}"
        return self


def heed_signals() -> None:
    """Have this process end by Ctrl-C and hangup again, which nohup and a shell's background jobs leave ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class RunningJob:
    """A started job; everything it starts carries a mark in its environment."""

    def __init__(
        self,
        argv: Sequence[str],
        timeout: float,
        env: Mapping[str, str | None],
        cwd: Path,
        folder: Path,
        cold: bool,
        loaded: Sequence[str],
    ) -> None:
        self.argv, self.mark = list(argv), uuid.uuid4().hex
        self._busy = _children_busy()
        self.began = time.monotonic()
        self.deadline = self.began + timeout
        merged = {**os.environ, **env, MARK: self.mark}
        self.output = [folder / "stdout", folder / "stderr"]
        started = contextlib.nullcontext() if cold else warm.starts(*loaded)
        with self.output[0].open("wb") as out, self.output[1].open("wb") as err, started:
            self.process = psutil.Popen(
                self.argv,
                cwd=cwd,
                env={name: value for name, value in merged.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=heed_signals,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self.output[0].read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.output[1].read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until the regular expression is found in the output; fails when the job ends or its time is over."""
        while True:
            ended = self.process.poll() is not None
            for text in (self.stdout, self.stderr):
                if found := re.search(pattern, text):
                    return found
            problem = "the job ended" if ended else "time is over" if time.monotonic() > self.deadline else ""
            assert not problem, f"waiting for {pattern!r}: {problem}\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"
            time.sleep(0.02)

    def rank_pid(self, run_dir: Path, rank: int) -> int:
        """The process id of the program that runs as ``rank``, waiting until it has started."""
        path = run_dir / "logs" / f"rank_{rank}.start.json"
        while True:
            with contextlib.suppress(FileNotFoundError, ValueError):
                pid = json.loads(path.read_text())["pid"]
                if psutil.pid_exists(pid):
                    return pid
            problem = "the job ended" if self.process.poll() is not None else ""
            problem = "time is over" if time.monotonic() > self.deadline else problem
            assert not problem, f"waiting for rank {rank} to start: {problem}\n{self.stderr[-3000:]}"
            time.sleep(0.02)

    def strike(self, pid: int, signum: int) -> None:
        """Send a signal to a process of the job; its time counts from here."""
        self.began = time.monotonic()
        os.kill(pid, signum)

    def wait_for_end_of(self, run_dir: Path, rank: int) -> None:
        """Wait until ``rank`` has ended; the job's time counts from there."""
        while not (run_dir / "logs" / f"rank_{rank}.exit.json").exists() and self.process.poll() is None:
            assert time.monotonic() < self.deadline, f"rank {rank} does not end\n{self.stderr[-3000:]}"
            time.sleep(0.02)
        self.began = time.monotonic()

    def agent_pid(self) -> int:
        """The process id of torchrun's agent, the launcher's only child."""
        children = self.process.children()
        assert len(children) == 1, children
        return children[0].pid

    def family(self) -> list[psutil.Process]:
        """Every living process that this job started, itself included."""
        return marked(self.mark)

    def wait_gone(self, seconds: float) -> float:
        """Wait until no process of the job is left; returns how long that took, fails after ``seconds``."""
        began = time.monotonic()
        while left := self.family():
            self.process.poll()
            assert time.monotonic() - began < seconds, f"still there after {seconds:g} s: {left}"
            time.sleep(0.05)
        return time.monotonic() - began

    def finish(self, grace: float = 0.0) -> Result:
        """Wait for the end (at most until the job's time is over) and look for what it left behind, of which helpers
        that are not ours may take ``grace`` seconds to follow it."""
        with contextlib.suppress(psutil.TimeoutExpired):
            self.process.wait(max(0.0, self.deadline - time.monotonic()))
        seconds, exit_code = time.monotonic() - self.began, self.process.poll()
        busy = _children_busy() - self._busy
        if exit_code is not None and grace:
            self.wait_gone(grace)
        orphans = self.kill() if exit_code is not None else []
        return Result(self.argv, exit_code, self.stdout, self.stderr, seconds, orphans, busy)

    def kill(self) -> list[str]:
        """Kill everything the job started; returns what that was."""
        return kill_marked(self.mark)


def _children_busy() -> float:
    """What this process's children that have ended, and those that they waited for, used of the cores' time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def marked(mark: str) -> list[psutil.Process]:
    """Every living process with this mark in its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_marked(mark: str) -> list[str]:
    """Kill every process with this mark; returns what they were."""
    killed = []
    while left := marked(mark):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                killed.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)
    return killed


@contextlib.contextmanager
def start_job(
    argv: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str | None] | None = None,
    cwd: Path = REPOSITORY,
    cold: bool = False,
    loaded: Sequence[str] = (),
) -> Iterator[RunningJob]:
    """Start ``argv`` in ``cwd`` with ``env`` added (``None`` removes a variable); all of it is dead after the block."""
    with tempfile.TemporaryDirectory() as folder:
        job = RunningJob(argv, timeout, env or {}, cwd, Path(folder), cold, loaded)
        try:
            yield job
        finally:
            job.kill()


def run_job(
    argv: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str | None] | None = None,
    cwd: Path = REPOSITORY,
    cold: bool = False,
    loaded: Sequence[str] = (),
) -> Result:
    """Run ``argv`` to its end, or kill it and all it started after ``timeout`` seconds."""
    with start_job(argv, timeout=timeout, env=env, cwd=cwd, cold=cold, loaded=loaded) as job:
        return job.finish()
