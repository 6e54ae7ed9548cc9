"""The supervisor: starts a launcher's commands, watches all ranks to the end, and says why the run ended."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launch import process
from launch.hosts.elastic import Pool, Probe
from launch.hosts.hostfile import Host, UsageError, count
from launch.hosts.job import Command, Job, Launch
from launch.hosts.network import addresses, is_loopback, resolve
from launch.hosts.rendezvous import meet
from launch.hosts.ssh import check_program
from launch.watch.host import BEAT_S
from launch.watch.outcome import Outcome, judge, launcher_log
from launch.watch.rank import END, SAVE
from launch.watch.report import PEER_LOST, PREEMPTED, STORAGE, USAGE, Reports

_POLL_S = 0.1
_ASK_AFTER_S = 1.0  # seconds after the first failure: remaining ranks are asked to stop …
_KILL_AFTER_S = 8.0  # … and killed
_ANSWER_S = 4.0  # for a host to answer, if it may be the cause of a failure
_AGENT_LIMIT_S = 3.0  # for the launcher's processes to end, once every rank has ended
_DEATH_LIMIT_S = 10.0  # for killed processes to disappear
_QUICK_S, _LONGEST_WAIT_S = 60.0, 60.0  # attempts shorter than this double the wait before the next one
_HOSTS_WAIT_S, _HOSTS_RETRY_S = 600.0, 5.0  # for enough hosts to be reachable, or to join by themselves
_SAY_AFTER_S, _SAY_AGAIN_S = 10.0, 60.0  # how often it says which hosts it waits for
_SECOND_SIGNAL_S = 0.5  # `timeout` and some schedulers deliver one signal twice: only a later one is a second request


def supervise(job: Job, launcher: Callable[[Job], Launch], max_restarts: int = 0, pool: Pool | None = None) -> Outcome:
    """Run ``job`` to its end, with up to ``max_restarts`` restarts after a lost peer; write ``RUN/outcome.json``.

    With a ``pool``, each attempt uses the hosts that can be reached, and a run that lost hosts takes them back. The
    first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks every rank to finish its step and save; a second one kills them. In
    any case, no process that was started here is left behind.
    """
    if job.distributed or pool is not None:
        check_program("ssh" if job.slurm is None else "srun")
    try:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        with _exclusive(job.lock) as holder, _cursor_shown(), _signals() as signals:
            if holder:
                return Outcome(USAGE, f"{job.run_dir} is in use by {holder}; choose another --run.name")
            process.adopt_orphans()
            outcome = _Supervisor(launcher, max_restarts, pool, signals).run(job)
    except OSError as error:
        return Outcome(STORAGE, f"{error.filename or job.log_dir}: {error.strerror}")
    try:
        partial = job.run_dir / f"outcome{job.own}.json.tmp"
        partial.write_text(json.dumps(outcome.as_dict(), indent=2) + "\n")
        partial.replace(job.run_dir / f"outcome{job.own}.json")
    except OSError as error:
        say(f"warning: {job.run_dir}/outcome{job.own}.json could not be written: {error.strerror}")
    return outcome


@dataclass(frozen=True)
class _Supervisor:
    """Runs attempts until one ends that needs no restart."""

    launcher: Callable[[Job], Launch]
    max_restarts: int
    pool: Pool | None
    signals: set[signal.Signals]

    def run(self, job: Job) -> Outcome:
        """Restart after a lost peer, or after saving to continue on more hosts; return the last outcome."""
        restarts = quick = 0
        while True:
            if self.pool is not None:
                hosts = self._choose(job, self.pool)
                if isinstance(hosts, Outcome):
                    return hosts
                job = replace(job, hosts=hosts)
            if job.attempt:
                on = f" on {', '.join(host.name for host in job.hosts)}" if self.pool is not None else ""
                start = f"as at first ({job.begin[0]})" if job.begin else "from the last checkpoint"
                say(f"restarting {start}{on}, attempt {job.attempt + 1}")
            if early := self._wait_for_name(job):
                return early
            began = time.monotonic()
            try:
                attempt = _Attempt(job, self.launcher(meet(job)), self.signals, self.pool)
                outcome = attempt.run()
                over, growing = bool(attempt.stop_asked), attempt.growing and outcome.exit_code == PREEMPTED
            except UsageError as error:
                if not job.attempt:
                    raise
                outcome, over, growing = Outcome(PEER_LOST, str(error)), False, False
            if over or not (growing or (outcome.exit_code == PEER_LOST and restarts < self.max_restarts)):
                return outcome
            if not growing:
                restarts += 1
                say(f"{outcome.line}; restart {restarts} of {self.max_restarts}")
                quick = quick + 1 if time.monotonic() - began < _QUICK_S else 0
                if stopped := self._sleep(min(_LONGEST_WAIT_S, 2.0 ** (quick - 1) - 1) if quick else 0.0):
                    return stopped
            job = job.next_attempt()

    def _choose(self, job: Job, pool: Pool) -> tuple[Host, ...] | Outcome:
        """The hosts for the next attempt; waits until enough of them answer."""
        deadline, told = time.monotonic() + _HOSTS_WAIT_S, False
        while True:
            reachable = Probe(pool.hosts, job.ssh).answered()
            if hosts := pool.choose(reachable):
                return hosts
            enough = f"{len(reachable)} of {len(pool.hosts)} hosts can be reached; --nodes wants at least {pool.least}"
            if time.monotonic() > deadline:
                return Outcome(PEER_LOST, enough)
            if not told:
                say(f"waiting: {enough}, the fewest whose ranks divide the batch of the config")
                told = True
            if stopped := self._sleep(_HOSTS_RETRY_S):
                return stopped

    def _wait_for_name(self, job: Job) -> Outcome | None:
        """Wait for the rendezvous name to resolve: a pod's name exists only once the pod does."""
        deadline, told = time.monotonic() + job.rendezvous_wait, False
        while job.rendezvous_wait and job.rendezvous and not resolve(job.rendezvous[0]):
            if time.monotonic() > deadline:
                return Outcome(PEER_LOST, f"{job.rendezvous[0]} did not resolve for {job.rendezvous_wait} s")
            if not told:
                say(f"waiting: {job.rendezvous[0]}, where ranks meet, does not resolve yet")
                told = True
            if stopped := self._sleep(1.0, "before any rank had started"):
                return stopped
        return None

    def _sleep(self, seconds: float, when: str = "between two attempts, after the last checkpoint") -> Outcome | None:
        """Wait; a signal during the wait ends the run."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            received = signal.sigtimedwait(self.signals, left)
            if received and received.si_signo != signal.SIGCHLD:
                name = signal.Signals(received.si_signo).name
                return Outcome(PREEMPTED, f"{name}: stopped {when}")
        return None


class _Attempt:
    """One start of all ranks, until no process of it is left."""

    def __init__(self, job: Job, launch: Launch, signals: set[signal.Signals], pool: Pool | None) -> None:
        self.job, self.launch, self.signals, self.pool = job, launch, signals, pool
        self.ranks = frozenset(place.rank for place in job.watched)
        self.stop_asked = 0.0  # when a signal first asked the run to stop
        self.growing = False  # hosts came back: ranks are asked to save, to restart on more hosts
        self.told: set[int] = set()  # shims that were passed the request
        self.agents: list[subprocess.Popen[bytes]] = []  # one for each of the launch's commands
        self.began = self.beaten = self.probed = time.monotonic()
        self.remind_at = self.began + _SAY_AFTER_S
        self.hosts_wait = max(_HOSTS_WAIT_S, job.rendezvous_wait)
        self.asked_for, self.beats = "", 0
        self.probe: Probe | None = None  # of missing hosts
        self.unreachable: set[Host] = set()
        self.search: Probe | None = None  # of hosts that may be the reason for lost ranks

    def run(self) -> Outcome:
        for stale in self.job.log_dir.glob("rank_*.*.json"):
            if int(stale.name.split("_")[1].split(".")[0]) in self.ranks:
                stale.unlink()
        if self.job.distributed:
            self._ask("")
        for path, text in self.launch.files.items():
            path.touch(mode=0o600)
            path.write_text(text)
        try:
            for command in self.launch.commands:
                self.agents.append(self._start(command))
            outcome = self._watch()
            endings = [agent.poll() for agent in self.agents]
            if outcome is None:
                self._look_for_the_lost()
        finally:
            self._kill_all()
        if outcome:
            return outcome
        ended = [(command.host, code) for command, code in zip(self.launch.commands, endings, strict=True)]
        return judge(self.job, self.launch.name, ended, bool(self.stop_asked), self.unreachable)

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        remote = command.stdin is not None
        name = launcher_log(self.job, self.launch.name, command.host if remote else None)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(command.without)}
        first = command.host is None or command.host == self.job.hosts[0]  # the host of rank 0
        with name.open("ab" if self.job.attempt else "wb") as log:
            agent = process.start(
                command.argv,
                unblock=self.signals,
                stdin=subprocess.PIPE if remote else sys.stderr.fileno() if command.console else subprocess.DEVNULL,
                stdout=None if first else log,
                stderr=None if first and remote else log,
                env={**kept, **command.env},
                start_new_session=True,  # so that Ctrl-C reaches this process only
            )
        if agent.stdin is not None:
            assert command.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # _watch notices that it has ended
                agent.stdin.write(command.stdin.encode())
                agent.stdin.flush()
            os.set_blocking(agent.stdin.fileno(), False)
        return agent

    def _watch(self) -> Outcome | None:
        """Watch until the launcher's commands have ended or must be ended; returns the outcome if a signal decided
        it."""
        failed_at = ended_at = 0.0
        while any(agent.poll() is None for agent in self.agents):
            received = signal.sigtimedwait(self.signals, _POLL_S)
            reports, now = self._reports(), time.monotonic()
            self._beat(now)
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
            if self._waited_too_long(reports, now):
                return Outcome(PEER_LOST, f"waited {self.hosts_wait:g} s for {self._missing()}")
            failed_at = failed_at or (now if reports.failures or self._host_lost(reports) else 0.0)
            if self._all_unreachable(reports, failed=bool(failed_at)):
                break
            ended_at = ended_at or (now if len(reports.ended) == len(self.ranks) else 0.0)
            self._look_for_hosts(reports, now)
            if self.stop_asked or self.growing or (failed_at and now - failed_at > _ASK_AFTER_S):
                self._tell({report.shim for report in reports.running})
            if (failed_at and now - failed_at > _KILL_AFTER_S) or (ended_at and now - ended_at > _AGENT_LIMIT_S):
                break
        return None

    def _waited_too_long(self, reports: Reports, now: float) -> bool:
        """Whether hosts that start their own ranks have failed to join in time; reports now and then who is missing."""
        if self.job.node is None or len(self.job.hosts) == 1 or now < self.remind_at or reports.started:
            return False
        if now - self.began > self.hosts_wait:
            return True
        say(f"waiting for {self._missing()}")
        self.remind_at = min(now + _SAY_AGAIN_S, self.began + self.hosts_wait)
        return False

    def _missing(self) -> str:
        """Which hosts this one waits for, in words: those without a held lock, if the run folder is shared."""
        assert self.job.rendezvous is not None
        address, port = self.job.rendezvous
        others = [node for node in range(len(self.job.hosts)) if node != self.job.node]
        absent = [str(node) for node in others if not held(replace(self.job, node=node).lock)]
        line = f"{count(len(absent or others), 'other host')} at {address}:{port}"
        if absent:
            some = f"{', '.join(absent[:8])}{', …' * (len(absent) > 8)}"
            line += f"; {self.job.log_dir} has no launcher of --node_rank={some}"
        found = resolve(address)
        if any(map(is_loopback, found)):
            line += f"; {address} is a loopback address: on each host it means that host"
        elif self.job.node == 0 and set(found).isdisjoint(itertools.chain(*addresses().values())):
            line += f"; {address} is no address of this host, where ranks are to meet"
        return line

    def _all_unreachable(self, reports: Reports, *, failed: bool) -> bool:
        """Whether all remaining ranks are on hosts that ssh can no longer reach.

        Hosts are probed as soon as a rank reports a hang, shortly before its collective fails.
        """
        if not self.job.distributed or not (failed or reports.hung):
            self.search = None  # the hang resolved itself
            return False
        if self.search is None:
            self.search = Probe(self.job.hosts, self.job.ssh, _ANSWER_S)
        if not failed or not self.search.done:
            return False
        self._look_for_the_lost()
        return bool(self.unreachable) and all(
            place.host in self.unreachable for place in self.job.watched if place.rank not in reports.ended
        )

    def _look_for_the_lost(self) -> None:
        """If hosts were probed, wait for the result and note those that do not answer."""
        if self.search is not None:
            self.unreachable = set(self.job.hosts) - set(self.search.answered())

    def _reports(self) -> Reports:
        return Reports(self.job.log_dir, self.job.attempt, self.ranks)

    def _beat(self, now: float) -> None:
        """Send a sign of life to other hosts each second; without it they end what runs there."""
        if now - self.beaten < BEAT_S:
            return
        self.beaten, self.beats = now, self.beats + 1
        if self.job.distributed:
            with contextlib.suppress(OSError):
                self._ask(self.asked_for)
        for agent in self.agents:
            if agent.stdin is not None:
                with contextlib.suppress(OSError):  # it has ended, or the pipe is full
                    os.write(agent.stdin.fileno(), b"\n")

    def _host_lost(self, reports: Reports) -> bool:
        """Whether a host's command has ended before all of that host's ranks have."""
        gone = {c.host for c, agent in zip(self.launch.commands, self.agents, strict=True) if agent.poll() is not None}
        return any(place.host in gone and place.rank not in reports.ended for place in self.job.watched)

    def _look_for_hosts(self, reports: Reports, now: float) -> None:
        """While hosts of the pool are missing, probe them now and then; if they are back, ask the run to save."""
        if self.pool is None or self.growing or len(self.job.hosts) == self.pool.most:
            return
        if self.probe is None:
            if now - self.probed > self.pool.interval and len(reports.running) == len(self.ranks):
                self.probe = Probe([host for host in self.pool.hosts if host not in self.job.hosts], self.job.ssh)
        elif self.probe.done:
            more = self.pool.choose([*self.job.hosts, *self.probe.answered()])
            self.probe, self.probed = None, now
            if sum(host.slots for host in more) > self.job.size:
                back = ", ".join(host.name for host in more if host not in self.job.hosts)
                say(f"{back} can be reached again: saving, to go on with more ranks")
                self.growing = True

    def _tell(self, shims: set[int]) -> None:
        """Ask ranks to stop: by signal where they are below this process, by the control file everywhere else."""
        if new := shims - self.told:
            if self.job.distributed:
                self._ask(SAVE)
            for pid in new.intersection(process.descendants()):  # the pid of a dead shim may have been reused
                process.send(pid, signal.SIGTERM)
            self.told |= new

    def _ask(self, request: str) -> None:
        # Written in place with a fixed size: works on a full disk, and other hosts see it when they open the file.
        self.asked_for = request
        with self.job.control.open("r+" if self.job.control.exists() else "w") as file:
            file.write(f"{request} {self.job.attempt} {self.beats}".ljust(63) + "\n")

    def _kill_all(self) -> None:
        """Kill every descendant of this process; other hosts do the same when their lifeline ends."""
        if self.job.distributed:
            with contextlib.suppress(OSError):
                self._ask(END)
        elsewhere = []  # processes that first end their ranks on reachable hosts, and then themselves
        for command, agent in zip(self.launch.commands, self.agents, strict=False):
            if command.host is None or (agent.stdin is not None and command.host not in self.unreachable):
                elsewhere.append(agent)
            if agent.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    agent.stdin.close()
            elif command.stop is not None:
                agent.send_signal(command.stop)
        deadline = time.monotonic() + (_AGENT_LIMIT_S if self.job.distributed else 0)
        while any(agent.poll() is None for agent in elsewhere) and time.monotonic() < deadline:
            signal.sigtimedwait({signal.SIGCHLD}, _POLL_S)
        if left := process.kill_all(self.agents, _DEATH_LIMIT_S):
            say(f"warning: the kernel does not end {left} (waiting for a device or a file server?)")


def say(line: str) -> None:
    """Print one line from the launcher on stderr."""
    with contextlib.suppress(OSError):  # stderr is closed: no reason to change how the run ends
        print(line, file=sys.stderr, flush=True)


def describe(launch: Launch) -> str:
    """The launch as shell-like text for reading: variables, command, files. It is never run through a shell."""
    lines = []
    for command in launch.commands:
        if len(launch.commands) > 1 and command.host is not None:
            lines.append(f"# {command.host.name}")
        lines += [f"{name}={shlex.quote(value)} \\" for name, value in sorted(command.env.items())]
        lines.append(" ".join(map(shlex.quote, command.argv)))
        if command.stdin is not None:
            lines.append(f"# on its stdin: {command.stdin.rstrip()}")
    for path, text in launch.files.items():
        lines += [f"# file {shlex.quote(str(path))}:", text.rstrip()]
    return "\n".join(lines)


@contextlib.contextmanager
def _signals() -> Iterator[set[signal.Signals]]:
    """Block the signals that this module waits for, so that none is lost; signals ignored by nohup stay ignored."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, the kernel keeps no exit codes
    wanted = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    watched = {s for s in wanted if signal.getsignal(s) != signal.SIG_IGN} | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        yield watched
    finally:
        while signal.sigtimedwait(watched, 0):  # discard signals that came too late
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[str]:
    """Lock ``path`` for this launcher; yields who else holds it, or an empty string. A dead launcher holds no lock."""
    with path.open("a+") as file:
        for wait in (0.1, 0.3, 0.6, 0.0):  # ``held`` takes the lock for a moment
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(wait)
        else:
            file.seek(0)
            yield file.read().strip() or "another launcher"
            return
        file.truncate(0)
        print(f"a launcher (pid {os.getpid()} on {socket.gethostname()})", file=file, flush=True)
        yield ""


def held(path: Path) -> bool:
    """Whether a launcher holds the lock ``path``."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def _cursor_shown() -> Iterator[None]:
    """Show the terminal's cursor again: a rank killed during a progress line leaves it hidden."""
    try:
        yield
    finally:
        if sys.stdout.isatty():
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), b"\x1b[?25h")
