"""The program on every other host: ``python -m launch.watch.host``, started through ssh by ``launch/hosts/ssh.py``.

It reads what to start from stdin (one line of JSON), starts it, and ends with it. The rest of stdin is a lifeline on
which the launcher sends a byte every second. If the pipe closes or falls silent (the launcher was killed, its machine
is gone, the link is cut), everything that was started here is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from launch import process
from launch.watch.report import PEER_LOST, STORAGE

BEAT_S = 1.0  # seconds between two bytes from the launcher
_SILENCE_S = 30.0  # seconds without a byte after which this host gives up
_POLL_S = 0.1
_DEATH_LIMIT_S = 10.0


def run(order: dict[str, Any]) -> int:
    """Start ``order["argv"]`` and watch it and the lifeline; returns its exit code, 128 + N after signal N."""
    log_dir = Path(order["log_dir"])
    os.chdir(order["cwd"])
    if not (log_dir / "launcher.lock").exists():
        print(
            f"error: {order['host']}: no {log_dir} here; the run folder has to be on a file system that hosts share",
            file=sys.stderr,
        )
        return STORAGE
    process.adopt_orphans()
    with (log_dir / f"torchrun.{order['host']}.log").open("ab") as log:
        child = process.start(
            order["argv"],
            unblock=(),
            stdin=sys.stderr.fileno(),  # see launch/launchers/torchrun.py
            stderr=log,
            env={**os.environ, **order["env"]},
            start_new_session=True,
        )
    try:
        return _watch(child)
    finally:
        process.kill_all([child], _DEATH_LIMIT_S)


def _watch(child: subprocess.Popen[bytes]) -> int:
    heard = time.monotonic()
    while child.poll() is None:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable:
            if not os.read(0, 4096):
                return PEER_LOST
            heard = time.monotonic()
        elif time.monotonic() - heard > _SILENCE_S:
            return PEER_LOST
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def main() -> NoReturn:
    """Read the order and run it. SIGHUP is ignored: when ssh hangs up, the lifeline shows it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: bytes after the line belong to the lifeline
        byte = os.read(0, 1)
        if not byte:
            raise SystemExit(PEER_LOST)
        line += byte
    raise SystemExit(run(json.loads(line)))


if __name__ == "__main__":
    main()
