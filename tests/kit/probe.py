"""A program that tells how it was started, then ends as it is told: ``python -m tests.kit.probe ENDING``."""

import atexit
import faulthandler
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path


def seen() -> dict:
    streams = {stream.fileno(): stream for stream in (sys.stdin, sys.stdout, sys.stderr) if stream is not None}
    command = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "shown": [word.decode() for word in command],
        "path": sys.path,
        "cwd": str(Path.cwd()),
        "env": dict(os.environ),
        "descriptors": sorted(fd for path in Path("/proc/self/fd").iterdir() if _open(fd := int(path.name))),
        "streams": {
            fd: (s.encoding, s.errors, s.line_buffering, s.write_through, type(s.buffer).__name__)
            for fd, s in streams.items()
        },
        "ignored": sorted(n.name for n in signal.Signals if signal.getsignal(n) == signal.SIG_IGN),
        "handled": sorted(n.name for n in signal.Signals if callable(signal.getsignal(n))),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "child of the asker": os.environ.get("ASKER") in (None, str(os.getppid())),
        "threads": threading.active_count(),
        "tasks": len(list(Path("/proc/self/task").iterdir())),
        "loggers": [logging.root.level, len(logging.root.handlers), logging.getLogger("probe").level],
        "warnings": len([f for f in warnings.filters if f[0] == "error"]),
        "faulthandler": faulthandler.is_enabled(),
        "tempdir": tempfile.gettempdir(),
        "torch is there": "torch" in sys.modules,
        "main": [__name__, __spec__.name, sys.modules["__main__"].__dict__ is globals()],
    }


def _open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def disturb() -> None:
    """Leave behind in this process what its child must not find."""
    sys.path.append("/parent")
    logging.basicConfig(level=logging.DEBUG)
    logging.getLogger("probe").setLevel(7)
    warnings.simplefilter("error")
    faulthandler.enable()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: print("of the parent", flush=True))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    threading.Thread(target=time.sleep, args=[60], daemon=True).start()
    atexit.register(print, "of the parent", flush=True)
    os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)
    os.environ["FORGOTTEN"] = "no: not in env="
    print("still in the parent's buffer")


def main() -> None:
    ending, *words = sys.argv[1:]
    if ending == "child":
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(disturb, shutil.rmtree, folder)
        disturb()
        sys.stdout.flush()
        kept, env = os.open("/dev/null", os.O_RDONLY), {**os.environ, "ASKER": str(os.getpid())}
        del env["FORGOTTEN"]
        print("in the buffer")
        code = subprocess.run(
            [sys.executable, "-u", "-m", "tests.kit.probe", *words],
            env=env,
            start_new_session=True,
            pass_fds=[kept],
            preexec_fn=lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN),
        ).returncode
        assert folder.is_dir(), "a child has removed what is its parent's"
        print("it ended with", code)
        return
    print(json.dumps(seen()))
    print("an error", file=sys.stderr)
    if ending == "exit":
        atexit.register(print, "at exit")
        sys.exit(int(words[0]) if words[0].isdecimal() else words[0])
    elif ending == "raise":
        raise ValueError("a mistake")
    elif ending == "signal":
        sys.stdout.flush()
        os.kill(os.getpid(), int(words[0]))
        time.sleep(5)
    elif ending == "thread":
        threading.Thread(target=lambda: (time.sleep(0.3), print("a thread is waited for"))).start()
    elif ending == "read":
        print(sys.stdin.read())
    elif ending == "sleep":
        print("sleeps", flush=True)
        time.sleep(60)


if __name__ == "__main__":
    main()
