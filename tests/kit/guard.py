"""Ends a cluster from outside the test run, so that nothing of it outlives a run that crashed or was killed.

``python guard.py FOLDER`` reads one place a line until its stdin closes, which the run's death does, too; then it kills
every process in these places and removes the folder. A place is a network namespace, as ``/proc/PID/ns/net`` names it,
or a host's folder, which its processes carry in their environment and its ssh server on its command line.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

MARK = "MLITE_TEST_HOST"  # names a host's folder in the environment of all that runs on it


def inhabitants(place: str) -> list[int]:
    """The process ids of everything alive in a place."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and _is_in(entry, place)]


def _is_in(process: Path, place: str) -> bool:
    try:
        if place.startswith("net:"):
            return str((process / "ns/net").readlink()) == place
        argv = (process / "cmdline").read_bytes()  # sshd writes its title over its environment
        return f"{MARK}={place}".encode() in (process / "environ").read_bytes().split(b"\0") or (
            b"sshd" in argv and f"{place}/sshd_config".encode() in argv
        )
    except OSError:  # gone, a zombie, or another user's
        return False


def kill_all(place: str, spare: Iterable[int] = (), seconds: float = 10) -> list[int]:
    """SIGKILL everything in a place but ``spare``, until nothing is left; returns what was killed."""
    killed: set[int] = set()
    deadline = time.monotonic() + seconds
    while left := set(inhabitants(place)) - set(spare):
        assert time.monotonic() < deadline, f"still there {seconds:g} s after SIGKILL: {left}"
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        killed |= left
        time.sleep(0.01)
    return sorted(killed)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        for line in list(sys.stdin):
            kill_all(line.rstrip("\n"))
    finally:
        shutil.rmtree(sys.argv[1], ignore_errors=True)
