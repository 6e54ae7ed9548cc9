"""Starts every rank for real under every launcher, and compares what each reports about itself with the plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from launch.hosts.hostfile import UsageError, count
from launch.hosts.job import Job, Launch
from launch.watch.outcome import Outcome
from launch.watch.supervise import say, supervise


def verify(job: Job, launchers: Mapping[str, Callable[[Job], Launch]]) -> int:
    """Run ``job``, whose program prints one line of JSON with its rank and host, under each of ``launchers``.

    Prints one line for each launcher on stdout. Returns the exit code: 0, or that of the last failure.
    """
    result, hosts = 0, {}
    for name, launcher in launchers.items():
        run = replace(job, run_dir=job.run_dir / name, name=f"{job.name}-{name}")
        try:
            outcome = supervise(run, launcher)
        except UsageError as error:
            outcome = Outcome(2, str(error))
        problem = outcome.cause
        if not outcome.exit_code:
            told = [_said(run, place.rank) for place in run.places]
            problem = _compare(run, told)
            hosts[name] = [rank.get("host") for rank in told]
            first = next(iter(hosts))
            if not problem and hosts[name] != hosts[first]:
                problem = f"ranks are on {hosts[name]}, under {first} on {hosts[first]}"
        if problem:
            say(f"error: {name}: {problem}")
            result = outcome.exit_code or 1
        else:
            print(
                f"{name}: {count(run.size, 'rank')} on {count(len(run.hosts), 'host')}, each where the plan has it",
                flush=True,
            )
    return result


def _said(job: Job, rank: int) -> dict[str, Any]:
    """What one rank printed."""
    for line in (job.log_dir / f"rank_{rank}.log").read_text(errors="replace").splitlines():
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def _compare(job: Job, told: list[dict[str, Any]]) -> str:
    """The first rank that differs from the plan, as one line; empty if none does."""
    names: dict[int, Any] = {}  # the host name that the first rank of each node reported
    for place, said in zip(job.places, told, strict=True):
        wanted: dict[str, Any] = {
            "rank": place.rank,
            "size": job.size,
            "local_rank": place.local_rank,
            "local_size": place.host.slots,
        }
        wanted["host"] = names.setdefault(place.node, said.get("host"))
        wrong = [f"{key} {said.get(key)} instead of {value}" for key, value in wanted.items() if said.get(key) != value]
        if wrong:
            return f"rank {place.rank} of {place.host.name} has {', '.join(wrong)}"
    if len(set(names.values())) < len(names) and not all(host.local for host in job.hosts):
        return f"hosts of the hostfile are one machine: they call themselves {', '.join(map(str, names.values()))}"
    return ""
