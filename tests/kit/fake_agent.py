"""What torchrun does with its workers, without torch's start-up: ``python fake_agent.py NPROC ARGV …``.

Each worker gets its own session and its rank; the first failure ends the others with SIGTERM and, 30 s later, SIGKILL.
"""

import os
import signal
import subprocess
import sys
import time


def main() -> int:
    nproc, argv = int(sys.argv[1]), sys.argv[2:]
    workers = []

    def on_signal(signum: int, frame: object) -> None:
        raise SystemExit(signum)

    signal.signal(signal.SIGTERM, on_signal)
    for rank in range(nproc):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(nproc)}
        workers.append(subprocess.Popen([sys.executable, *argv], env=env, start_new_session=True))
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                return 1
            time.sleep(0.02)
        return int(any(worker.returncode for worker in workers))
    finally:
        for signum, limit in ((signal.SIGTERM, 30), (signal.SIGKILL, 5)):
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signum)
            deadline = time.monotonic() + limit
            while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
                time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
