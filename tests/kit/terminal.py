"""Run a command on a terminal of its own, and type at it."""

import contextlib
import fcntl
import os
import pty
import select
import subprocess
import termios
import time
import uuid
from collections.abc import Mapping, Sequence

from tests.kit import warm
from tests.kit.jobs import MARK, REPOSITORY, Result, heed_signals, kill_marked

CTRL_C = b"\x03"


def run_on_terminal(
    argv: Sequence[str], typed: Sequence[tuple[str, bytes]], *, timeout: float, env: Mapping[str, str] | None = None
) -> Result:
    """Run ``argv`` as the foreground job of a pseudo-terminal; its whole screen is the result's ``stdout``.

    Each entry of ``typed`` is a text to wait for and the keys to press 0.6 s after it has appeared; the result's time
    counts from the last.
    """
    began, mark = time.monotonic(), uuid.uuid4().hex
    terminal, theirs = pty.openpty()
    with warm.starts():
        process = subprocess.Popen(
            argv,
            cwd=REPOSITORY,
            env={**os.environ, **(env or {}), MARK: mark},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
    os.close(theirs)
    screen, waiting, struck = b"", list(typed), began
    with contextlib.suppress(OSError):  # raised when the job has closed the other side
        while time.monotonic() - began < timeout:
            if select.select([terminal], [], [], 0.1)[0]:
                screen += os.read(terminal, 65536)
            if waiting and waiting[0][0].encode() in screen:
                time.sleep(0.6)
                struck = time.monotonic()
                os.write(terminal, waiting.pop(0)[1])
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, began + timeout - time.monotonic()))
    seconds, exit_code = time.monotonic() - struck, process.poll()
    orphans = kill_marked(mark)
    process.wait()
    os.close(terminal)
    text = screen.decode(errors="replace").replace("\r\n", "\n")
    return Result(list(argv), exit_code, text, "", seconds, orphans if exit_code is not None else [])


def take_terminal() -> None:
    """Make the standard input this session's terminal."""
    heed_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
