"""Runs that are handed to Slurm: submitting them, how they stand, what they have said, and their end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.hostfile import UsageError
from launch.job import Job
from launch.outcome import last_step
from launch.slurm import RESUME, script
from launch.supervise import say

_POLL_S = 1.0
_STORAGE = 7
_JOBS = "slurm.jobs"  # in the log folder: the ids of the jobs that were submitted last
# PREEMPTED and NODE_FAIL may be followed by another start; these are not.
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "NODE_FAIL"}


def submit(
    job: Job, words: Sequence[str], overrides: Mapping[str, str], options: Mapping[str, Any], *, dry_run: bool
) -> int:
    """Write the batch script into the run folder and hand it to sbatch; or print it. Raises UsageError.

    In a chain each job waits for all before it to have ended without success, to go on where they have stopped; as soon
    as one has succeeded, Slurm cancels those that are left.
    """
    text = script(job, words, overrides, options)
    if dry_run:
        print(text, end="")
        return 0
    path = job.log_dir / "slurm.sh"
    try:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(text))  # a path need not be UTF-8
    except OSError as error:
        say(f"error: {error.filename}: {error.strerror}")
        return _STORAGE
    if shutil.which("sbatch") is None:
        raise UsageError(
            f"there is no sbatch here; where there is one, submit the script: sbatch {shlex.quote(str(path))}"
        )
    jobs: list[str] = []
    for _ in range(options["chain"]):
        argv = ["sbatch", "--parsable"]
        if jobs:
            argv += [f"--dependency={','.join(f'afternotok:{number}' for number in jobs)}", "--kill-on-invalid-dep=yes"]
        argv += [str(path), *([RESUME] if jobs and "checkpoint.resume" not in overrides else [])]
        asked = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if asked.returncode:
            raise UsageError(f"sbatch: {_complaint(asked)}; the script: {path}")
        jobs.append(asked.stdout.strip().partition(";")[0])
    (job.log_dir / _JOBS).write_text("".join(f"{number}\n" for number in jobs))
    print("\n".join(jobs))
    after = f", and {', '.join(jobs[1:])} after it" if len(jobs) > 1 else ""
    say(f"submitted {path} as job {jobs[0]}{after}; go on with")
    for command in ("status JOB", "logs JOB --follow", "cancel JOB"):
        say(f"  python -m launch {command.replace('JOB', jobs[0])}")
    return 0


def status(job: str) -> int:
    """Show where JOB (a job's id, or a run folder) stands, in the queue and in its run.

    Exit codes: 0, or 2 if neither Slurm nor a folder knows of it."""
    ids, log_dir = find(job)
    known = [record for number in ids for record in records(number)]
    for record in known:
        print(_line(record))
    if log_dir is not None:
        print(_progress(log_dir))
    if not known:
        say(f"Slurm knows no job {', '.join(ids)} any more" if ids else f"no job was submitted from {job}")
    return 0 if known or log_dir else 2


def logs(job: str, *, rank: int | None, follow: bool) -> int:
    """Print what JOB (a job's id, or a run folder) has written: its launcher and rank 0, or another rank's log.

    Ends when it has shown what there is; with --follow, when the job has ended."""
    ids, log_dir = find(job)
    if log_dir is None:
        raise UsageError(f"Slurm knows no job {job} any more; give its run folder")
    if rank is not None:
        path = log_dir / f"rank_{rank}.log"
    elif Path(job).is_dir():
        path = max(
            log_dir.glob("slurm-*.out"), key=lambda output: output.stat().st_mtime, default=log_dir / "slurm-*.out"
        )
    else:
        path = Path(records(job)[-1]["StdOut"])
    shown = 0
    while True:
        over = not follow or not any(map(_running, ids))  # asked first: what comes after it is still shown
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(shown)
            while chunk := file.read(65536):
                shown += len(chunk)
                try:
                    while chunk:
                        chunk = chunk[os.write(1, chunk) :]
                except BrokenPipeError:  # as in `| head`
                    return 0
        if over:
            break
        time.sleep(_POLL_S)
    if not path.is_file():
        raise UsageError(f"{path}: nothing was written yet")
    return 0


def cancel(job: str, *, wait: int) -> int:
    """End JOB (a job's id, or a run folder): a run that has begun saves first, jobs that wait for it are cancelled.

    It gets --wait seconds to save, and is killed then; 0 kills it at once."""
    ids, _ = find(job)
    if not (known := [record for number in ids for record in records(number) if record["JobState"] not in _ENDED]):
        say(f"{job}: nothing left to cancel")
        return 0
    numbers = [record["JobId"] for record in known]
    if waiting := _dependents(set(numbers) | set(ids)):
        _call("scancel", *waiting)
        say(f"cancelled {', '.join(waiting)}, which waited for it")
    running = [record["JobId"] for record in known if record["JobState"] == "RUNNING"] if wait else []
    if running:
        _call("scancel", "--batch", "--signal=TERM", *running)
        say(f"asked {', '.join(running)} to save and to end; killed if that takes more than {wait} s")
        deadline = time.monotonic() + wait
        while any(map(_running, running)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    if left := [number for number in numbers if _running(number)]:
        _call("scancel", *left)
        say(f"cancelled {', '.join(left)}")
    return 0


def find(job: str) -> tuple[list[str], Path | None]:
    """The ids, and the log folder as far as it is known, of a job or of the last jobs of a run folder."""
    if re.fullmatch(r"\d+(_\d+)?", job, re.ASCII):
        known = records(job)
        return [job], _log_dir(known[-1]) if known else None
    log_dir = Path(job) / "logs"
    if not log_dir.is_dir():
        raise UsageError(f"{job}: neither the number of a job nor a run folder")
    with contextlib.suppress(FileNotFoundError):
        return (log_dir / _JOBS).read_text().split(), log_dir
    return [], log_dir


def records(job: str) -> list[dict[str, str]]:
    """What ``scontrol show job`` tells, one record for each task of an array; none of a job that it has forgotten."""
    shown = _call("scontrol", "show", "job", job, accept=lambda said: "Invalid job id" in said)
    found = []
    for text in re.split(r"\n\s*\n", shown.strip()):
        record = dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", text))
        record |= dict(re.findall(r"^\s+(StdOut|Command|WorkDir)=(.*)$", text, re.MULTILINE))  # may hold spaces
        if "StdOut" in record:
            record["StdOut"] = record["StdOut"].replace("%%", "%")  # shown as it was given
            found.append(record)
    return found


def _running(job: str) -> bool:
    return any(record["JobState"] not in _ENDED for record in records(job))


def _dependents(jobs: set[str]) -> list[str]:
    """This user's jobs that wait for one of ``jobs``."""
    listed = [line.partition(" ") for line in _call("squeue", "-h", "--me", "-o", "%i %E").splitlines()]
    return [number for number, _, on in listed if number not in jobs and jobs & set(re.findall(r"\d+", on))]


def _call(*argv: str, accept: Callable[[str], bool] = lambda said: False) -> str:
    try:
        asked = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(f"there is no {argv[0]} here; a run folder's logs can be read without it") from None
    if asked.returncode and not accept(asked.stderr):
        raise UsageError(f"{argv[0]}: {_complaint(asked)}")
    return asked.stdout


def _complaint(asked: subprocess.CompletedProcess[str]) -> str:
    """What a command of Slurm's said last, without its own name."""
    said = asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"]
    return re.sub(r"^\w+: (error: )?", "", said[-1])


def _log_dir(record: Mapping[str, str]) -> Path:
    return Path(record["StdOut"]).parent


def _line(record: Mapping[str, str]) -> str:
    reason = record.get("Reason", "None")
    where = record.get("NodeList", "(null)")
    return "".join(
        [
            f"job {record['JobId']} ({record['JobName']}): {record['JobState']}",
            f" ({reason})" if reason != "None" else "",
            f" on {where}" if where not in ("", "(null)") else "",
            f", {record['RunTime']} of {record['TimeLimit']}",
            f", queued again {record['Restarts']} times" if record["Restarts"] != "0" else "",
        ]
    )


def _progress(log_dir: Path) -> str:
    """The run itself: its last step, and how it ended."""
    run_dir, step = log_dir.parent, last_step(log_dir.parent)
    told = "no step yet" if step is None else f"step {step}"
    with contextlib.suppress(OSError, ValueError):
        outcome = json.loads((run_dir / "outcome.json").read_text())
        told += f"; last outcome: {outcome['status']}" + (f": {outcome['cause']}" if outcome["cause"] else "")
    return f"{run_dir}: {told}"
