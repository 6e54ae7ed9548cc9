"""Why a run ended: turns the ranks' reports into one line and one exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.hosts.hostfile import Host
from launch.hosts.job import Job
from launch.hosts.ssh import SSH_FAILED, also
from launch.watch.hang import explain
from launch.watch.report import MEANING, PEER_LOST, PREEMPTED, USAGE, Report, Reports, last_words, signal_name


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``cause``: the line for the user, empty if there is nothing to explain."""

    exit_code: int
    cause: str = ""
    rank: int | None = None
    host: str | None = None
    step: int | None = None

    @property
    def line(self) -> str:
        """The line to print. A run that was stopped on request is not an error."""
        return f"error: {self.cause}" if self.cause and self.exit_code < PREEMPTED else self.cause

    def as_dict(self) -> dict[str, Any]:
        return {"status": MEANING.get(self.exit_code, "stopped, not saved"), **asdict(self)}


def judge(
    job: Job,
    launcher: str,
    endings: list[tuple[Host | None, int | None]],
    stop_asked: bool,
    unreachable: Collection[Host] = (),
) -> Outcome:
    """Name the first cause, from the reports of all ranks that this launcher watched.

    ``endings``: for each of the launcher's commands, its host (None: all hosts) and exit code (None if it had to be
    killed because ranks did not end). ``unreachable``: hosts that do not answer.

    A rank that was killed or stopped takes precedence over one that failed with an error of its own, and both over
    ranks that merely lost a peer, although those often end first (and torchrun blames them).
    """
    ranks = {place.rank for place in job.watched}
    reports = Reports(job.log_dir, job.attempt, ranks)
    failures = sorted(reports.failures, key=lambda report: (report.unprepared, not report.signal, report.time))
    primary = [report for report in failures if not report.secondary]
    unborn = sorted(ranks - set(reports.started))
    step = last_step(job.run_dir)

    # If every failed rank merely lost a peer, the reason is a host that does not answer, or else a hang that the flight
    # records explain.
    only_lost = failures and not stop_asked and all(report.secondary or report.stopped for report in failures)
    gone = next((host for host, code in endings if host and (host in unreachable or code == SSH_FAILED)), None)
    if only_lost and gone is not None:
        return _of_host(job, gone, launcher, step, reachable=gone not in unreachable)
    if only_lost and (hang := explain(job.log_dir, reports)):
        return Outcome(PEER_LOST, hang.line, hang.rank, hang.host, step)
    if primary:
        return _of_rank(job, primary[0], reports, step)
    if not failures and len(reports.ended) == len(ranks):
        preempted = any(report.exit_code == PREEMPTED for report in reports.ended.values())
        return Outcome(PREEMPTED if preempted else 0, step=step)
    if stop_asked and (unborn or any(report.unprepared for report in failures)):
        return Outcome(PREEMPTED, "stopped before training had begun", step=step)
    for host, code in endings:
        theirs = [place.rank for place in job.watched if place.host == host]
        if code and host and not host.local and any(rank not in reports.ended for rank in theirs):
            outcome = _of_host(job, host, launcher, step, reachable=True)
            silent = {other for other, code in endings if other and code == SSH_FAILED} - {host}
            return replace(outcome, cause=outcome.cause + also(silent))
    if any(code is not None and code < 0 for _, code in endings):
        signum = next(-code for _, code in endings if code is not None and code < 0)
        cause = f"{launcher} was killed by {signal_name(signum)}; its ranks were stopped with it"
        return Outcome(PEER_LOST, cause, step=step)
    if reports.running:
        lost = reports.running[0]
        by_itself = any(code is not None for _, code in endings)
        how = "vanished together with its shim" if by_itself else "did not end when its peers did"
        return Outcome(PEER_LOST, f"{lost} {how}; log: {_log(job, lost)}", lost.rank, lost.host, step)
    if unborn:
        log = launcher_log(job, launcher, None)
        if misused := re.search(r'^(srun: .*)\nTry "srun --help"', _read(log), re.MULTILINE):
            return Outcome(USAGE, f"launch.slurm.srun_extra: {misused[1]}", step=step)
        cause = f"{launcher} ended before rank {unborn[0]} had started: {_refusal(log) or _end_of(log)}"
        return Outcome(PEER_LOST, f"{cause}; log: {log}", step=step)
    return _of_rank(job, failures[0], reports, step)


def launcher_log(job: Job, launcher: str, host: Host | None) -> Path:
    """The log file of the launcher's own messages; for another host, of those from there."""
    return job.log_dir / (f"{launcher}.log" if host is None else f"{launcher}.{host.name}.log")


def _of_host(job: Job, host: Host, launcher: str, step: int | None, *, reachable: bool) -> Outcome:
    """A host was lost: quotes the last message of ssh, or else of the launcher on that host."""
    ranks = [place.rank for place in job.watched if place.host == host]
    said = ""
    logs = [job.log_dir / f"ssh.{host.name}.log", *([launcher_log(job, launcher, host)] if reachable else [])]
    for log in logs:
        said = said or _end_of(log)
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    how = "was lost" if reachable else "cannot be reached any more"
    cause = f"host {host.name} {how}, with {span}" + (f": {said}" if said else "")
    return Outcome(PEER_LOST, cause, ranks[0], host.name, step)


def _refusal(log: Path) -> str:
    """The first ssh error in a log: pdsh continues with the other hosts, whose failures follow from it."""
    return next((line[:500] for line in _read(log).splitlines() if line.startswith("ssh: ")), "")


def _read(log: Path) -> str:
    """The beginning of a log; empty if it cannot be read."""
    try:
        return log.read_bytes()[:65536].decode(errors="replace")
    except OSError:
        return ""


def _end_of(log: Path) -> str:
    try:
        return last_words(log.read_bytes()[-65536:])
    except OSError:
        return ""


def _of_rank(job: Job, first: Report, reports: Reports, step: int | None) -> Outcome:
    on_console = reports.ended[0].message if 0 in reports.ended else ""  # what the user has already seen
    said = f": {first.message}" if first.exit_code and first.message not in ("", on_console) else ""
    cause = f"{first}{said}; log: {_log(job, first)}"
    return Outcome(PEER_LOST if first.signal else first.exit_code or 1, cause, first.rank, first.host, step)


def _log(job: Job, report: Report) -> Path:
    return job.log_dir / f"rank_{report.rank}.log"


def last_step(run_dir: Path) -> int | None:
    """The last step recorded in ``metrics.jsonl``."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # the last line may be incomplete, the first one truncated
            continue
    return None
