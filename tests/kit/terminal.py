"""Run a command on a terminal of its own, and type at it."""

import contextlib
import os
import pty
import select
import signal
import time
import uuid
from collections.abc import Mapping, Sequence

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
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            os.chdir(REPOSITORY)
            heed_signals()
            os.execve(argv[0], list(argv), {**os.environ, **(env or {}), MARK: mark})
        finally:
            os._exit(127)
    screen, waiting, struck = b"", list(typed), began
    with contextlib.suppress(OSError):  # raised when the job has closed the other side
        while time.monotonic() - began < timeout:
            if select.select([terminal], [], [], 0.1)[0]:
                screen += os.read(terminal, 65536)
            if waiting and waiting[0][0].encode() in screen:
                time.sleep(0.6)
                struck = time.monotonic()
                os.write(terminal, waiting.pop(0)[1])
    ended, status = os.waitpid(pid, os.WNOHANG if time.monotonic() - began >= timeout else 0)
    seconds, exit_code = time.monotonic() - struck, os.waitstatus_to_exitcode(status) if ended else None
    orphans = kill_marked(mark)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.close(terminal)
    text = screen.decode(errors="replace").replace("\r\n", "\n")
    return Result(list(argv), exit_code, text, "", seconds, orphans if ended else [])
