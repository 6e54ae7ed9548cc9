"""Diagnoses a hang: names the rank that hangs, from the flight records in the log folder, in one line.

``rank_N.flight.json`` (written by ``megatron_lite/training/watchdog.py`` when a step makes no progress) holds a rank's
Python stack, its process groups, and the collectives it has entered, numbered the same way on every rank of a group. A
rank inside a collective waits for the members of the group that have not entered it. A rank that others wait for, and
that waits for none, is the one that hangs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.watch.report import Report, Reports, last_words

_ANY_SIZES = ("all_to_all", "gather", "scatter", "send", "recv")  # ops whose sizes may differ between ranks
_NOT_THE_PLACE = (
    "megatron_lite/distributed/",
    "megatron_lite/training/watchdog.py",
    "megatron_lite/training/lifetime.py",
)


@dataclass(frozen=True)
class Collective:
    """One collective, as one rank entered it. ``number``: its position among the collectives of the group, from 1."""

    group: str
    number: int
    op: str
    sizes: list[list[int]]
    dtypes: list[str]
    done: bool
    created: float
    layer: str
    backward: bool

    @property
    def what(self) -> str:
        parts = zip(self.sizes, self.dtypes, strict=False)
        return ", ".join(f"{'×'.join(map(str, size)) or 'a number'} {dtype.lower()}" for size, dtype in parts)

    def fits(self, other: Collective) -> bool:
        """Whether two ranks that entered these as the same number can complete them together."""
        if self.op != other.op:
            return False
        return any(self.op.startswith(op) for op in _ANY_SIZES) or (self.sizes, self.dtypes) == (
            other.sizes,
            other.dtypes,
        )


@dataclass(frozen=True)
class Flight:
    """One rank's flight record. ``entered``: number of collectives for each group. ``stack``: frames, innermost
    first."""

    rank: int
    host: str
    pid: int
    attempt: int
    time: float
    step: int
    waiting: bool
    stack: list[str]
    groups: Mapping[str, Mapping[str, Any]]
    entered: Mapping[str, int]
    collectives: list[Collective]

    @cached_property
    def pending(self) -> list[Collective]:
        """For each group, the first collective that this rank has entered and not left."""
        first: dict[str, Collective] = {}
        for collective in self.collectives:
            if not collective.done:
                first.setdefault(collective.group, collective)
        return list(first.values())

    def at(self, group: str, number: int) -> Collective | None:
        return next((c for c in self.collectives if (c.group, c.number) == (group, number)), None)

    @property
    def ours(self) -> str:
        """The innermost frame of this project's code, outside of the code that runs collectives."""
        return _own(self.stack)

    @property
    def place(self) -> str:
        """The innermost frame; if it is in a library, also the frame of ours that calls it."""
        inner = self.stack[0] if self.stack else "unknown code"
        return self.ours if inner.startswith("megatron_lite/") else f"{inner}, called by {self.ours or 'unknown code'}"


@dataclass(frozen=True)
class Finding:
    """The diagnosis. ``line``: the complete message. ``rank``: the rank to blame, if there is one."""

    line: str
    rank: int | None = None
    host: str | None = None


def read_flights(log_dir: Path, attempt: int) -> dict[int, Flight]:
    """The flight records of one attempt, by rank; unreadable files are skipped."""
    found = {}
    for path in log_dir.glob("rank_*.flight.json"):
        try:
            tree = json.loads(path.read_text())
            tree["collectives"] = [Collective(**entry) for entry in tree["collectives"]]
            flight = Flight(**tree)
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if flight.attempt == attempt:
            found[flight.rank] = flight
    return found


def explain(log_dir: Path, reports: Reports) -> Finding | None:
    """Which rank hangs, where, and which ranks wait for it; None if no record shows a pending collective."""
    flights = read_flights(log_dir, reports.attempt)
    waits = [(flight, pending) for _, flight in sorted(flights.items()) for pending in flight.pending]
    if not waits:
        return None
    for flight, pending in waits:
        for member in _members(flight, pending):
            other = flights[member].at(pending.group, pending.number) if member in flights else None
            if other is not None and not pending.fits(other):
                return _mismatch(log_dir, flight, pending, flights[member], other)
    blocked: dict[int, list[tuple[Flight, Collective]]] = {}  # rank that is waited for: who waits, in which collective
    for flight, pending in waits:
        for member in _members(flight, pending):
            entered = flights[member].entered.get(pending.group, 0) if member in flights else 0
            if entered < pending.number:
                blocked.setdefault(member, []).append((flight, pending))
    waiting = {flight.rank for flight, _ in waits}
    roots = [rank for rank in blocked if rank not in waiting]
    if roots:
        root = max(roots, key=lambda rank: (len(blocked[rank]), -rank))
        known = flights.get(root) or reports.started.get(root)
        line = _hang(log_dir, root, flights, reports, blocked[root])
        return Finding(line, root, known.host if known else None)
    if blocked:  # a cycle: ranks entered the collectives of different groups in different orders
        told = "; ".join(f"rank {flight.rank} waits in {_name(c)} {_where(flight, c)}" for flight, c in waits)
        return Finding(f"ranks wait for each other, in different collectives: {told}; {_stacks(log_dir)}")
    flight, pending = waits[0]
    together = ", ".join(str(rank) for rank in sorted(waiting))
    return Finding(
        f"ranks {together} have all entered {_name(pending)} {_where(flight, pending)}, and it does not end: "
        f"is the network between {', '.join(sorted({f.host for f in flights.values()}))} up? {_stacks(log_dir)}",
    )


