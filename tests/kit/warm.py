"""Programs of ours that start without their imports, which are four fifths of what a short launch costs.

with warm.starts():
    subprocess.Popen([sys.executable, "-m", "launch", "run", …])     # forked instead of executed

A server has imported everything and done nothing with it. It forks what ``Popen`` would execute, and hands the process
over to whoever asked: parents and children, process groups, signals, descriptors and exit codes are those of a true
start. So it goes on in what it starts: launcher, torchrun, the shim around a rank and the rank are each a fork of the
one before, made as new by ``_become``. Whatever is no program of ours, or wants another Python, is executed as ever.

Not as in a true start: memory, time, the seed of hashes, and modules that are loaded although nobody asked for them.
Tests of these, and one of each way to start, are cold.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import importlib
import inspect
import io
import logging
import os
import pickle
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "MLITE_TEST_JOB"  # in the environment of everything a job starts, so that orphans are found wherever they are
PROGRAMS = {  # what ``python -m`` names, and the module that this runs
    **{name: f"{name}.__main__" for name in ("launch", "megatron_lite", "data_tools")},
    **{name: name for name in ("launch.watch.rank", "torch.distributed.run", "megatron_lite.distributed.bandwidth")},
    **{name: name for name in ("tests.kit.world", "tests.kit.probe")},
}
_MORE = (
    *("torch.utils.tensorboard", "megatron_lite.training.run", "megatron_lite.inference.generate"),
    *("megatron_lite.engines.ddp", "megatron_lite.engines.fsdp", "torch._dynamo"),  # the last by torch's optimizers
)
# What ranks import one by one under DeepSpeed, with what it asks torch.compile for when it is asked for ZeRO.
DEEPSPEED = (
    *("torch._inductor.compile_fx", "megatron_lite.engines.deepspeed"),
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
# Variables that the interpreter, a library or torch reads while it is loaded.
_EARLY = ("PYTHON", "LD_", "LC_", "LANG", "OMP_", "MKL_", "TORCH_LOGS", "TORCH_SHOW")
_ROOM = 8000  # for the command line that a process shows
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>


class Start(NamedTuple):
    """What ``subprocess`` hands to its function in C that forks and executes."""

    args: list[str]
    executables: tuple[bytes, ...]
    close_fds: bool
    fds_to_keep: tuple[int, ...]
    cwd: str | None
    env: list[bytes] | None
    p2cread: int
    p2cwrite: int
    c2pread: int
    c2pwrite: int
    errread: int
    errwrite: int
    errpipe_read: int
    errpipe_write: int
    restore_signals: bool
    start_new_session: bool
    process_group: int
    gid: int | None
    gids: list[int] | None
    uid: int | None
    umask: int
    preexec_fn: Callable[[], Any] | None
    vfork: bool = False  # which later Pythons no longer pass

    @property
    def variables(self) -> dict[str, str]:
        if self.env is None:
            return dict(os.environ)
        return {name: value for name, _, value in (os.fsdecode(line).partition("=") for line in self.env)}

    @property
    def folder(self) -> Path:
        return Path(self.cwd or "").absolute()

    @property
    def unbuffered(self) -> bool:
        return "-u" in self.args[1:2] or bool(self.variables.get("PYTHONUNBUFFERED"))

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return [os.fsdecode(word) for word in self.args][2 + ("-u" in self.args[1:2]) :]

    def warm(self, early: dict[str, str]) -> bool:
        """Whether a process with these variables can become this one."""
        if self.args[0] != sys.executable or self.args[-len(self.words) - 1] != "-m" or self.words[0] not in PROGRAMS:
            return False
        elsewhere = self.folder.resolve() != REPOSITORY and any(
            (self.folder / name.partition(".")[0]).exists() for name in PROGRAMS
        )
        return early == _read_early(self.variables) and not elsewhere and self.uid is None and self.gid is None


def _read_early(variables: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in variables.items() if k.startswith(_EARLY) and k != "PYTHONUNBUFFERED"}


_AT_FIRST = dict(os.environ)  # whatever a test has changed by the time of the first start
_execute: Callable[..., int] = subprocess._fork_exec  # type: ignore[attr-defined]


@contextlib.contextmanager
def starts(*more: str) -> Iterator[None]:
    """Have this process's ``Popen`` start programs of ours warm, in the block, with ``more`` modules loaded."""
    subprocess._fork_exec = _server(more).start  # type: ignore[attr-defined]
    try:
        yield
    finally:
        subprocess._fork_exec = _execute  # type: ignore[attr-defined]


@cache
def _server(more: tuple[str, ...]) -> Server:
    return Server(more)


