"""The shim around each rank: ``python -m launch.watch.rank --log-dir=DIR [OPTIONS] -- PROGRAM …``.

It copies the rank's output to ``DIR/rank_N.log``, passes signals on, and reports how the rank ended (``report.py``),
because launchers return neither exit codes nor signals. Options: ``--rank=VARIABLE`` that holds the rank (RANK),
``--stderr-fd=N`` for rank 0's errors, ``--control=FILE`` in which a launcher on another machine writes its requests,
and ``--lease`` to end when that launcher falls silent. ``--file=FILE`` replaces all of these: it holds the arguments,
and variables to set.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from launch import process
from launch.hosts import network
from launch.watch.report import PREEMPTED, Report, last_words

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)  # torchrun passes these on
_STOPPED_LIMIT_S = 2.0  # seconds that a rank asked to save may stay stopped (SIGSTOP) before it is killed
_POLL_S, _CONTROL_S = 0.2, 1.0
_LEASE_S = 30.0  # a rank with a lease ends when its launcher has been silent for this long
SAVE, END = "save", "end"  # requests in the control file, each followed by the attempt it is for
_TAIL_BYTES = 8192
_INHERITED = ("PMI_FD",)  # names the descriptor on which MPICH's MPI_Init talks to mpiexec


class Copier(threading.Thread):
    """Copies a pipe to a log in whole lines and, for rank 0, to the console at once.

    A full disk or a closed console never blocks the rank.
    """

    def __init__(self, pipe: io.FileIO, log: io.FileIO, console: int | None) -> None:
        super().__init__(daemon=True)
        self.pipe, self.log, self.console = pipe, log, console
        self.line, self.tail = b"", b""  # the unfinished line; the end of the output

    def run(self) -> None:
        while chunk := os.read(self.pipe.fileno(), 65536):
            self.tail = (self.tail + chunk)[-_TAIL_BYTES:]
            self._to_log(chunk)
            self._to_console(chunk)
        self._to_log(b"")

    def _to_log(self, chunk: bytes) -> None:
        text = self.line + chunk
        end = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if not chunk or len(text) - end > _TAIL_BYTES:
            end = len(text)
        self.line = text[end:]
        with contextlib.suppress(OSError):  # the disk may be full only for now
            self.log.write(text[:end])

    def _to_console(self, chunk: bytes) -> None:
        try:
            while self.console is not None and chunk:
                chunk = chunk[os.write(self.console, chunk) :]
        except OSError:  # its reader went away
            self.console = None


def run(
    log_dir: Path,
    program: list[str],
    rank: int,
    attempt: int,
    console: tuple[int, int] | None,
    control: Control | None = None,
) -> int:
    """Run ``program`` to its end. ``console``: descriptors for its stdout and stderr, if they are shown. ``control``:
    the requests of a launcher that cannot send signals.

    Returns the exit code for the launcher: the program's own, or 128 + N after signal N. A preempted program returns 0,
    so that the launcher does not kill its peers, which may still be saving.
    """
    watched = {*_STOP, signal.SIGUSR2, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    log = (log_dir / f"rank_{rank}.log").open("ab", buffering=0)
    # mpirun gives ranks a terminal of its own, on which both streams are one.
    on_terminal = console is not None and console[0] != console[1] and os.isatty(console[0])
    relayed, relay = os.pipe()
    child = process.start(
        program,
        unblock=watched,
        env={**os.environ, "MLITE_RELAY": str(relayed)},
        stdin=subprocess.DEVNULL,
        stdout=console[0] if console and on_terminal else subprocess.PIPE,  # a progress line needs the terminal itself
        stderr=subprocess.STDOUT if console is None else subprocess.PIPE,
        bufsize=0,
        pass_fds=[relayed, *(int(os.environ[name]) for name in _INHERITED if os.environ.get(name, "").isdecimal())],
        process_group=0,  # torchrun signals our whole group: the program would get each signal twice
    )
    report = Report(rank, socket.gethostname(), child.pid, os.getpid(), attempt, time.time())
    with contextlib.suppress(OSError):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(report.started))
        log.write(f"# rank {rank}, attempt {attempt}, pid {child.pid} on {report.host}, {stamp}\n".encode())
    report.write_start(log_dir)
    outputs = [(child.stdout, console and console[0]), (child.stderr, console and console[1])]
    copiers = [Copier(pipe, log, fd) for pipe, fd in outputs if pipe]  # type: ignore[arg-type]
    for copier in copiers:
        copier.start()

    asked, stopped = _wait(child, watched, control, relay)

    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # processes that the program left behind
    for copier in copiers:
        copier.join(timeout=1)
    signum, code = max(0, -child.returncode), max(0, child.returncode)
    ended = replace(
        report,
        exit_code=None if signum else code,
        signal=signum or None,
        asked=asked,
        stopped=stopped,
        time=time.time(),
        message=last_words(copiers[-1].tail) if child.returncode not in (0, PREEMPTED) else "",
    )
    ended.write_end(log_dir)
    return 128 + signum if signum else code if code != PREEMPTED else 0


def _wait(
    child: subprocess.Popen[bytes], watched: set[signal.Signals], control: Control | None, relay: int
) -> tuple[bool, bool]:
    """Pass signals and requests on until ``child`` ends. Returns (asked to stop, killed because it stayed SIGSTOPped).

    A byte in ``relay`` tells the program that a signal came through the shim, so that the same request, arriving again
    from elsewhere, does not count as a second one.
    """
    asked, stopped, stopped_since = False, False, 0.0
    while child.poll() is None:
        received = signal.sigtimedwait(watched, _POLL_S if asked else _CONTROL_S if control else 60)
        wanted = control.read() if control else ""
        if wanted == END:
            process.send(child.pid, signal.SIGKILL)
        if received and received.si_signo == signal.SIGUSR2:
            process.send(child.pid, signal.SIGUSR2)
        elif (wanted == SAVE or (received and received.si_signo in _STOP)) and not asked:
            asked = True  # supervisor and torchrun may both ask; a second signal would end the save
            os.write(relay, b"1")
            process.send(child.pid, signal.SIGTERM)
        if not asked or process.state(child.pid) != "T":
            stopped_since = 0.0
        elif not stopped_since:
            stopped_since = time.monotonic()
        elif time.monotonic() - stopped_since > _STOPPED_LIMIT_S:
            stopped = True
            process.send(child.pid, signal.SIGKILL)
    # A signal to the whole process group may end the program between fork and exec, before this process has read its
    # own.
    return asked or not signal.sigpending().isdisjoint(_STOP), stopped


class Control:
    """A file through which a launcher on another machine sends requests, and shows that it is alive by changing it.

    Its text is ``REQUEST ATTEMPT NUMBER``. It is opened anew for every read, since network file systems refresh a file
    when it is opened.
    """

    def __init__(self, path: Path, attempt: int, *, lease: bool) -> None:
        self.path, self.attempt, self.lease = path, str(attempt), lease
        self.text, self.since = "", time.monotonic()

    def read(self) -> str:
        """The current request: SAVE, END or an empty string. END also if a lease has expired."""
        with contextlib.suppress(OSError):
            text = self.path.read_text()
            if text != self.text:
                self.text, self.since = text, time.monotonic()
        if self.lease and time.monotonic() - self.since > _LEASE_S:
            return END
        request, _, rest = self.text.partition(" ")
        return request if rest.partition(" ")[0] == self.attempt else ""


def _arguments() -> list[str]:
    """The command line, or the content of ``--file``, whose variables and working directory are then set."""
    argv = sys.argv[1:]
    if not argv[0].startswith("--file="):
        return argv
    order = json.loads(Path(unquote(argv[0].removeprefix("--file=").replace("=", "%"))).read_text())
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    return list(order["argv"])


def main() -> NoReturn:
    """Read the command line and the launcher's variables, and run the rank."""
    gc.freeze()
    process.die_with_parent()
    if os.getppid() == 1:
        raise SystemExit("launch.watch.rank: the launcher has gone")
    argv = _arguments()
    os.environ.update(network.interface_env(os.environ))
    split = argv.index("--")
    options = dict(option.removeprefix("--").partition("=")[::2] for option in argv[:split])
    program, log_dir = argv[split + 1 :], Path(options["log-dir"])
    rank, attempt = int(os.environ[options.get("rank", "RANK")]), int(os.environ.get("MLITE_ATTEMPT", "0"))
    console = (1, int(options.get("stderr-fd", "2"))) if rank == 0 else None
    control = Control(Path(options["control"]), attempt, lease="lease" in options) if "control" in options else None
    try:
        raise SystemExit(run(log_dir, program, rank, attempt, console, control))
    except OSError as error:
        print(f"error: rank {rank} could not be started: {error}", file=sys.stderr)
        raise SystemExit(7 if error.filename != program[0] else 2) from None


if __name__ == "__main__":
    main()
