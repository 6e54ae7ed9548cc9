"""The first cause, as a table: what the ranks reported, and what the user is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.hosts.hostfile import Host
from launch.hosts.job import Job
from launch.watch.outcome import judge

RUNNING = {"rank": 0, "host": "h", "pid": 10, "shim": 9, "attempt": 0, "started": 0.0}


def ended(code: int | None = None, *, signal: int | None = None, time: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"exit_code": code, "signal": signal, "time": time, **more}


def told(folder: Path, *ranks: dict[str, Any] | None, returncode: int | None = 1, stop: bool = False):
    """``None``: never started; an empty dict: started, and no report of its end."""
    job = Job(("train",), (Host("localhost", len(ranks)),), folder)
    job.log_dir.mkdir(exist_ok=True)
    (job.log_dir / "torchrun.log").write_text("warning\nerror: no room\nTraceback\n")
    for rank, facts in enumerate(ranks):
        if facts is not None:
            name = f"rank_{rank}.{'exit' if facts else 'start'}.json"
            (job.log_dir / name).write_text(json.dumps({**RUNNING, "rank": rank, "pid": 10 + rank, **facts}))
    return judge(job, "torchrun", [(job.hosts[0], returncode)], stop)


@pytest.mark.parametrize(
    ("ranks", "exit_code", "cause"),
    [
        ([ended(0), ended(0)], 0, ""),
        ([ended(75), ended(0)], 75, ""),
        ([ended(5), ended(signal=9, time=2)], 5, "rank 1 (h, pid 11) was killed by SIGKILL (out of memory?)"),
        ([ended(signal=6), ended(signal=11, time=2)], 5, "rank 1 (h, pid 11) was killed by SIGSEGV"),
        ([ended(5), ended(signal=9, stopped=True)], 5, "rank 1 (h, pid 11) was stopped (SIGSTOP?) and killed"),
        ([ended(5), ended(3, time=2)], 3, "rank 1 (h, pid 11) ended with exit code 3 (data)"),
        ([ended(5), ended(4, time=2)], 4, "rank 1 (h, pid 11) ended with exit code 4 (checkpoint)"),
        ([ended(5), ended(1, time=2, message="KeyError: 'x'")], 1, "exit code 1 (internal error): KeyError: 'x'"),
        ([ended(6, time=2), ended(6, time=1)], 6, "rank 1 (h, pid 11) ended with exit code 6 (non-finite loss)"),
        ([ended(7), ended(signal=9, time=2)], 5, "rank 1 (h, pid 11) was killed by SIGKILL"),
        ([ended(75), ended(signal=9)], 5, "rank 1 (h, pid 11) was killed by SIGKILL"),
        ([ended(5, time=2), ended(5, time=1)], 5, "rank 1 (h, pid 11) ended with exit code 5 (peer lost or hung)"),
        ([ended(5), ended(signal=15, asked=True)], 5, "rank 0 (h, pid 10) ended with exit code 5"),
        ([ended(0), ended(signal=15)], 5, "rank 1 (h, pid 11) was killed by SIGTERM"),
        ([ended(5), ended(signal=6)], 5, "rank 1 (h, pid 11) was killed by SIGABRT"),
        ([ended(5), {}], 5, "rank 1 (h, pid 11) vanished together with its shim"),
        ([ended(5), None], 5, "torchrun ended before rank 1 had started: no room"),
    ],
)
def test_first_cause(tmp_path: Path, ranks: list, exit_code: int, cause: str) -> None:
    outcome = told(tmp_path, *ranks)
    assert outcome.exit_code == exit_code
    assert cause in outcome.cause if cause else not outcome.cause


def test_every_cause_names_the_log(tmp_path: Path) -> None:
    assert told(tmp_path, ended(5), ended(3)).cause.endswith(f"log: {tmp_path}/logs/rank_1.log")


def test_a_rank_that_did_not_end_is_the_cause(tmp_path: Path) -> None:
    outcome = told(tmp_path, ended(5), {}, returncode=None)
    assert (outcome.exit_code, outcome.rank) == (5, 1)
    assert "did not end when its peers did" in outcome.cause


def test_a_killed_agent_is_the_cause(tmp_path: Path) -> None:
    outcome = told(tmp_path, {}, {}, returncode=-9)
    assert (outcome.exit_code, outcome.rank) == (5, None)
    assert outcome.cause == "torchrun was killed by SIGKILL; its ranks were stopped with it"


@pytest.mark.parametrize("other", [None, ended(5), ended(signal=15, asked=True)])
def test_stopped_while_starting_is_preempted(tmp_path: Path, other: dict | None) -> None:
    assert told(tmp_path, ended(signal=15, asked=True), other, stop=True).exit_code == 75


def test_a_failure_after_the_wish_to_stop_is_a_failure(tmp_path: Path) -> None:
    assert told(tmp_path, ended(7), ended(signal=15, asked=True), stop=True).exit_code == 7


def test_what_rank_0_said_is_not_repeated(tmp_path: Path) -> None:
    same = told(tmp_path, ended(2, time=2, message="tp=3"), ended(2, time=1, message="tp=3"))
    other = told(tmp_path, ended(5, time=2, message="lost"), ended(2, time=1, message="tp=3"))
    assert "tp=3" not in same.cause
    assert "tp=3" in other.cause


def test_reports_of_another_attempt_do_not_count(tmp_path: Path) -> None:
    assert "before rank 1 had started" in told(tmp_path, ended(0), ended(3, attempt=1)).cause


def test_the_last_step_comes_from_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 1.0}\n{"loss": 3}\n{"step"')
    assert told(tmp_path, ended(0)).step == 2


def test_a_host_that_pdsh_did_not_get_through_to_is_told_before_those_that_waited_for_it(tmp_path: Path) -> None:
    job = Job(("train",), (Host("node0", 1), Host("node1", 1)), tmp_path)
    job.log_dir.mkdir()
    refused = "ssh: connect to host node0 port 22: Connection refused"
    lines = ["starting", refused, "pdsh@here: node0: ssh exited with exit code 255"]
    (job.log_dir / "deepspeed.log").write_text("\n".join([*lines, "pdsh@here: node1: ssh exited with exit code 5\n"]))
    (job.log_dir / "rank_1.exit.json").write_text(json.dumps({**RUNNING, "rank": 1, **ended(5)}))
    outcome = judge(job, "deepspeed", [(None, 1)], stop_asked=False)
    assert (outcome.exit_code, outcome.cause.partition("; log: ")[0]) == (
        5,
        f"deepspeed ended before rank 0 had started: {refused}",
    )


def test_an_option_that_srun_does_not_know_is_a_mistake_in_the_config(tmp_path: Path) -> None:
    job = Job(("train",), (Host("node0", 1),), tmp_path)
    job.log_dir.mkdir()
    said = "srun: unrecognized option '--bogus'"
    (job.log_dir / "srun.log").write_text(f'{said}\nTry "srun --help" for more information\n')
    outcome = judge(job, "srun", [(None, 1)], stop_asked=False)
    assert (outcome.exit_code, outcome.cause) == (2, f"launch.slurm.srun_extra: {said}")


def test_hosts_that_ssh_did_not_get_through_to_are_all_named(tmp_path: Path) -> None:
    job = Job(("train",), tuple(Host(f"node{n}", 1) for n in range(4)), tmp_path)
    job.log_dir.mkdir()
    (job.log_dir / "ssh.node1.log").write_text("ssh: Could not resolve hostname node1\n")
    outcome = judge(job, "torchrun", list(zip(job.hosts, (None, 255, None, 255), strict=True)), stop_asked=False)
    said = "host node1 was lost, with rank 1: ssh: Could not resolve hostname node1; ssh does not reach node3 either"
    assert (outcome.exit_code, outcome.cause) == (5, said)