class Server:
    """The process that forks, as the one sees it that asks."""

    def __init__(self, more: tuple[str, ...]) -> None:
        self.connection, theirs = socket.socketpair()
        self.early = _read_early(_AT_FIRST)
        argv = [sys.executable, "-c", f"from tests.kit import warm; warm.serve({theirs.fileno()}, {more})", " " * _ROOM]
        with theirs:
            self.process = subprocess.Popen(
                argv,
                cwd=REPOSITORY,
                env={**_AT_FIRST, MARK: "0" * 32},  # a place for another
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def start(self, *fork_exec: Any) -> int:
        start = Start(*fork_exec)
        if not start.warm(self.early):
            return _execute(*fork_exec)
        given = (start.p2cread, start.c2pwrite, start.errwrite)
        streams = [own if fd == -1 else fd for own, fd in enumerate(given)]
        passed = tuple(fd for fd in start.fds_to_keep if fd != start.errpipe_write)
        fds = [*streams, start.errpipe_write, *passed]
        env = [os.fsencode(f"{name}={value}") for name, value in start.variables.items()]
        order = pickle.dumps(start._replace(cwd=str(start.folder), env=env, fds_to_keep=passed))
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            socket.send_fds(self.connection, [len(order).to_bytes(8, "little")], fds)
            self.connection.sendall(order)
            return int.from_bytes(_receive(self.connection, 8), "little")
        finally:
            _prctl(_PR_SET_CHILD_SUBREAPER, 0)


class _Loaded:
    """What modules have left behind when all are loaded, and what was added in a process since."""

    early: dict[str, str]
    loggers: dict[str, tuple[int, list[logging.Handler], bool, bool]]
    path: list[str]
    filters: list[Any]
    streams: tuple[Any, Any, Any]
    exits: list[Any]
    kept: list[object]


def serve(fd: int, more: tuple[str, ...]) -> None:
    """Load everything, then fork what is asked for until nobody is left to ask."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asking, connection = os.getppid(), socket.socket(fileno=fd)
    for name in (*PROGRAMS.values(), *_MORE, *more):
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "an import has started a thread"
    for name in PROGRAMS.values():
        del sys.modules[name]  # which is run as __main__
    _Loaded.early = _read_early(dict(os.environ))
    _Loaded.loggers = {
        name: (logger.level, list(logger.handlers), logger.propagate, logger.disabled) for name, logger in _loggers()
    }
    _Loaded.path, _Loaded.filters, _Loaded.exits, _Loaded.kept = sys.path[1:], list(warnings.filters), [], []
    _Loaded.streams = (sys.stdin, sys.stdout, sys.stderr)
    register = atexit.register

    def note(function: Any, *args: Any, **kwargs: Any) -> Any:
        _Loaded.exits.append(function)
        return register(function, *args, **kwargs)

    atexit.register = note  # type: ignore[assignment]
    subprocess._fork_exec = _fork  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()
    while True:
        head, fds, _, _ = socket.recv_fds(connection, 8, 64)
        if not head:
            return
        order: Start = pickle.loads(_receive(connection, int.from_bytes(head, "little")))  # noqa: S301 - ours wrote it
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:  # its end gives its child to who has asked
            if pid := os.fork():
                os.write(tell, pid.to_bytes(8, "little"))
                os._exit(0)
            while os.getppid() != asking:
                os.sched_yield()
            stdin, stdout, stderr, errpipe, *passed = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 512) for fd in fds]
            for fd, number in zip(passed, order.fds_to_keep, strict=True):
                os.dup2(fd, number)
            _child(order._replace(p2cread=stdin, c2pwrite=stdout, errwrite=stderr, errpipe_write=errpipe))
        os.waitpid(between, 0)
        connection.sendall(os.read(told, 8))
        for fd in (*fds, told, tell):
            os.close(fd)


def _fork(*fork_exec: Any) -> int:
    """What ``Popen`` calls in all that began as a fork."""
    start = Start(*fork_exec)
    if not start.warm(_Loaded.early):
        return _execute(*fork_exec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: torchrun has some, of which its child needs none
        pid = os.fork()
    if pid == 0:
        _child(start)
    return pid


def _child(start: Start) -> NoReturn:
    """Become the program, and end as it ends. Nothing of the parent's ever runs here again, whatever is raised."""
    try:
        try:
            _wire(start)
        except BaseException as error:  # as the function in C tells it
            number = error.errno or 0 if isinstance(error, OSError) else 0
            kind = "OSError" if number else "SubprocessError"
            os.write(start.errpipe_write, f"{kind}:{number:x}:{'noexec' if number else error}".encode())
            os._exit(255)
        _become(start)
        os.close(start.errpipe_write)  # so far, Popen has waited
        _end(_run(start.words[0]))
    finally:
        os._exit(255)


def _wire(start: Start) -> None:
    """Descriptors, folder, session and group, in the order of the function in C."""
    given = (start.p2cread, start.c2pwrite, start.errwrite)
    copies = [fd if fd == -1 else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in given]
    for fd, copy in enumerate(copies):
        if copy != -1:
            os.dup2(copy, fd)
    if start.cwd is not None:
        os.chdir(start.cwd)
    if start.umask >= 0:
        os.umask(start.umask)
    if start.start_new_session:
        os.setsid()
    if start.process_group >= 0:
        os.setpgid(0, start.process_group)
    if start.preexec_fn is not None:
        start.preexec_fn()
    keep = {0, 1, 2, start.errpipe_write, *start.fds_to_keep}
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if fd not in keep and (start.close_fds or not _inheritable(fd)):
            with contextlib.suppress(OSError):  # that of the listing itself
                os.close(fd)


def _inheritable(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.get_inheritable(fd)
    return False


def _become(start: Start) -> None:
    """Do away with what the parent has changed, and what executing would have done away with."""
    gc.freeze()  # its garbage is its own
    gc.enable()
    variables = start.variables
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if signal.getsignal(number) != signal.SIG_IGN:
            with contextlib.suppress(OSError, ValueError):  # SIGKILL and its like
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    faulthandler.disable()
    faulthandler.cancel_dump_traceback_later()
    os.environ.clear()
    os.environ.update(variables)
    _show(b"\0".join(map(os.fsencode, start.args)), variables.get(MARK, ""))

    for function in _Loaded.exits:
        atexit.unregister(function)
    _Loaded.exits.clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # temporary folders of the parent's
    for name, logger in _loggers():
        level, handlers, propagate, disabled = _Loaded.loggers.get(name, (logging.NOTSET, [], True, False))
        logger.level, logger.handlers, logger.propagate, logger.disabled = level, list(handlers), propagate, disabled
        logger._cache.clear()
    warnings.filters[:] = _Loaded.filters  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]
    tempfile.tempdir = None
    for nameless in ("<frozen runpy>", "<string>"):  # for which torchrun's logging searches all modules
        inspect.modulesbyfile[str(Path.cwd() / nameless)] = ""
    random.seed()
    sys.modules["numpy"].random.seed()

    _Loaded.kept += [sys.stdin, sys.stdout, sys.stderr, sys.modules["__main__"]]
    streams = [_stream(fd, start.unbuffered) for fd in range(3)]
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    sys.argv, sys.orig_argv = ["-m", *start.words[1:]], [os.fsdecode(word) for word in start.args]
    sys.path[:] = [str(Path.cwd()), *_Loaded.path]
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=sys.modules["builtins"], __annotations__={})
    sys.modules["__main__"] = main
    for name in PROGRAMS.values():
        sys.modules.pop(name, None)


