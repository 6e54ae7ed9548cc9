"""The supervisor against small stand-ins for the trainer, most of them under a stand-in for torchrun, too."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launch.watch.supervise import _exclusive
from tests.kit.jobs import PYTHON, REPOSITORY, RunningJob, run_job, start_job
from tests.kit.terminal import CTRL_C, run_on_terminal

SUPERVISED = REPOSITORY / "tests" / "kit" / "supervised.py"
ENV = {"PYTHONPATH": str(REPOSITORY)}
PREAMBLE = """
import os, signal, subprocess, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["MLITE_ATTEMPT"])
def meet():  # of two ranks, the second may start much later where the machine is busy
    open(f"{folder}/met_{rank}", "w").close()
    while not os.path.exists(f"{folder}/met_{1 - rank}"): time.sleep(0.02)
def die(signum): os.kill(os.getpid(), signum); time.sleep(60)
def saves(code=75, seconds=0.3):  # what the trainer does when it is asked to stop
    def on_signal(*_):
        print("saving", flush=True); time.sleep(seconds); sys.exit(code)
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): signal.signal(s, on_signal)
    print("ready", flush=True); time.sleep(60)
"""
TRAINS = "saves()"


def argv(
    run_dir: Path, code: str, *, nproc: int = 2, agent: str = "fake", restarts: int = 0, args: tuple = ()
) -> list[str]:
    program = [PYTHON, "-c", f"folder = {str(run_dir)!r}{PREAMBLE}{code}", *args]
    return [PYTHON, str(SUPERVISED), str(run_dir), str(nproc), agent, str(restarts), "--", *program]


def supervised(run_dir: Path, code: str, *, timeout: float = 40, first: int | None = None, **options):
    """A job from start to end; its time counts from the end of rank ``first``."""
    with start_job(argv(run_dir, code, **options), timeout=timeout, env=ENV) as job:
        if first is not None:
            job.wait_for_end_of(run_dir, first)
        return job.finish()


@contextmanager
def training(run_dir: Path, code: str = TRAINS, **options) -> Iterator[RunningJob]:
    """A running job, all of whose ranks have their signal handlers."""
    with start_job(argv(run_dir, code, **options), timeout=40, env=ENV) as job:
        for rank in range(options.get("nproc", 2)):
            job.rank_pid(run_dir, rank)
            while "ready" not in (run_dir / "logs" / f"rank_{rank}.log").read_text():
                time.sleep(0.02)
        yield job


def test_output_goes_to_logs_and_rank_0_to_the_console_as_well(tmp_path: Path) -> None:
    code = "print('out of', rank, flush=True); print('complaint of', rank, file=sys.stderr)"
    result = supervised(tmp_path, code).expect(exit_code=0)
    assert (result.stdout, result.stderr) == ("out of 0\n", "complaint of 0\n")
    for rank in (0, 1):
        header, *lines = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()
        assert header.startswith(f"# rank {rank}, attempt 0, pid ")
        assert sorted(lines) == [f"complaint of {rank}", f"out of {rank}"]
    assert json.loads((tmp_path / "outcome.json").read_text())["status"] == "done"


def test_a_killed_rank_is_named_although_its_peer_ends_first(tmp_path: Path) -> None:
    code = "meet(); time.sleep(0.1 + rank / 2); die(9) if rank else sys.exit(5)"
    supervised(tmp_path, f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {code}").expect(
        exit_code=5,
        stderr=r"^error: rank 1 \(\S+, pid \d+\) was killed by SIGKILL \(out of memory\?\); log: .*rank_1.log\n$",
    )
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["rank"], outcome["status"]) == (5, 1, "peer lost or hung")


def test_an_error_of_a_rank_that_is_not_on_the_console_is_told(tmp_path: Path) -> None:
    code = "print('error: data.bin: cut short', file=sys.stderr); sys.exit(3)"
    supervised(tmp_path, f"if rank == 1:\n  {code}\ntime.sleep(60)").expect(
        exit_code=3, stderr=r"error: rank 1 .* ended with exit code 3 \(data\): data.bin: cut short; log: .*rank_1.log"
    )


def test_a_stopped_rank_is_killed_and_named(tmp_path: Path) -> None:
    code = "meet(); die(signal.SIGSTOP) if rank == 1 else (time.sleep(0.5), sys.exit(5))"
    supervised(tmp_path, code, first=0).expect(
        exit_code=5, stderr=r"rank 1 .* was stopped \(SIGSTOP\?\) and killed", within=5
    )


def test_a_rank_that_ignores_everything_is_killed_and_named(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); meet(); time.sleep(60 * rank); sys.exit(5)"
    supervised(tmp_path, code, first=0).expect(exit_code=5, stderr="rank 1 .* did not end when its peers did", within=5)


def test_a_shim_that_is_killed_takes_its_rank_along(tmp_path: Path) -> None:
    with training(tmp_path) as job:
        job.strike(psutil.Process(job.rank_pid(tmp_path, 1)).ppid(), signal.SIGKILL)
        job.finish().expect(exit_code=5, stderr="rank 1 .* vanished together with its shim", within=5)


def test_a_peer_still_saving_is_not_torn_down(tmp_path: Path) -> None:
    code = "time.sleep(1.5 * rank); print('saved', rank); sys.exit(75)"
    supervised(tmp_path, code).expect(exit_code=75, stderr="^$")
    assert "saved 1" in (tmp_path / "logs" / "rank_1.log").read_text()


def test_a_program_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    command = argv(tmp_path, "")
    run_job([*command[: command.index("--") + 1], "/no/such/program"], timeout=40, env=ENV).expect(
        exit_code=5,
        stderr="^error: torchrun ended before rank 0 had started: rank . could not be started: .*/no/such/program.*\n$",
    )


def test_a_rank_that_a_signal_to_its_group_ended_at_once_had_been_asked_to_stop(tmp_path: Path) -> None:
    """As when another rank could not be started: it is not the first cause."""
    code = f"""
