"""The life of a rank's process: who may use the run folder, what asks it to stop, and how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import signal
import sys
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_lite import __version__
from megatron_lite.config import Config
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import peer_failure
from megatron_lite.errors import ConfigError, MegatronLiteError, PeerError, Preempted, StorageError


@contextlib.contextmanager
def locked(folder: Path, rank: Rank) -> Iterator[None]:
    """Hold the run folder's lock on rank 0; the kernel drops it when the process dies, however it dies."""
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
        raise StorageError(f"cannot use the run folder {folder}: {error.strerror}") from None


def identity(config: Config) -> dict[str, str]:
    """What has to be the same on all ranks of a run: versions, our own code, every key of the config."""
    versions = {}
    for package in ("torch", "deepspeed"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
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


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent goes: no rank trains on after its launcher has died."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 ask to save and stop after the current step; a second one ends the process now."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True


def die(error: BaseException) -> NoReturn:
    """Report and leave at once: with peers gone, an orderly shutdown of the process group could block."""
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