def _stream(fd: int, unbuffered: bool) -> io.TextIOWrapper | None:
    try:
        buffer = open(fd, "wb" if fd else "rb", buffering=0 if fd and unbuffered else -1, closefd=False)  # noqa: SIM115
    except OSError:
        return None
    like, lines = _Loaded.streams[fd], not unbuffered and (fd == 2 or os.isatty(fd))
    return io.TextIOWrapper(
        buffer,  # type: ignore[arg-type]
        encoding=like.encoding,
        errors=like.errors,
        newline=None if fd == 0 else "\n",
        line_buffering=lines,
        write_through=unbuffered,
    )


def _show(command: bytes, mark: str) -> None:
    """Have /proc show this command line and this mark, in the memory where the kernel looks for both."""
    places = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:49]
    begin, end, env, env_end = map(int, places)
    ctypes.memmove(begin, command[: end - begin].ljust(end - begin, b"\0"), end - begin)
    found = ctypes.string_at(env, env_end - env).find(f"{MARK}=".encode())
    ctypes.memmove(env + found + len(MARK) + 1, mark.encode()[:32].ljust(32, b"0"), 32)


def _run(name: str) -> int:
    """Run a module as ``python -m`` does; the exit code, or minus the signal to die by."""
    try:
        runpy._run_module_as_main(name)  # type: ignore[attr-defined]
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        shown = error.__traceback__ and error.__traceback__.tb_next  # without this function
        sys.excepthook(type(error), error.with_traceback(shown), shown)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(code: int) -> NoReturn:
    """Wait for threads, call what is registered, flush, and end, as the interpreter does."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except (OSError, ValueError):
        code = 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _loggers() -> Iterator[tuple[str, logging.Logger]]:
    yield "", logging.root
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            yield name, logger


def _receive(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (more := connection.recv(size - len(found))):
            raise EOFError("the server of warm starts has ended")
        found += more
    return found


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
