"""What the doctor has found out about hosts, and what it says about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.doctor.facts import Facts
from launch.hosts.hostfile import Host


@dataclass(frozen=True)
class Finding:
    """One line. ``level``: an error ends a run or makes it wrong; a note only informs. No host: all of them."""

    level: Literal["error", "warning", "note"]
    text: str
    host: str = ""


@dataclass(frozen=True)
class Examination:
    """Everything that was found out.

    ``silent``: hosts that did not answer, and why. ``skew``: seconds that a clock is surely ahead of ours. ``seen``:
    hosts whose file has come into the run's folder. ``links``: from, to, what failed. ``chosen``: the user's
    ``network.VARIABLES``. ``omp``: OMP_NUM_THREADS of every rank, 0 where it says nothing. ``port``: what is wrong with
    the rendezvous port. ``reduced``: what ``megatron_lite/distributed/bandwidth.py`` wrote, or why there is nothing,
    which is an error if it ``failed``.
    """

    hosts: tuple[Host, ...]
    facts: Mapping[str, Facts]
    silent: Mapping[str, str] = field(default_factory=dict)
    skew: Mapping[str, float] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()
    folder: str = "."
    unusable: str = ""  # why the folder cannot be written to from here
    free: int = 0
    checkpoint: int = 0  # bytes; 0: unknown
    keep: int = 1
    links: Mapping[tuple[str, str], str] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
    omp: int = 0
    port: str = ""
    reduced: Mapping[str, Any] | str = "not run"
    failed: bool = False


def amount(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