def _members(flight: Flight, collective: Collective) -> Iterator[int]:
    ranks = flight.groups.get(collective.group, {}).get("ranks", [])
    return (rank for rank in ranks if rank != flight.rank)


def _hang(
    log_dir: Path,
    root: int,
    flights: Mapping[int, Flight],
    reports: Reports,
    blocked: list[tuple[Flight, Collective]],
) -> str:
    waiter, collective = blocked[0]
    since = max(flight.time - pending.created for flight, pending in blocked)
    ranks = sorted({flight.rank for flight, _ in blocked})
    who = f"ranks {', '.join(map(str, ranks))} have" if len(ranks) > 1 else f"rank {ranks[0]} has"
    waited = f"{who} waited for it for {since:.0f} s"
    missed = f"it has not entered {_name(collective)} {_where(waiter, collective)}"
    return f"{_culprit(log_dir, root, flights, reports)}: {missed}; {waited}; {_stacks(log_dir, root)}"


def _culprit(log_dir: Path, rank: int, flights: Mapping[int, Flight], reports: Reports) -> str:
    report: Report | None = reports.started.get(rank)
    if rank in flights:
        flight = flights[rank]
        return f"rank {rank} ({flight.host}, pid {flight.pid}) hangs in {flight.place}"
    if report is None:
        return f"rank {rank} never started"
    if not report.stopped and (place := _stacked_place(log_dir / f"rank_{rank}.stacks.txt")):
        said = f" ({words})" if report.signal and (words := _words(log_dir, rank)) else ""
        return f"{report} in {place}{said}" if report.signal else f"{report} hangs in {place}"
    return str(report) if report.signal else f"{report} gives no sign of life"


def _mismatch(log_dir: Path, one: Flight, first: Collective, two: Flight, second: Collective) -> Finding:
    ranks = sorted(((one, first), (two, second)), key=lambda pair: pair[0].rank)
    told = ", but ".join(
        f"rank {flight.rank} ({flight.host}, pid {flight.pid}) called {c.op} of {c.what or 'nothing'} "
        f"{_where(flight, c, group=False)}"
        for flight, c in ranks
    )
    group = one.groups[first.group]
    name = f"group {group['axis'] or first.group}, ranks {', '.join(map(str, group['ranks']))}"
    line = f"ranks disagree about collective #{first.number} ({name}): {told}; {_stacks(log_dir)}"
    return Finding(line)


def _name(collective: Collective) -> str:
    return f"{collective.op} #{collective.number}"


def _where(flight: Flight, collective: Collective, *, group: bool = True) -> str:
    """``(group dp, blocks.3.attention.out backward, layers/linear.py:58, step 7)``; unknown parts are left out."""
    innermost = flight.waiting and collective == max(flight.pending, key=lambda c: c.created, default=None)
    layer = f"{collective.layer}{' backward' * collective.backward}" if collective.layer else ""
    axis = flight.groups.get(collective.group, {}).get("axis") or collective.group
    parts = [f"group {axis}" if group else "", layer, flight.ours if innermost else "", f"step {flight.step}"]
    return f"({', '.join(filter(None, parts))})"


def _words(log_dir: Path, rank: int) -> str:
    try:
        return last_words((log_dir / f"rank_{rank}.log").read_bytes()[-8192:])
    except OSError:
        return ""


def _stacked_place(path: Path) -> str:
    """The innermost frame of ours in a faulthandler dump; the main thread is printed last."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', text[max(0, text.rfind("hread 0x")) :])
    return _own([f"{file[max(0, file.rfind('megatron_lite/')) :]}:{line} ({name})" for file, line, name in frames])


def _own(stack: list[str]) -> str:
    ours = [place for place in stack if place.startswith("megatron_lite/")]
    return next((place for place in ours if not place.startswith(_NOT_THE_PLACE)), ours[0] if ours else "")


def _stacks(log_dir: Path, rank: int | None = None) -> str:
    path = log_dir / f"rank_{rank}.stacks.txt"
    if rank is not None and path.exists() and path.stat().st_size:
        return f"stacks: {path}"
    return f"stacks: {log_dir / 'rank_*.stacks.txt'}"
