"""Runs a function on several ranks of this machine over gloo, for ``prove`` and the tests.

Ranks are forked from a server process that has already imported what they need, so they start in about a second.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from megatron_lite.errors import MegatronLiteError, PeerError


def _rank_main(
    pipe: Connection, fn: Callable[..., Any], rank: int, size: int, store: str, limit: float, args: bytes
) -> None:
    torch.set_num_threads(1)

    def answer(status: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((status, value)))

    try:
        if size > 1:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=limit)
            )
            torch.distributed.barrier()  # so that a rank that fails at once has at least joined its peers
        answer("ok", fn(rank, size, *pickle.loads(args)))  # noqa: S301 - our own parent wrote it
        if size > 1:
            torch.distributed.destroy_process_group()
    except MegatronLiteError as error:
        answer("refused", error)
    except BaseException:  # the parent re-raises it with the rank's number
        answer("failed", traceback.format_exc())


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(rank, size, *args)`` in ``size`` processes that share a gloo process group; results in rank order.

    ``fn`` must be importable by name. Raises the MegatronLiteError of the rank that failed first, or PeerError with its
    traceback, or PeerError after ``timeout`` seconds. No process is left behind in any case.
    """
    # As bytes: multiprocessing would send tensors as shared memory, which disappears with the sending process.
    pickled = pickle.dumps(args)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([fn.__module__, "torch._dynamo"])  # torch's optimizers import the latter
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], []
        try:
            for rank in range(size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_rank_main, args=(theirs, fn, rank, size, store, timeout, pickled))
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(pipes, deadline, timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Any], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready: list[Any] = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise PeerError(f"ranks {sorted(pending.values())} did not finish within {timeout:g} s")
        for pipe in ready:
            rank = pending[pipe]
            try:
                status, value = pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own child wrote it
            except EOFError:
                raise PeerError(f"rank {rank} ended without a result") from None
            if status == "refused":
                raise value
            if status == "failed":
                raise PeerError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]
