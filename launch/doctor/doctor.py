"""Examines hosts before a run: asks all of them at once, lets them connect to each other, and reports.

Every question has a time limit. ``launch/doctor/checks.py`` judges the answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch import process
from launch.doctor.checks import CHECKS, examine
from launch.doctor.contacts import Contacts, progress
from launch.doctor.examination import Examination, Finding
from launch.doctor.facts import MARKER, Facts, Peer, new_secret
from launch.hosts.hostfile import UsageError
from launch.hosts.job import Job
from launch.hosts.network import VARIABLES
from launch.launchers import torchrun
from launch.watch.report import last_words
from launch.watch.supervise import say, supervise

_CALL_S = 5.0  # for a TCP connection between hosts
_MESH = 16  # up to this many hosts, each calls every other; beyond it, only the first host and its neighbours
_GRACE_S = 10.0


@dataclass(frozen=True)
class Wanted:
    """What to examine. ``checkpoint``: bytes of one checkpoint; ``keep``: how many are kept; ``bandwidth``: whether to
    measure it; ``seconds``: time limit of a question."""

    checkpoint: int = 0
    keep: int = 1
    bandwidth: bool = True
    seconds: int = 60


def diagnose(job: Job, wanted: Wanted) -> tuple[Examination, dict[str, list[Finding]]]:
    """Examine the hosts of ``job`` (which is not started); returns the measurements and the findings of every check."""
    folder = _existing(job.run_dir.absolute())
    free = shutil.disk_usage(folder).free
    chosen = {name: job.env[name] for name in VARIABLES if job.env.get(name)}
    omp = job.env.get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "")).partition(",")[0].strip()
    exam = Examination(
        job.hosts,
        {},
        folder=str(folder),
        free=free,
        checkpoint=wanted.checkpoint,
        keep=wanted.keep,
        chosen=chosen,
        omp=int(omp) if re.fullmatch(r"[0-9]{1,9}", omp) else 0,
    )
    try:
        probe = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    except OSError as error:
        exam = replace(exam, unusable=error.strerror or str(error))
        return exam, examine(exam)
    try:
        exam = _ask(exam, job, probe, wanted)
        findings = examine(exam)
        if any(finding.level == "error" for found in findings.values() for finding in found):
            exam = replace(exam, reduced="not run: the errors come first")
        elif not wanted.bandwidth:
            exam = replace(exam, reduced="not run, as --bandwidth=false says")
        elif len(job.hosts) == 1 and job.hosts[0].slots == 1:
            exam = replace(exam, reduced="not run: there is one rank; with --nproc=2 it is measured")
        else:
            exam = _all_reduce(exam, job, probe, wanted.seconds)
        return exam, examine(exam)
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _ask(exam: Examination, job: Job, probe: Path, wanted: Wanted) -> Examination:
    """Ask every host about itself, and let the hosts connect to each other."""
    secret = new_secret()
    (probe / MARKER).write_text(secret)
    hosts, numbers = job.hosts, {host: str(number) for number, host in enumerate(job.hosts)}
    addresses = [host.address for host in hosts] if len(hosts) > 1 else []
    about = {"ask": "facts", "folder": str(probe), "secret": secret, "visible": job.env.get("CUDA_VISIBLE_DEVICES")}
    contacts = Contacts(hosts, job.ssh, wanted.seconds)
    try:
        asked = time.time()
        said = contacts.ask(
            lambda host: {**about, "names": near(addresses, host.address), "own": numbers[host]},
            f"{len(hosts)} hosts about themselves" if len(hosts) > 1 else "this host about itself",
        )
        failed = {name: answer["error"] for name, answer in said.items() if "error" in answer}
        answers = {name: answer for name, answer in said.items() if name not in failed}
        skew = {
            name: max(0.0, answer["ended"] - contacts.heard[name]) or min(0.0, answer["began"] - asked)
            for name, answer in answers.items()
        }
        facts = {name: _facts(answer) for name, answer in answers.items()}
        seen = {host.name for host in hosts if _content(probe / numbers[host]) == secret}
        exam = replace(exam, facts=facts, skew=skew, seen=frozenset(seen))
        if len(hosts) > 1 or job.rendezvous:
            exam = replace(exam, **_calls(contacts, job, secret))
        return replace(exam, silent={**failed, **contacts.silent})
    finally:
        contacts.close()


def _calls(contacts: Contacts, job: Job, secret: str) -> dict[str, Any]:
    """Every host listens (the first one at the rendezvous port) and connects to the others."""
    first = job.hosts[0]
    address, port = job.rendezvous or ("", 0)
    served = contacts.ask(
        lambda host: {"ask": "serve", "port": port if host == first else 0, "secret": secret}, "all for a free port"
    )
    places = {
        host.address: ((host == first and address) or host.address, served[host.name]["port"])
        for host in job.hosts
        if "port" in served.get(host.name, {})
    }
    called = contacts.ask(
        lambda host: {
            "ask": "connect",
            "to": {name: places[name] for name in near(list(places), host.address) if name != host.address},
            "secret": secret,
            "timeout": _CALL_S,
        },
        "all to connect to each other",
    )
    links = {(host, other): said for host, to in called.items() for other, said in to.items()}
    return {"links": links, "port": served.get(first.name, {}).get("error", "")}


def near(names: list[str], own: str) -> list[str]:
    """Which hosts a host is asked about: all if they are few, else the first, itself and its neighbours."""
    if len(names) <= _MESH or own not in names:
        return names
    place = names.index(own)
    return list(dict.fromkeys([names[0], names[place - 1], own, names[(place + 1) % len(names)]]))


def _facts(answer: Mapping[str, Any]) -> Facts:
    return Facts(**{**answer, "peers": {name: Peer(**peer) for name, peer in answer["peers"].items()}})


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _all_reduce(exam: Examination, job: Job, probe: Path, seconds: int) -> Examination:
    """Measure an all-reduce with one rank on each host, in a child process that can be killed with all its children."""
    alone, out, console = len(job.hosts) == 1, probe / "bandwidth.json", probe / "console"
    measuring = replace(
        job,
        program=(sys.executable, "-m", "megatron_lite.distributed.bandwidth", str(out), str(seconds)),
        hosts=tuple(
            replace(host, slots=1 + alone, devices=host.devices and host.devices[: 1 + alone]) for host in job.hosts
        ),
        run_dir=probe,
        resume=(),
    )
    child = os.fork()
    if not child:
        _supervise(measuring, console)
    try:
        with progress("an all-reduce") as show:
            deadline = time.monotonic() + seconds + _GRACE_S
            while not (ended := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() < deadline:
                show("starting one rank on each host")
                time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)  # what it has started dies with it, also on other hosts
            os.waitpid(child, 0)
    try:
        return replace(exam, reduced=json.loads(out.read_text()))
    except (OSError, ValueError):
        said = last_words(_content(console).encode()) if ended else f"timed out after {seconds} s"
        said = said.partition("; log: ")[0]  # the log is about to be removed: quote it instead
        logs = [last_words(_content(log).encode()) for log in sorted((probe / "logs").glob("rank_*.log"))]
        said += next((f": {words}" for words in logs if words and not words.startswith("#")), "")
        return replace(exam, reduced=f"all-reduce: {said}", failed=True)


def _supervise(job: Job, console: Path) -> None:
    """The body of the child process."""
    try:
        process.die_with_parent()
        number = os.open(console, os.O_WRONLY | os.O_CREAT)
        for descriptor in (1, 2):
            os.dup2(number, descriptor)
        outcome = supervise(job, torchrun.command)
        say(outcome.line)
    except UsageError as error:
        say(f"error: {error}")
    finally:
        os._exit(0)


def exit_code(findings: Mapping[str, list[Finding]]) -> int:
    """The exit code of the first check with an error, or 0."""
    failed = (name for name, found in findings.items() if any(finding.level == "error" for finding in found))
    return next((CHECKS[name][0] for name in failed), 0)


def report(exam: Examination, findings: Mapping[str, list[Finding]]) -> str:
    """Print errors and warnings on stderr, one line each; returns the table of all checks."""
    for level in ("error", "warning"):
        for found in findings.values():
            for line in _lines(exam, found, level):
                say(f"{level}: {line}")
    rows = []
    for name, found in findings.items():
        levels = [finding.level for finding in found]
        state = "ERROR" if "error" in levels else "warning" if "warning" in levels else "ok"
        unmeasured = name == "bandwidth" and isinstance(exam.reduced, str) and not exam.failed
        if unmeasured or not (found or exam.facts):
            state = "skipped"
        rows.append(f"{name:<10} {state:<8} {'; '.join(_lines(exam, found, 'note'))}".rstrip())
    return "\n".join(rows)


def _lines(exam: Examination, found: list[Finding], level: str) -> list[str]:
    """The findings of one level; equal findings of several hosts share a line."""
    hosts: dict[str, list[str]] = {}
    for finding in found:
        if finding.level == level:
            hosts.setdefault(finding.text, []).append(finding.host)
    lines = []
    for text, names in hosts.items():
        shared = names == [""] or (len(exam.hosts) > 1 and len(names) == len(exam.hosts) and level == "note")
        lines.append(text if shared or exam.hosts[0].name == "localhost" else f"{', '.join(names)}: {text}")
    return lines


def as_json(exam: Examination, findings: Mapping[str, list[Finding]]) -> str:
    """Everything, as JSON."""
    hosts = {host.name: asdict(exam.facts[host.name]) if host.name in exam.facts else None for host in exam.hosts}
    shown = {
        "exit_code": exit_code(findings),
        "checks": {name: [asdict(finding) for finding in found] for name, found in findings.items()},
        "hosts": hosts,
        "silent": exam.silent,
        "bandwidth": exam.reduced if isinstance(exam.reduced, dict) else None,
    }
    return json.dumps(shown, indent=2)
