"""Jobs in Slurm: submit, status, logs and cancel."""

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

from launch.hosts.hostfile import UsageError
from launch.hosts.job import Job
from launch.launchers.slurm import RESUME, runs_of_their_own, script, task_numbers
from launch.watch.outcome import last_step
from launch.watch.report import STORAGE
from launch.watch.supervise import held, say

_POLL_S = 1.0
_JOBS = "slurm.jobs"  # file in the log folder: ids of the jobs submitted last
# States of jobs that have ended. PREEMPTED is not among them: such a job may be queued again.
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "NODE_FAIL"}
_NO_TASK = "4294967294"  # ArrayTaskId of array tasks that were cancelled before they began
_BEGUN = {"RUNNING", "SUSPENDED"}


def submit(
    job: Job, words: Sequence[str], overrides: Mapping[str, str], options: Mapping[str, Any], *, dry_run: bool
) -> int:
    """Write the batch script into the run folder and submit it, or print it (``dry_run``). Raises UsageError.

    In a chain, each job starts after all jobs before it have ended without success, and resumes where they stopped.
    Once a job succeeds, Slurm cancels the rest.
    """
    text = script(job, words, overrides, options)
    if dry_run:
        print(text, end="")
        return 0
    path = job.log_dir / "slurm.sh"
    tasks: dict[int, Path] = {}  # log folder of each array task: Slurm does not create it
    if runs_of_their_own(options["array"]):
        tasks = {number: Path(f"{job.run_dir}-{number}/logs") for number in task_numbers(options["array"])}
    try:
        for folder in (job.log_dir, *tasks.values()):
            folder.mkdir(parents=True, exist_ok=True)
        _write(path, os.fsencode(text))  # a path need not be UTF-8
    except OSError as error:
        say(f"error: {error.filename}: {error.strerror}")
        return STORAGE
    if shutil.which("sbatch") is None:
        raise UsageError(
            f"there is no sbatch here; where there is one, submit the script: sbatch {shlex.quote(str(path))}"
        )
    jobs: list[str] = []
    for _ in range(options["chain"]):
        argv = ["sbatch", "--parsable"]
        if jobs:
            argv += [f"--dependency={','.join(f'afternotok:{number}' for number in jobs)}", "--kill-on-invalid-dep=yes"]
        argv += [str(path), *([RESUME] if jobs else [])]
        asked = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        number = asked.stdout.strip().partition(";")[0]
        if asked.returncode or not number.isdecimal():
            for folder in tasks.values():
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()
                    folder.parent.rmdir()
            raise UsageError(f"sbatch: {_complaint(asked)}; the script: {path}")
        jobs.append(number)
        lists = {job.log_dir: jobs} | {folder: [f"{jobs[0]}_{task}"] for task, folder in tasks.items()}
        try:
            for folder, listed in lists.items():
                _write(folder / _JOBS, "".join(f"{number}\n" for number in listed).encode())
        except OSError as error:
            print("\n".join(jobs), flush=True)
            say(f"error: {error.filename}: {error.strerror}; it was submitted as job {', '.join(jobs)}")
            return STORAGE
    print("\n".join(jobs), flush=True)
    after = f", and {', '.join(jobs[1:])} after it" if len(jobs) > 1 else ""
    say(f"submitted {path} as job {jobs[0]}{after}; go on with")
    for command in ("status JOB", "logs JOB --follow", "cancel JOB"):
        say(f"  python -m launch {command.replace('JOB', jobs[0])}")
    return 0


