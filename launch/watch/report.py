"""Reports of ranks: small files in the log folder, through which each rank's shim informs the supervisor.

``rank_N.start.json`` exists while rank N runs; ``rank_N.exit.json`` replaces it when the rank has ended.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

USAGE, PEER_LOST, STORAGE, PREEMPTED = 2, 5, 7, 75
MEANING = {  # the exit codes of a run
    0: "done",
    1: "internal error",
    USAGE: "usage or config",
    3: "data",
    4: "checkpoint",
    PEER_LOST: "peer lost or hung",
    6: "non-finite loss",
    STORAGE: "disk or I/O",
    PREEMPTED: "preempted, saved",
}
_HINTS = {
    signal.SIGKILL: " (out of memory?)",
    signal.SIGSEGV: " (a crash in native code)",
    signal.SIGBUS: " (a memory-mapped file cut short, or /dev/shm full?)",
}


@dataclass(frozen=True)
class Report:
    """One rank. ``pid``: of the program; ``shim``: of ``launch.watch.rank``. Fields with defaults are set at the end.

    ``asked``: it had been asked to stop. ``stopped``: it was asked, stayed SIGSTOPped, and was killed.
    """

    rank: int
    host: str
    pid: int
    shim: int
    attempt: int
    started: float
    exit_code: int | None = None
    signal: int | None = None
    asked: bool = False
    stopped: bool = False
    time: float = 0.0
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.exit_code not in (0, PREEMPTED)

    @property
    def unprepared(self) -> bool:
        """Ended by the signal that asked it to save: it was still starting and had nothing to save."""
        return self.asked and self.signal == signal.SIGTERM

    @property
    def secondary(self) -> bool:
        """Whether ranks end like this when *another* rank was lost."""
        return self.exit_code == PEER_LOST or self.signal == signal.SIGABRT or self.unprepared

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host}, pid {self.pid})"
        if self.stopped:
            return f"{who} was stopped (SIGSTOP?) and killed"
        if self.signal:
            return f"{who} was killed by {signal_name(self.signal)}{_HINTS.get(signal.Signals(self.signal), '')}"
        if self.exit_code is None:
            return who
        meaning = f" ({MEANING[self.exit_code]})" if self.exit_code in MEANING else ""
        return f"{who} ended with exit code {self.exit_code}{meaning}"

    def write_start(self, log_dir: Path) -> None:
        with (partial := log_dir / f"rank_{self.rank}.start.tmp").open("w") as file:
            # Padded, so that the block for the final report is already allocated if the disk fills up.
            file.write(json.dumps(asdict(self)).ljust(4096))
        partial.replace(log_dir / f"rank_{self.rank}.start.json")

    def write_end(self, log_dir: Path) -> None:
        with (path := log_dir / f"rank_{self.rank}.start.json").open("r+") as file:
            file.write(json.dumps(asdict(self)) + "\n")
            file.truncate()
        path.replace(log_dir / f"rank_{self.rank}.exit.json")


class Reports:
    """A snapshot of the reports of some ranks in one attempt."""

    def __init__(self, log_dir: Path, attempt: int, ranks: Collection[int]) -> None:
        self.attempt, self._ranks = attempt, ranks
        self._files = list(log_dir.glob("rank_*.json"))  # list the folder once
        self.ended = self._read("exit")

    @cached_property
    def started(self) -> dict[int, Report]:
        """Every rank that has started, whether it has ended or not."""
        return {**self._read("start"), **self.ended}

    @property
    def running(self) -> list[Report]:
        return [report for rank, report in sorted(self.started.items()) if rank not in self.ended]

    @property
    def failures(self) -> list[Report]:
        return [report for report in self.ended.values() if report.failed]

    @property
    def hung(self) -> bool:
        """Whether a rank has reported that it makes no progress (``launch/watch/hang.py``)."""
        return any(int(path.name[5:].partition(".")[0]) in self._ranks for path in self._of("flight"))

    def _of(self, name: str) -> list[Path]:
        return [path for path in self._files if path.name.endswith(f".{name}.json")]

    def _read(self, name: str) -> dict[int, Report]:
        found = {}
        for path in self._of(name):
            try:
                report = Report(**json.loads(path.read_text()))
            except (FileNotFoundError, ValueError):  # it is being renamed or rewritten
                continue
            if report.attempt == self.attempt and report.rank in self._ranks:
                found[report.rank] = report
        return found


def last_words(output: bytes) -> str:
    """The last ``error:`` line of ``output``, or else its last line (the exception, after a traceback)."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:500]


def signal_name(signum: int) -> str:
    return signal.Signals(signum).name
