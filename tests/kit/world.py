"""Ranks that outlive a test: functions are sent to them, and one world does for all that compare layouts."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from launch.process import die_with_parent
from megatron_lite.distributed.spawn import _collect
from megatron_lite.errors import MegatronLiteError
from tests.kit import warm

LOADED = warm.DEEPSPEED if find_spec("deepspeed") else warm.DEEPSPEED[:1]


class World:
    """``size`` ranks over gloo. They start with the first function, and anew after one that has failed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ranks: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 100) -> list[Any]:
        """``run_ranks``, in ranks that are there already: what a function leaves behind, the next one finds."""
        try:
            if not self.ranks:
                self._start()
            for _, pipe in self.ranks:
                pipe.send_bytes(pickle.dumps((function, args)))
            return _collect([pipe for _, pipe in self.ranks], time.monotonic() + timeout, timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for _, pipe in self.ranks:
            pipe.close()  # a sound rank ends by itself
        deadline = time.monotonic() + 5
        for process, _ in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process, _ in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started: Megatron leaves a process behind
            process.wait()
        if self.ranks:
            self.folder.cleanup()
        self.ranks = []

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            ours, theirs = Pipe()
            words = map(str, (theirs.fileno(), rank, self.size, f"{self.folder.name}/store"))
            argv = [sys.executable, "-m", "tests.kit.world", *words]
            with theirs, warm.starts(*LOADED):
                self.ranks.append((subprocess.Popen(argv, pass_fds=[theirs.fileno()], process_group=0), ours))


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """The library's ``run_ranks``, in ranks that start warm and end with it: for what changes its process."""
    with contextlib.closing(World(size)) as world:
        return world.run(function, *args, timeout=timeout)


def main(fd: str, rank: str, size: str, store: str) -> None:
    """One rank, which does what it is sent."""
    die_with_parent()
    torch.set_num_threads(1)
    pipe, place = Connection(int(fd)), {"rank": int(rank), "world_size": int(size)}
    limit = timedelta(seconds=300)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", timeout=limit, **place)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own parent wrote it
            answer = "ok", function(*place.values(), *args)
        except EOFError:
            return
        except MegatronLiteError as error:
            answer = "refused", error
        except BaseException:
            answer = "failed", traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