def _write(path: Path, content: bytes) -> None:
    """``write_bytes``, with an OSError that always names the file, also when the disk is full."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def status(job: str) -> int:
    """Show where JOB (a job's id, or a run folder) stands, in the queue and in its run.

    Exit codes: 0, or 2 if neither Slurm nor a folder knows of it."""
    ids, log_dirs = find(job)
    known = [record for number in ids for record in records(number)]
    for record in known:
        print(_line(record))
    for log_dir in log_dirs:
        print(_progress(log_dir))
    if not known:
        say(f"Slurm knows no job {', '.join(ids)} any more" if ids else f"no job was submitted from {job}")
    return 0 if known or log_dirs else 2


def logs(job: str, *, rank: int | None, follow: bool) -> int:
    """Print what JOB (a job's id, or a run folder) has written: its launcher and rank 0, or another rank's log.

    Of a run that was not submitted, rank 0's. Ends when it has shown what there is; with --follow, when the job has
    ended."""
    ids, log_dirs = find(job)
    if not log_dirs:
        raise UsageError(f"Slurm knows no job {job} any more; give its run folder")
    if len(log_dirs) > 1:
        run_dir = log_dirs[0].parent
        task = f"{ids[0].partition('_')[0]}_{run_dir.name.rpartition('-')[2]}"
        raise UsageError(f"{job} is an array of {len(log_dirs)} runs; give one of them, as in {task} or {run_dir}")

    def written() -> list[Path]:
        """The log files, the most recently written last: a run in several parts has several."""
        if rank is not None:
            found = [log_dirs[0] / f"rank_{rank}.log"]
        elif Path(job).is_dir():
            found = list(log_dirs[0].glob("slurm-*.out")) or ([] if ids else [log_dirs[0] / "rank_0.log"])
        else:
            found = [Path(record["StdOut"]) for record in records(job)]
        return sorted(filter(Path.is_file, found), key=lambda path: path.stat().st_mtime)

    shown = dict.fromkeys(written()[:-1], -1)
    while True:
        # Asked before reading, so that lines written in between are still shown.
        over = not follow or not (
            any(map(_running, ids)) if ids else any(map(held, log_dirs[0].glob("launcher*.lock")))
        )
        for path in written():
            if shown.get(path) != -1:
                _show(path, shown)
        if over:
            break
        time.sleep(_POLL_S)
    if not any(count >= 0 for count in shown.values()):
        raise UsageError(f"{log_dirs[0]}: nothing was written yet")
    return 0


def _show(path: Path, shown: dict[Path, int]) -> None:
    """Copy what is new in a file to stdout; ``shown`` counts the bytes already shown of each file."""
    shown.setdefault(path, 0)
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(shown[path])
        while chunk := file.read(65536):
            shown[path] += len(chunk)
            while chunk:
                chunk = chunk[os.write(1, chunk) :]


def cancel(job: str, *, wait: int) -> int:
    """End JOB (a job's id, or a run folder): a run that has begun saves first, jobs that wait for it are cancelled.

    It gets --wait seconds to save, and is killed then; 0 kills it at once."""
    ids, _ = find(job)
    if not (known := _left(ids)):
        say(f"{job}: nothing left to cancel")
        return 0
    names = list(map(_name, known))
    if waiting := _dependents({*names, *ids}):
        _call("scancel", *waiting)
        say(f"cancelled {', '.join(waiting)}, which waited for it")
    for record in known:
        if not (wait and record["JobState"] in _BEGUN):
            which = ["--state=PENDING", record["ArrayJobId"]] if "[" in _name(record) else [_name(record)]
            _call("scancel", *which)
            say(f"cancelled {_name(record)}")
    if running := [_name(record) for record in _left(ids) if wait and record["JobState"] in _BEGUN]:
        for name in running:  # the script must not requeue it when it ends
            _call("scontrol", "update", f"JobId={name}", "Requeue=0")
        asking = [_ask_to_end(name) for name in running]
        say(f"asked {', '.join(running)} to save and to end; killed if that takes more than {wait} s")
        deadline = time.monotonic() + wait
        while any(map(_running, running)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for process in asking:
            process.kill()
            process.wait()
        if left := [name for name in running if _running(name)]:
            _call("scancel", *left)
            say(f"cancelled {', '.join(left)}")
    return 0


def _ask_to_end(job: str) -> subprocess.Popen[bytes]:
    """Send SIGTERM to a job's script. While other tasks of its array are pending, scancel believes that it failed and
    repeats the signal for a minute; the script expects that."""
    argv, quiet = ["scancel", "--batch", "--signal=TERM", job], subprocess.DEVNULL
    return subprocess.Popen(argv, stdin=quiet, stdout=quiet, stderr=quiet)


def find(job: str) -> tuple[list[str], list[Path]]:
    """Ids and known log folders of a job, or of the jobs submitted last from a run folder: one log folder, or one for
    each run of an array. Raises UsageError."""
    if re.fullmatch(r"\d+(_\d+)?", job, re.ASCII):
        found = dict.fromkeys(_log_dir(record) for record in records(job))
        return [job], [log_dir for log_dir in found if log_dir.is_dir()]
    log_dir = Path(job) / "logs"
    if not log_dir.is_dir():
        raise UsageError(f"{job}: neither the number of a job nor a run folder")
    ids = _submitted(log_dir)
    siblings = [folder / "logs" for folder in log_dir.parent.absolute().parent.iterdir()]
    tasks = {task: folder for folder in siblings for task in _submitted(folder) if task.partition("_")[0] in ids}
    runs = [tasks[task] for task in sorted(tasks, key=lambda task: int(task.partition("_")[2] or -1)) if "_" in task]
    return ids, runs or [log_dir]


def _submitted(log_dir: Path) -> list[str]:
    try:
        return (log_dir / _JOBS).read_text().split()
    except OSError:
        return []


def records(job: str) -> list[dict[str, str]]:
    """Records from ``scontrol show job``: one for each array task, and one for all tasks that have not begun; none if
    Slurm has forgotten the job."""
    shown = _call("scontrol", "show", "job", job, accept=_forgotten)
    found = []
    for text in re.split(r"\n\s*\n", shown.strip()):
        record = dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", text))
        record |= dict(re.findall(r"^\s+(StdOut|Command|WorkDir)=(.*)$", text, re.MULTILINE))  # values with spaces
        if "StdOut" in record:
            record["StdOut"] = record["StdOut"].replace("%%", "%")  # shown with its escapes
            if "_" in job:  # a pending task is listed in one record with others
                record["ArrayTaskId"] = job.partition("_")[2]
            found.append(record)
    return found


def _left(jobs: Sequence[str]) -> list[dict[str, str]]:
    """The records of jobs that have not ended."""
    return [record for job in jobs for record in records(job) if record["JobState"] not in _ENDED]


def _name(record: Mapping[str, str]) -> str:
    """The name for Slurm's commands: a job ``4``, an array task ``4_2``, all pending tasks ``4_[3-9]``. (The JobId of a
    task may be that of the whole array.)"""
    tasks = record.get("ArrayTaskId", "")
    if tasks in ("", _NO_TASK):
        return record["JobId"]
    return f"{record['ArrayJobId']}_{tasks if tasks.isdecimal() else f'[{tasks}]'}"


def _running(job: str) -> bool:
    return bool(_left([job]))


def _dependents(jobs: set[str]) -> list[str]:
    """This user's jobs that depend on one of ``jobs``."""
    listed = [line.partition(" ") for line in _call("squeue", "-h", "--me", "-o", "%A %E").splitlines()]
    return [number for number, _, on in listed if number not in jobs and jobs & set(re.findall(r"\d+", on))]


def _call(*argv: str, accept: Callable[[str], bool] = lambda said: False) -> str:
    try:
        asked = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(f"there is no {argv[0]} here; a run folder's logs can be read without it") from None
    if asked.returncode and not accept(asked.stderr + asked.stdout):
        raise UsageError(f"{argv[0]}: {_complaint(asked)}")
    return asked.stdout


def _forgotten(said: str) -> bool:
    """Whether scontrol says that it knows no such job or array task."""
    return "Invalid job id" in said or re.fullmatch(r"Job \S+ not found\s*", said) is not None


def _complaint(asked: subprocess.CompletedProcess[str]) -> str:
    """The last message of a Slurm command, without the command's name and hints at its help."""
    lines = (asked.stderr or asked.stdout).strip().splitlines()
    said = [line for line in lines if not line.startswith("Try ")] or [f"exit code {asked.returncode}"]
    return re.sub(r"^\w+: (error: )?", "", said[-1])


def _log_dir(record: Mapping[str, str]) -> Path:
    return Path(record["StdOut"]).parent


def _line(record: Mapping[str, str]) -> str:
    reason = record.get("Reason", "None")
    where = record.get("NodeList", "(null)")
    return "".join(
        [
            f"job {_name(record)} ({record['JobName']}): {record['JobState']}",
            f" ({reason})" if reason != "None" else "",
            f" on {where}" if where not in ("", "(null)") else "",
            f", {record['RunTime']} of {record['TimeLimit']}",
            f", queued again {record['Restarts']} times" if record["Restarts"] != "0" else "",
        ]
    )


def _progress(log_dir: Path) -> str:
    """One line about the run itself: its last step and last outcome."""
    run_dir, step = log_dir.parent, last_step(log_dir.parent)
    told = "no step yet" if step is None else f"step {step}"
    with contextlib.suppress(OSError, ValueError):
        outcome = json.loads((run_dir / "outcome.json").read_text())
        told += f"; last outcome: {outcome['status']}" + (f": {outcome['cause']}" if outcome["cause"] else "")
    return f"{run_dir}: {told}"
