"""Runs units of work in parallel and merges the results in order, on one machine or over the ranks of an MPI job."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from megatron_lite.errors import ConfigError, MegatronLiteError, PeerError

Unit = TypeVar("Unit")
Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1


def run(units: Iterator[Unit], work: Callable[[Unit], Result], merge: Callable[[Result], None], workers: int) -> None:
    """``merge(work(unit))`` for each unit, in order; ``work`` in ``workers`` processes, ``merge`` in this one.

    At most two units for each worker are in progress or waiting to be merged. Raises the first error in the order of
    the units, or PeerError if a worker was killed.
    """
    if workers == 1:
        for unit in units:
            merge(work(unit))
        return
    # spawn: a fork would copy locks held by threads that libraries have started.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _die_with_parent, (os.getpid(),))
    pending: deque[Future[Result]] = deque()
    resource_tracker.ensure_running()  # started now, because its start would unblock SIGINT
    try:
        for unit in units:
            with _interrupts_later():  # submitting may start a worker, which inherits the signal mask
                pending.append(pool.submit(work, unit))
            if len(pending) > 2 * workers:
                merge(pending.popleft().result())
        while pending:
            merge(pending.popleft().result())
    except BrokenProcessPool:
        raise PeerError("a worker process was killed (out of memory?); try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Block SIGINT: delayed to the end of the block in this process, ignored for good by processes started in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent(parent: int) -> None:
    """End this worker when the main process ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def world() -> Any:
    """MPI's communicator of all ranks. Raises ConfigError where mpi4py is not installed."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"started under mpirun, but mpi4py cannot be loaded: {error}") from None
    return MPI.COMM_WORLD


def on_root(comm: Any, action: Callable[[], Result]) -> Result:
    """The result of ``action``, run on rank 0 and broadcast; without MPI (``comm`` is None), just run.

    An error is raised on rank 0; the other ranks exit quietly with its code.
    """
    if comm is None:
        return action()
    with _all_or_none(comm):
        result: Any = None
        error = None
        if comm.rank == 0:
            try:
                result = action()
            except MegatronLiteError as caught:
                error = caught
        result, error = comm.bcast((result, error))
        return result if error is None else _leave(comm, error)


def run_ranks(
    comm: Any, units: Iterator[Unit], work: Callable[[Unit], Result], merge: Callable[[Result], None]
) -> None:
    """``merge(work(unit))`` for each unit, in order; ``work`` on all ranks in turn, ``merge`` on rank 0.

    Each round takes one unit for each rank, and costs one gather and one broadcast.
    """
    with _all_or_none(comm):
        while turn := list(islice(units, comm.size)):
            result: Any = None
            if comm.rank < len(turn):
                try:
                    result = work(turn[comm.rank])
                except MegatronLiteError as error:
                    result = error
            results = comm.gather(result)
            failure = comm.bcast(_merge_turn(results[: len(turn)], merge) if comm.rank == 0 else None)
            if failure is not None:
                _leave(comm, failure)


@contextmanager
def _all_or_none(comm: Any) -> Iterator[None]:
    """Abort all ranks if one fails with an error that the others do not know of: they would wait forever."""
    try:
        yield
    except MegatronLiteError:
        raise  # known to all ranks
    except KeyboardInterrupt:
        comm.Abort(130)
    except Exception:  # a bug of ours
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)


def _merge_turn(results: list[Any], merge: Callable[[Any], None]) -> MegatronLiteError | None:
    try:
        for result in results:
            if isinstance(result, MegatronLiteError):
                return result
            merge(result)
    except MegatronLiteError as error:
        return error
    return None


def _leave(comm: Any, error: MegatronLiteError) -> Any:
    """Raise the error on rank 0, which prints it; end the other ranks with the same exit code."""
    raise error if comm.rank == 0 else SystemExit(error.exit_code)
