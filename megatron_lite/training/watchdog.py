"""A thread that observes training to find ranks that hang and ranks that are slow.

A step that makes no progress for ``train.hang_timeout`` leaves two files in the log folder: ``rank_N.stacks.txt``,
every thread's stack, and ``rank_N.flight.json``, the last collectives of every group of this rank with the layer that
started each. The launcher compares those of all ranks (``launch/watch/hang.py``) and names the rank that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as torch_dist

from megatron_lite.distributed import comm
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import Axis, Mesh

logger = logging.getLogger("megatron_lite")

_TICK_S = 0.05
_GIL_S = 2.0  # if this thread cannot run, C code dumps the stacks this much after hang_timeout
_KEPT = 20  # collectives of each group in a flight record, besides those that have not ended
_WAITS = (comm.wait.__code__, comm.read.__code__)
_PACKAGE = Path(__file__).parents[1]


class Watchdog(threading.Thread):
    """Watches one rank. ``watch`` is called as each step (or save) begins; there is nothing else on the hot path."""

    def __init__(self, logs: Path, rank: Rank, mesh: Mesh, hang_timeout: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.mesh, self.hang_timeout = rank, mesh, hang_timeout
        self.path = logs / f"rank_{rank.rank}.flight.json"
        self.path.unlink(missing_ok=True)
        self.stacks = (logs / f"rank_{rank.rank}.stacks.txt").open("w")
        faulthandler.enable(self.stacks)  # a crash in native code leaves its stack, too
        self._main = threading.main_thread().ident or 0
        self._busy = 0.0
        self._recorded = False
        self._ended = threading.Event()
        self.watch(0)
        self._training = False
        self.start()

    def watch(self, step: int) -> None:
        """Called when ``step`` begins; it may take ``hang_timeout``."""
        self._step, self._since, self._training = step, time.monotonic(), True
        # For native code that holds the GIL, so that the watchdog thread cannot run: this dump needs no lock, and may
        # crash if another thread's frames change meanwhile.
        faulthandler.dump_traceback_later(self.hang_timeout + _GIL_S, file=self.stacks)

    def pause(self) -> None:
        """Called when a step ends: evaluating, saving and reporting do not count as busy time."""
        self._training = False

    def take_busy(self) -> float:
        """Seconds since the last call that were spent in steps, without the time spent waiting for other ranks."""
        busy, self._busy = self._busy, 0.0
        return busy

    def close(self) -> None:
        """Stop watching and join the thread: its references to process groups must go before the interpreter exits."""
        self._ended.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(_TICK_S):
            now = time.monotonic()
            self._look(now, now - before)
            before = now

    def _look(self, now: float, passed: float) -> None:
        # The frame must not outlive this call: it keeps alive whatever training has in its variables.
        frame = sys._current_frames()[self._main]
        waiting, stalled = waits(frame), now - self._since
        if self._training and not waiting:
            self._busy += passed
        if stalled < self.hang_timeout:
            if self._recorded:  # it went on after all
                self._recorded = False
                self.path.unlink(missing_ok=True)
        elif not self._recorded:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.dump_traceback(self.stacks)
            logger.warning("step %d made no progress for %.0f s; stacks: %s", self._step, stalled, self.stacks.name)
            self._record(list(_places(frame)), waiting=waiting)

    def lost(self, error: BaseException) -> None:
        """Write a record of a collective that failed because of another rank, unless there is one already."""
        if not self._recorded:
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            self._record([_place(frame) for frame in reversed(frames)], waiting=True, failed=True)

    def _record(self, stack: list[str], *, waiting: bool, failed: bool = False) -> None:
        self._recorded = True
        record = {
            "rank": self.rank.rank,
            "host": self.rank.host,
            "pid": os.getpid(),
            "attempt": self.rank.attempt,
            "time": time.time(),
            "step": self._step,
            "waiting": waiting,
            "stack": stack,
            **flight_record(self.mesh, failed=failed),
        }
        partial = self.path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(record))
            partial.replace(self.path)


def flight_record(mesh: Mesh, *, failed: bool = False) -> dict[str, Any]:
    """The process groups of this rank by torch's name for them, the number of collectives that each has entered, and
    the last of these, oldest first. ``failed``: the very last one ended in an error.

    From torch's flight recorder, which is on unless TORCH_FR_BUFFER_SIZE is 0. With gloo, an entry's state stays
    "scheduled"; once it has ended, it is marked as retired.
    """
    if not torch_dist.is_initialized():
        return {"groups": {}, "entered": {}, "collectives": []}
    axes = [axis for field in fields(mesh) if isinstance(axis := getattr(mesh, field.name), Axis) and axis.group]
    named = {axis.group.group_name: axis.name for axis in axes if axis.group}
    owners = {
        (axis.group.group_name, number): (layer, backward)
        for axis in axes
        if axis.group
        for number, layer, backward in list(axis.calls)
    }
    groups = {
        group.group_name: {"axis": named.get(group.group_name), "ranks": torch_dist.get_process_group_ranks(group)}
        for group in list(torch_dist.distributed_c10d._world.pg_map)
    }
    dump = json.loads(torch._C._distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    entries = [entry for entry in dump.get("entries", []) if not entry["is_p2p"]]
    entered: dict[str, int] = {}
    collectives: list[dict[str, Any]] = []
    for i, entry in enumerate(entries):
        name, number = entry["process_group"][0], entry["collective_seq_id"]
        entered[name] = max(number, entered.get(name, 0))
        layer, backward = owners.get((name, number), ("", False))
        collectives.append(
            {
                "group": name,
                "number": number,
                "op": entry["profiling_name"].partition(":")[2],
                "sizes": entry["input_sizes"],
                "dtypes": entry["input_dtypes"],
                "done": (entry["retired"] or entry["state"] == "completed") and not (failed and i == len(entries) - 1),
                "created": entry["time_created_ns"] / 1e9,
                "layer": layer,
                "backward": backward,
            }
        )
    kept = [c for c in collectives if not c["done"] or c["number"] > entered[c["group"]] - _KEPT]
    return {"groups": groups, "entered": entered, "collectives": kept}


def waits(frame: FrameType) -> bool:
    """Whether a thread with this innermost frame is in a collective, waiting for other ranks.

    On a GPU, where collectives are only queued, the wait shows where the host reads a number (``comm.read``).
    """
    code = frame.f_code
    file = code.co_filename
    if "/deepspeed/" in file:
        return code.co_name == "wait" or "/deepspeed/comm/" in file
    return code in _WAITS or "/torch/distributed/" in file


def _places(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield _place(frame)
        frame = frame.f_back


def _place(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    if file.is_relative_to(_PACKAGE):
        name = str(file.relative_to(_PACKAGE.parent))
    else:
        name = str(file).rpartition("site-packages/")[2]
    return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"


class Stragglers:
    """Finds, on rank 0, a rank that all others wait for, from the busy times of all ranks.

    A rank is reported if in two windows in a row it was busy ``_RATIO`` times as long as the median rank and the
    difference was over ``_SHARE`` of the window; it is reported again after ``_QUIET_S`` at the earliest.
    """

    _WINDOW_S, _RATIO, _SHARE, _QUIET_S = 3.0, 1.3, 0.15, 600.0

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self._busy = [0.0] * len(hosts)
        self._began: float | None = None
        self._suspect: int | None = None
        self._told: dict[int, float] = {}

    def add(self, busy: Sequence[float], now: float) -> str:
        """Add the seconds that each rank was busy since the last call; returns a warning if one is due, else an empty
        string."""
        if self._began is None:  # what came before, start-up and compilation, does not count
            self._began = now
            return ""
        self._busy = [sum(pair) for pair in zip(self._busy, busy, strict=True)]
        window = now - self._began
        if window < self._WINDOW_S:
            return ""
        total, self._busy, self._began = self._busy, [0.0] * len(self.hosts), now
        slowest = max(range(len(total)), key=total.__getitem__)
        median = statistics.median_low(total)
        slow = total[slowest] > self._RATIO * median and total[slowest] - median > self._SHARE * window
        again, self._suspect = self._suspect == slowest, slowest if slow else None
        if not (slow and again) or now - self._told.get(slowest, -self._QUIET_S) < self._QUIET_S:
            return ""
        self._told[slowest] = now
        ratio = f"{total[slowest] / median:.1f}" if median > 0.01 * window else "over 100"
        return (
            f"rank {slowest} ({self.hosts[slowest]}) is slow, {ratio} times the median rank: it works "
            f"{min(total[slowest] / window, 1):.0%} of the time, the median rank {median / window:.0%}; the others wait"
        )
