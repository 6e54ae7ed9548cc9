"""What Linux offers to keep a family of processes together: death signals, adoption, and the process table."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent ends, however that happens."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none can slip away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def start(argv: list[str], unblock: Iterable[signal.Signals], **options: Any) -> subprocess.Popen[bytes]:
    """``Popen`` of a process that dies with this one and that does not inherit the blocking of ``unblock``."""
    parent, unblock = os.getpid(), set(unblock)

    def prepare() -> None:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, unblock)
        if os.getppid() != parent:  # it ended before the death signal was set
            os._exit(1)

    return subprocess.Popen(argv, preexec_fn=prepare, **options)


def state(pid: int) -> str:
    """The kernel's letter for what ``pid`` does (R, S, D, T stopped, Z zombie), or an empty string if it is gone."""
    return _stat(pid)[0]


def descendants() -> list[int]:
    """All living processes below this one, parents before children; zombies are left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            letter, parent = _stat(int(entry.name))
            if letter not in ("", "Z"):
                children.setdefault(parent, []).append(int(entry.name))
    found = [os.getpid()]
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, []))
    return found[1:]


def reap(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """Collect dead children: those of a Popen through it, the others, adopted orphans mostly, from the kernel."""
    known = set()
    for child in children:
        child.poll()
        known.add(child.pid)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in known and _stat(int(entry.name)) == ("Z", os.getpid()):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(entry.name), os.WNOHANG)


def kill_all(children: Iterable[subprocess.Popen[bytes]], limit_s: float) -> list[int]:
    """Kill everything below this process, again until nothing is left: orphans are adopted, and come up next.

    ``children`` are collected through their Popen. Returns what the kernel has not ended after ``limit_s``.
    """
    children, deadline = list(children), time.monotonic() + limit_s
    while (pids := descendants()) and time.monotonic() < deadline:
        for pid in pids:
            send(pid, signal.SIGKILL)
        time.sleep(0.01)
        reap(children)
    reap(children)
    return pids


def send(pid: int, signum: int) -> None:
    """``os.kill`` that does not mind a process that has just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _stat(pid: int) -> tuple[str, int]:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    letter, parent = text[text.rindex(b")") + 1 :].split()[:2]  # the name in parentheses may hold anything
    return letter.decode(), int(parent)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
