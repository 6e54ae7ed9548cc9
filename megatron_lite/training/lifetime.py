"""The life of a rank's process: the lock of the run folder, requests to stop, and how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from megatron_lite import __version__
from megatron_lite.config import Config
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import peer_failure
from megatron_lite.errors import ConfigError, MegatronLiteError, PeerError, Preempted, StorageError

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ONE_WISH_S = 0.5  # the longest time between one request's signals to two processes of a job


@contextlib.contextmanager
def locked(folder: Path, rank: Rank) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; the kernel releases it when the process ends, however it ends. Raises
    ConfigError if another process holds it, StorageError for an OSError."""
    if rank.rank != 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise ConfigError(f"{folder} is in use by {owner}; choose another run.name or end that run") from None
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {rank.host}")
            file.flush()
            yield
    except OSError as error:
        raise StorageError(f"cannot use the run folder: {error.filename or folder}: {error.strerror}") from None


def identity(config: Config) -> dict[str, str]:
    """What must be the same on all ranks of a run: versions, a hash of our code, every key of the config."""
    versions = {}
    for package in ("torch", "deepspeed"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())

    def flat(tree: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(tree, dict):
            for name, value in tree.items():
                yield from flat(value, f"{key}.{name}" if key else name)
        else:
            yield key, str(tree)

    return {
        "python": platform.python_version(),
        **versions,
        "megatron_lite": __version__,
        "megatron_lite's code": code.hexdigest()[:12],
        **dict(flat(config.model_dump(mode="json"), "")),
    }


def _die_with_parent(wanted: bool) -> None:
    """Ask the kernel to kill this process when its parent dies, or take that back. The setting belongs to the calling
    thread."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL if wanted else 0)  # PR_SET_PDEATHSIG


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP ask to save and stop after the current step; a second request ends the process
    at once, and so does the first one before training has begun (``begun``).

    One request may arrive as several signals: a scheduler signals every process of a job, one after another, and the
    processes above this one pass the signal on. The shim (``launch/watch/rank.py``) marks a signal that it passes on
    with a byte in the pipe ``relay``, so it does not count as a second request. Without a shim, a signal does not count
    as one while the scheduler may still be signalling this host's launcher and its ``local_size`` ranks. A thread reads
    the signals, so their times are right even while a collective or a rendezvous blocks the main thread.

    No rank (``attached``) trains on after its launcher has died. But a rank that was asked to stop does save first: its
    launcher, which gets the same signals, often dies before it.
    """

    def __init__(self, relay: int | None = None, *, attached: bool = False, local_size: int = 1) -> None:
        self.asked = self.begun = False
        self._relay, self._attached, self._since = relay, attached, 0.0
        self._one_wish_s = _ONE_WISH_S * (1 if relay is not None or not attached else 1 + local_size)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        if relay is not None:
            os.set_blocking(relay, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _STOP:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's stays ignored
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def _listen(self, reader: int) -> None:
        _die_with_parent(self._attached)
        while received := os.read(reader, 1):
            if received[0] in _STOP:  # other signals with handlers arrive here, too
                self._receive(received[0], time.monotonic())

    def _receive(self, number: int, now: float) -> None:
        if not self.begun:
            print(f"{signal.Signals(number).name}: stopped before training had begun", file=sys.stderr, flush=True)
            os._exit(Preempted.exit_code)
        self.asked = True
        _die_with_parent(False)
        if self._relayed():
            return
        if self._since and now - self._since > self._one_wish_s:
            os._exit(128 + number)
        self._since = self._since or now

    def _relayed(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return self._relay is not None and bool(os.read(self._relay, 1))
        return False


def die(error: BaseException) -> NoReturn:
    """Print the error and exit at once with its exit code: if peers are gone, an orderly shutdown of the process group
    could block."""
    if isinstance(error, MegatronLiteError):
        failure: MegatronLiteError = error
    elif peer_failure(error):
        failure = PeerError(f"lost contact with another rank: {' '.join(str(error).split())[:300]}")
    else:
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)
    prefix = "" if isinstance(failure, Preempted) else "error: "
    for line in str(failure).splitlines():
        print(f"{prefix}{line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure.exit_code)
