"""Process trees on Linux: parent-death signals, subreapers, and the process table."""

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
    """Ask the kernel to kill this process when its parent ends, for whatever reason."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become a subreaper: descendants whose parent ends become our children, so none can escape."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def start(argv: list[str], unblock: Iterable[signal.Signals], **options: Any) -> subprocess.Popen[bytes]:
    """``Popen`` a process that dies with this one, with the signals in ``unblock`` unblocked."""
    parent, unblock = os.getpid(), set(unblock)

    def prepare() -> None:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, unblock)
        if os.getppid() != parent:  # it ended before the death signal was set
            os._exit(1)

    return subprocess.Popen(argv, preexec_fn=prepare, **options)  # preexec_fn is safe: every caller has a single thread


def state(pid: int) -> str:
    """The kernel's state letter of ``pid`` (R, S, D, T stopped, Z zombie), or an empty string if it is gone."""
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
    """Reap dead children: ``children`` through their Popen, all others (mostly adopted orphans) with waitpid."""
    known = set()
    for child in children:
        child.poll()
        known.add(child.pid)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in known and _stat(int(entry.name)) == ("Z", os.getpid()):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(entry.name), os.WNOHANG)


def kill_all(children: Iterable[subprocess.Popen[bytes]], limit_s: float) -> list[int]:
    """Kill every descendant, repeatedly until none is left: orphans are adopted and killed in the next round.

    ``children`` are reaped through their Popen. Returns the pids that are still alive after ``limit_s`` seconds.
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
    """``os.kill``, ignoring a process that has already ended."""
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
