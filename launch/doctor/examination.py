"""The data types of the doctor: what it measured on the hosts, and its findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.doctor.facts import Facts
from launch.hosts.hostfile import Host


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``level``: an error would end a run or make it wrong; a note only informs. An empty
    ``host`` means all hosts."""

    level: Literal["error", "warning", "note"]
    text: str
    host: str = ""


@dataclass(frozen=True)
class Examination:
    """Everything that was measured.

    ``silent``: hosts that did not answer, and why. ``skew``: by how many seconds a host's clock is at least ahead of
    ours (negative: behind). ``seen``: hosts whose file appeared in the run folder. ``links``: (from, to) and the error
    of that connection, empty if it worked. ``chosen``: values of ``network.VARIABLES`` that the user has set. ``omp``:
    OMP_NUM_THREADS of every rank, 0 if unset. ``port``: what is wrong with the rendezvous port. ``reduced``: the result
    of ``megatron_lite/distributed/bandwidth.py``, or why there is none; that is an error if ``failed``.
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
    """A number of bytes in readable units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
