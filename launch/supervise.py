"""Starts what a launcher's command describes, ends it when it has to end, and says why it ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch import process
from launch.job import Job, Launch
from launch.outcome import Outcome, judge
from launch.report import PEER_LOST, PREEMPTED, Reports

_USAGE, _STORAGE = 2, 7
_POLL_S = 0.1
_ASK_AFTER_S = 1.0  # after the first failure, ranks that have not noticed are asked to stop …
_KILL_AFTER_S = 8.0  # … and at last killed
_AGENT_LIMIT_S = 3.0  # for torchrun's own end, once every rank has ended
_DEATH_LIMIT_S = 10.0  # for the kernel to end what was killed
_SECOND_SIGNAL_S = 0.5  # `timeout` and some schedulers deliver one signal twice: only a later one is a second wish


def supervise(job: Job, command: Callable[[Job], Launch], max_restarts: int = 0) -> Outcome:
    """Run ``job`` to its end, again after a lost peer up to ``max_restarts`` times; write ``RUN/outcome.json``.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks every rank to finish its step and save; a second one kills them.
    However it ends, no process that was started here is left.
    """
    try:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(job.log_dir / "launcher.lock") as holder, _cursor_shown(), _signals() as signals:
            if holder:
                return Outcome(_USAGE, f"{job.run_dir} is in use by {holder}; choose another --run.name")
            process.adopt_orphans()
            outcome = _run_attempts(job, command, max_restarts, signals)
    except OSError as error:
        return Outcome(_STORAGE, f"{error.filename or job.log_dir}: {error.strerror}")
    try:
        partial = job.run_dir / "outcome.json.tmp"
        partial.write_text(json.dumps(outcome.as_dict(), indent=2) + "\n")
        partial.replace(job.run_dir / "outcome.json")
    except OSError as error:
        say(f"warning: {job.run_dir}/outcome.json could not be written: {error.strerror}")
    return outcome


def _run_attempts(
    job: Job, command: Callable[[Job], Launch], max_restarts: int, signals: set[signal.Signals]
) -> Outcome:
    while True:
        attempt = _Attempt(job, command(job), signals)
        outcome = attempt.run()
        if outcome.exit_code != PEER_LOST or attempt.stop_asked or job.attempt == max_restarts:
            return outcome
        job = job.next_attempt()
        say(outcome.line)
        say(f"restarting from the last checkpoint, {job.attempt} of {max_restarts}")


class _Attempt:
    """One start of all ranks, from nothing to no process left."""

    def __init__(self, job: Job, launch: Launch, signals: set[signal.Signals]) -> None:
        self.job, self.launch, self.signals = job, launch, signals
        self.stop_asked = 0.0  # when a signal first asked the run to stop
        self.told: set[int] = set()  # shims that were passed the wish

    def run(self) -> Outcome:
        for stale in self.job.log_dir.glob("rank_*.*.json"):
            stale.unlink()
        for path, text in self.launch.files.items():
            path.write_text(text)
        with (self.job.log_dir / f"{self.launch.name}.log").open("ab" if self.job.attempt else "wb") as log:
            self.agent = process.start(
                self.launch.argv,
                unblock=self.signals,
                stdin=sys.stderr.fileno(),  # see launch/torchrun.py
                stderr=log,
                env={**os.environ, **self.launch.env},
                start_new_session=True,  # Ctrl-C reaches this process only
            )
        try:
            outcome = self._watch()
            returncode = self.agent.poll()
        finally:
            self._kill_all()
        return outcome or judge(self.job, self.launch.name, returncode, bool(self.stop_asked))

    def _watch(self) -> Outcome | None:
        """Until the launcher's command has ended, or has to be ended; the outcome, if a signal decided it."""
        failed_at = ended_at = 0.0
        while self.agent.poll() is None:
            received = signal.sigtimedwait(self.signals, _POLL_S)
            reports, now = Reports(self.job.log_dir, self.job.attempt), time.monotonic()
            if received and received.si_signo != signal.SIGCHLD:
                name = signal.Signals(received.si_signo).name
                if not reports.started:
                    return Outcome(PREEMPTED, f"{name}: stopped before any rank had started")
                if not self.stop_asked:
                    self.stop_asked = now
                    again = "Ctrl-C again" if name == "SIGINT" else "another signal"
                    say(f"{name}: the ranks finish their step, save and exit; {again} ends them at once")
                elif now - self.stop_asked > _SECOND_SIGNAL_S:
                    return Outcome(128 + received.si_signo, f"{name} again: ended at once, without saving")
            failed_at = failed_at or (now if reports.failures else 0.0)
            ended_at = ended_at or (now if len(reports.ended) == self.job.nproc else 0.0)
            if self.stop_asked or (failed_at and now - failed_at > _ASK_AFTER_S):
                self._tell({report.shim for report in reports.running})
            if (failed_at and now - failed_at > _KILL_AFTER_S) or (ended_at and now - ended_at > _AGENT_LIMIT_S):
                break
        return None

    def _tell(self, shims: set[int]) -> None:
        if new := shims - self.told:
            for pid in new.intersection(process.descendants()):  # a pid from a dead shim's report may be a stranger's
                process.send(pid, signal.SIGTERM)
            self.told |= new

    def _kill_all(self) -> None:
        """Kill everything below this process, again until nothing is left: orphans are adopted, and come up next."""
        deadline = time.monotonic() + _DEATH_LIMIT_S
        while (pids := process.descendants()) and time.monotonic() < deadline:
            for pid in pids:
                process.send(pid, signal.SIGKILL)
            signal.sigtimedwait({signal.SIGCHLD}, _POLL_S)
            self.agent.poll()
            process.reap(except_pid=self.agent.pid)
        self.agent.poll()
        process.reap(except_pid=self.agent.pid)
        if pids:
            say(f"warning: the kernel does not end {pids} (waiting for a device or a file server?)")


def say(line: str) -> None:
    """One plain line from the launcher, on stderr."""
    with contextlib.suppress(OSError):  # nobody listens any more: not a reason to end differently
        print(line, file=sys.stderr, flush=True)


def describe(launch: Launch) -> str:
    """The launch as shell text, for reading: variables, command, files. Nothing is ever run through a shell."""
    lines = [f"{name}={shlex.quote(value)} \\" for name, value in sorted(launch.env.items())]
    lines.append(" ".join(map(shlex.quote, launch.argv)))
    for path, text in launch.files.items():
        lines += [f"# file {shlex.quote(str(path))}:", text.rstrip()]
    return "\n".join(lines)


@contextlib.contextmanager
def _signals() -> Iterator[set[signal.Signals]]:
    """Hold back the signals this module waits for, so that none is lost between two looks; nohup's stay ignored."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, the kernel keeps no exit codes
    wanted = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    watched = {s for s in wanted if signal.getsignal(s) != signal.SIG_IGN} | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        yield watched
    finally:
        while signal.sigtimedwait(watched, 0):  # what came too late has nothing to stop any more
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[str]:
    """Hold ``path`` for this launcher; yields who else holds it. The kernel lets go of a dead launcher's."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read().strip() or "another launcher"
            return
        file.truncate(0)
        print(f"a launcher (pid {os.getpid()} on {socket.gethostname()})", file=file, flush=True)
        yield ""


@contextlib.contextmanager
def _cursor_shown() -> Iterator[None]:
    """A rank that is killed in the middle of a progress line leaves the terminal's cursor hidden: show it again."""
    try:
        yield
    finally:
        if sys.stdout.isatty():
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), b"\x1b[?25h")
