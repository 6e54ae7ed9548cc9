"""What is to be run: a ``Job``, described without saying which launcher starts it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """``nproc`` copies of ``program`` (an argv) that form one distributed run with its files in ``run_dir``.

    ``attempt`` counts automatic restarts from 0; from the first restart on, ``resume`` is appended to the program.
    """

    program: tuple[str, ...]
    nproc: int
    run_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)
    resume: tuple[str, ...] = ()
    attempt: int = 0

    @property
    def log_dir(self) -> Path:
        return self.run_dir / "logs"

    def next_attempt(self) -> Job:
        return replace(self, attempt=self.attempt + 1)

    @property
    def rank_env(self) -> dict[str, str]:
        """Variables to add to the environment of every rank."""
        return {**self.env, "MLITE_ATTEMPT": str(self.attempt)}

    def rank_argv(self, *options: str) -> list[str]:
        """The argv, after the Python executable, of one rank: the program inside its shim (``launch/rank.py``)."""
        program = self.program + (self.resume if self.attempt else ())
        return ["-m", "launch.rank", f"--log-dir={self.log_dir}", *options, "--", *program]


def rank_defaults(nproc: int, given: Mapping[str, str]) -> dict[str, str]:
    """Variables that ranks should have; what the user has set in ``given`` is left alone."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        "PYTHONUNBUFFERED": "1",  # a killed rank's last lines are in its log
    }
    return {name: value for name, value in defaults.items() if name not in given}


@dataclass(frozen=True)
class Launch:
    """What a launcher is started with: its argv, variables added to the environment, and files to write first."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    files: dict[Path, str] = field(default_factory=dict)