import os, signal
from pathlib import Path
from launch.watch import rank
def start(program, **options):
    child = begin(program, **options)
    os.kill(os.getpid(), signal.SIGTERM), os.kill(child.pid, signal.SIGTERM), child.wait()
    return child
begin, rank.process.start = rank.process.start, start
rank.run(Path({str(tmp_path)!r}), ["sleep", "60"], 0, 0, None)
"""
    run_job([PYTHON, "-c", code], timeout=20, env=ENV).expect(exit_code=0)
    report = json.loads((tmp_path / "rank_0.exit.json").read_text())
    assert (report["signal"], report["asked"]) == (signal.SIGTERM, True)


def test_a_lost_rank_is_started_again_with_resume(tmp_path: Path) -> None:
    code = (
        "print('attempt', attempt, sys.argv[1:], flush=True)\nif rank == 1 and attempt < 2: time.sleep(0.5); die(9)\n"
    )
    code += "time.sleep(2 - attempt)"
    result = supervised(tmp_path, code, restarts=2, args=("x",)).expect(exit_code=0)
    assert result.stdout == "attempt 0 ['x']\nattempt 1 ['x', 'resumed']\nattempt 2 ['x', 'resumed']\n"
    assert re.findall(r"; restart (\d) of 2\nrestarting from the last checkpoint", result.stderr) == ["1", "2"]


def test_restarts_are_bounded_and_only_for_lost_ranks(tmp_path: Path) -> None:
    assert supervised(tmp_path, "die(9)", restarts=1).expect(exit_code=5).stderr.count("restarting") == 1
    assert "restarting" not in supervised(tmp_path, "sys.exit(6)", restarts=1).expect(exit_code=6).stderr


def test_what_ranks_leave_behind_is_killed(tmp_path: Path) -> None:
    code = "subprocess.Popen(['sleep', '60'], start_new_session=True)"
    supervised(tmp_path, code, first=1).expect(exit_code=0, within=5)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_lets_the_ranks_save(tmp_path: Path, signum: signal.Signals) -> None:
    with training(tmp_path) as job:
        job.process.send_signal(signum)
        job.process.send_signal(signum)  # as `timeout` does; not a second wish
        again = "Ctrl-C again" if signum == signal.SIGINT else "another signal"
        job.finish().expect(
            exit_code=75,
            stdout="^ready\nsaving\n$",
            stderr=f"^{signum.name}: the ranks finish their step, save and exit; {again} ends them at once\n$",
        )


def test_a_second_signal_ends_everything_now(tmp_path: Path) -> None:
    with training(tmp_path, "saves(seconds=60)") as job:
        job.process.send_signal(signal.SIGINT)
        job.wait_for("saving")
        time.sleep(0.6)
        job.strike(job.pid, signal.SIGINT)
        job.finish().expect(exit_code=130, stderr="\nSIGINT again: ended at once, without saving\n$", within=2)
    assert json.loads((tmp_path / "outcome.json").read_text())["status"] == "stopped, not saved"


def test_a_signal_before_the_ranks_have_started_ends_the_start(tmp_path: Path) -> None:
    with start_job(argv(tmp_path, TRAINS, agent="torchrun"), timeout=40, env=ENV) as job:
        while not (tmp_path / "logs" / "torchrun.log").exists():
            time.sleep(0.01)
        job.strike(job.pid, signal.SIGTERM)
        job.finish().expect(exit_code=75, stderr="^SIGTERM: stopped before any rank had started\n$", within=3)


def test_a_signal_while_the_ranks_start_up_is_not_a_failure(tmp_path: Path) -> None:
    with start_job(argv(tmp_path, "time.sleep(60)"), timeout=40, env=ENV) as job:
        job.rank_pid(tmp_path, 0)
        job.strike(job.pid, signal.SIGTERM)
        job.finish().expect(exit_code=75, stderr="stopped before training had begun", within=5)


def test_signals_that_the_user_ignores_stay_ignored(tmp_path: Path) -> None:
    command = ["nohup", *argv(tmp_path, "time.sleep(1.5)")]
    with start_job(command, timeout=40, env=ENV) as job:
        job.rank_pid(tmp_path, 1)
        job.process.send_signal(signal.SIGHUP)
        job.finish().expect(exit_code=0)


def test_the_agents_death_ends_the_ranks(tmp_path: Path) -> None:
    with training(tmp_path) as job:
        job.strike(job.agent_pid(), signal.SIGKILL)
        job.finish().expect(
            exit_code=5, stderr="error: torchrun was killed by SIGKILL; its ranks were stopped with it", within=5
        )


def test_the_supervisors_death_ends_everything_and_frees_the_run(tmp_path: Path) -> None:
    with training(tmp_path) as job:
        refused = supervised(tmp_path, "sys.exit(3)")
        refused.expect(
            exit_code=2, stderr=rf"is in use by a launcher \(pid {job.pid} on \S+\); choose another --run.name"
        )
        assert len(job.family()) == 6  # undisturbed: supervisor, agent, and two ranks with their shims
        job.process.kill()
        job.wait_gone(5)
    supervised(tmp_path, "sys.exit(6)").expect(exit_code=6)


def test_a_console_that_goes_away_does_not_matter(tmp_path: Path) -> None:
    command = argv(tmp_path, "for i in range(5000): print('line', i)\nif rank == 0: sys.exit(6)")
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout and process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.wait(20) == 6
    assert "line 4999" in (tmp_path / "logs" / "rank_0.log").read_text()


def test_a_full_disk_under_the_logs_does_not_matter(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        code = "time.sleep(60 * rank)\nfor i in range(100): print('x' * 9999)\nsys.exit(7)"
        result = supervised(tmp_path, code).expect(
            exit_code=7, stderr=r"error: rank 0 .* ended with exit code 7 \(disk or I/O\)"
        )
        assert len(result.stdout) == 100 * 10_000
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_ctrl_c_on_a_terminal_saves(tmp_path: Path) -> None:
    command = argv(tmp_path, "print(sys.stdout.isatty()); saves()")
    screen = run_on_terminal(command, [("ready", CTRL_C)], timeout=40, env=ENV).expect(exit_code=75).stdout
    assert screen.startswith("True\nready\n^CSIGINT: the ranks finish their step")
    assert screen.endswith("\nsaving\n\x1b[?25h")
    assert screen.count("\n") == 4, screen


def test_ctrl_c_twice_on_a_terminal_ends_it(tmp_path: Path) -> None:
    command = argv(tmp_path, "saves(seconds=60)")
    result = run_on_terminal(command, [("ready", CTRL_C), ("saving", CTRL_C)], timeout=40, env=ENV)
    result.expect(exit_code=130, stdout=r"SIGINT again: ended at once, without saving\n", within=5)


class TestTorchrun:
    """The same with the real torchrun: few, since each takes seconds to start (more in tests/faults)."""

    def test_arguments_variables_and_quiet(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        nasty = (
            "two words",
            'it\'s "quoted"',
            "line\nbreak",
            "$(touch canary) `x`; y",
            "",
            "--",
            "-x",
            "--standalone",
            "é×…",
        )
        monkeypatch.delenv("OMP_NUM_THREADS")
        code = "import json; json.dump([sys.argv[1:], dict(os.environ)], open(f'{sys.argv[1]}/{rank}', 'w'))"
        folder = tmp_path / "with 'odd'\nname"
        folder.mkdir()
        result = supervised(folder, code, agent="torchrun", nproc=2, args=(str(folder), *nasty)).expect(exit_code=0)
        assert (result.stdout, result.stderr) == ("", "")
        for rank in (0, 1):
            arguments, environ = json.loads((folder / str(rank)).read_text())
            assert arguments == [str(folder), *nasty]
            assert environ["WORLD_SIZE"] == environ["LOCAL_WORLD_SIZE"] == "2"
            assert environ["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
            assert environ["MASTER_ADDR"] == "127.0.0.1"
        assert not (folder / "logs" / "torchrun.log").read_text()

    def test_a_signal_to_the_agent_lets_the_ranks_save(self, tmp_path: Path) -> None:
        with training(tmp_path, agent="torchrun") as job:
            os.kill(job.agent_pid(), signal.SIGUSR1)
            job.finish().expect(exit_code=75, stdout="^ready\nsaving\n$")


WAITS = """
import sys
from pathlib import Path
from launch.watch import supervise
from launch.hosts.hostfile import Host
from launch.hosts.job import Command, Job, Launch
supervise._SAY_AFTER_S, supervise._SAY_AGAIN_S, supervise._HOSTS_WAIT_S = 0.2, 0.4, 1.0
hosts = tuple(Host(f"node-{node}", 1) for node in range(3))
job = Job(("true",), hosts, Path(sys.argv[1]), node=0, rendezvous=(sys.argv[2], int(sys.argv[3])))
agent = Launch("torchrun", [Command(["sleep", "60"], host=hosts[0])])
print(supervise.supervise(job, lambda job: agent).as_dict())
"""


def test_a_lock_that_somebody_only_looks_at_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with _exclusive(path) as holder, _exclusive(path) as other:
            assert holder == "" and other == f"a launcher (pid {os.getpid()} on {socket.gethostname()})"


def test_hosts_that_do_not_come_are_named_and_not_waited_for_any_longer(tmp_path: Path) -> None:
    """The second of three; the third holds its lock. 198.51.100.77 is nobody's."""
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs/launcher_2.lock").open("w") as lock, socket.socket() as free:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free.bind(("", 0))
        port = str(free.getsockname()[1])
        free.close()
        for address, why in (
            ("198.51.100.77", "is no address of this host, where ranks are to meet"),
            ("127.0.0.1", "is a loopback address: on each host it means that host"),
        ):
            result = run_job([PYTHON, "-c", WAITS, str(tmp_path), address, port], timeout=30, env=ENV)
            whom = (
                f"1 other host at {address}:{port}; {tmp_path}/logs has no launcher of --node_rank=1; {address} {why}"
            )
            assert result.stderr == f"waiting for {whom}\n" * 2
            assert f"'peer lost or hung', 'exit_code': 5, 'cause': 'waited 1 s for {whom}'" in result.stdout
