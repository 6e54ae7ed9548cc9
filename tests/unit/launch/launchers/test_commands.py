"""What each launcher starts, as pure functions of a job."""

import json
import os
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.hosts.hostfile import Host, UsageError
from launch.hosts.job import Job, Ssh, forwarded, rank_defaults
from launch.hosts.layout import check_layout, coordinates
from launch.launchers import mpirun
from launch.launchers.registry import LAUNCHERS
from launch.watch.supervise import describe

TWO = (Host("node0", 2), Host("node1", 1))
HOSTILE = ("two words", 'it\'s "quoted"', "line\nbreak", "$(touch canary) `x`; y", "", "--", "-x", "%n %h", "é×…")


def job(**changes) -> Job:
    defaults = {"program": ("python", "train.py", "a b"), "hosts": (Host("localhost", 2),), "run_dir": Path("runs/x")}
    return Job(**{**defaults, "rendezvous": None, **changes})


def across(**changes) -> Job:
    return job(hosts=TWO, rendezvous=("node0", 29500), **changes)


def test_torchrun_starts_every_rank_in_its_shim_on_a_free_port_without_restarts() -> None:
    (command,) = LAUNCHERS["torchrun"](job(hosts=(Host("localhost", 3),))).commands
    assert command.argv[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=3", "--max-restarts=0"} <= set(command.argv)
    shim = command.argv[command.argv.index("launch.watch.rank") + 1 :]
    assert shim == ["--log-dir=runs/x/logs", "--stderr-fd=0", "--", "python", "train.py", "a b"]


def test_torchrun_over_hosts_is_one_agent_each_told_its_place_through_stdin() -> None:
    commands = LAUNCHERS["torchrun"](across(env={"TOKEN": "secret"}, ssh=Ssh(2222, ("User=me",)))).commands
    for node, (command, slots) in enumerate(zip(commands, (2, 1), strict=True)):
        assert command.stdin is not None
        order = json.loads(command.stdin)
        assert [w for w in order["argv"] if w.startswith(("--n", "--master"))] == [
            "--nnodes=2",
            f"--node-rank={node}",
            "--master-addr=node0",
            "--master-port=29500",
            f"--nproc-per-node={slots}",
        ]
        assert order["env"]["TOKEN"] == "secret"
        assert "secret" not in " ".join(command.argv)
        assert command.argv[0] == "ssh"
        assert command.argv[-3:-1] == ["--", f"node{node}"]
        assert {"-oUser=me", "-p2222", "-oBatchMode=yes"} <= set(command.argv)
        assert shlex.split(command.argv[-1])[-3:] == [sys.executable, "-m", "launch.watch.host"]


def test_a_node_that_starts_its_own_ranks_starts_no_other() -> None:
    (command,) = LAUNCHERS["torchrun"](across(node=1)).commands
    assert {"--nnodes=2", "--node-rank=1", "--nproc-per-node=1"} <= set(command.argv)
    assert command.stdin is None


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_commands_are_pure(name: str) -> None:
    assert LAUNCHERS[name](across()) == LAUNCHERS[name](across())


def test_a_restart_says_so_to_the_ranks_and_resumes() -> None:
    first = job(resume=("--checkpoint.resume=auto",), name="run-1")
    (before,), (after,) = (LAUNCHERS["torchrun"](j).commands for j in (first, first.next_attempt()))
    assert before.argv[-1] == "a b"
    assert after.argv[-1] == "--checkpoint.resume=auto"
    assert (after.env["MLITE_ATTEMPT"], after.env["MLITE_JOB"]) == ("1", "run-1.1")


def test_a_restart_begins_as_the_config_says_until_something_is_saved(tmp_path: Path) -> None:
    resume, begin = "--checkpoint.resume=auto", "--checkpoint.resume=none"
    first = job(resume=(resume,), begin=(begin,), name="run-1", run_dir=tmp_path)
    latest = tmp_path / "checkpoints" / "latest"
    for folder in (first.log_dir, latest.parent):
        folder.mkdir()
    given = job(resume=(resume,), begin=(resume,))
    for attempt in (given, given.next_attempt()):
        (command,) = LAUNCHERS["torchrun"](attempt).commands
        assert command.argv.count(resume) == 1
    latest.write_text("of another run")
    os.utime(latest, (1, 1))
    first.lock.write_text("")
    again = first.next_attempt()
    os.utime(latest)
    for attempt, end in ((first, begin), (again, begin), (again.next_attempt(), resume)):
        (command,) = LAUNCHERS["torchrun"](attempt).commands
        assert command.argv[-1] == end


def test_open_mpi_places_ranks_by_contexts() -> None:
    launch = mpirun.build(across(ssh=Ssh(22, ("User=me",))), Path("/opt/bin/mpirun"), "Open MPI", 5)
    text = " ".join(launch.commands[0].argv)
    contexts = text.split(" : ")
    assert contexts[0].startswith("/opt/bin/mpirun --bind-to none")
    assert "--prtemca plm_ssh_args -p 22 -oUser=me" in contexts[0]
    for context, host in zip(contexts, ("node0:2 -n 2", "node1:1 -n 1"), strict=True):
        assert f"--host {host} " in context
        assert context.endswith(f"{sys.executable} -m launch.watch.rank --file={Path.cwd()}/runs/x/logs/order.json")


def test_mpich_is_spelled_its_own_way_and_sees_chosen_devices() -> None:
    hosts = (Host("node0", 2, (1, 3)), Host("node1", 1))
    argv = (
        mpirun.build(across().__class__(("p",), hosts, Path("r")), Path("/opt/bin/mpiexec"), "MPICH", 4)
        .commands[0]
        .argv
    )
    assert argv[1:7] == ["-launcher", "ssh", "-bind-to", "none", "-hosts", "node0:2,node1:1"]
    assert argv[7:12] == ["-n", "2", "-env", "CUDA_VISIBLE_DEVICES", "1,3"]
    assert argv[argv.index(":") + 1 :][:2] == ["-n", "1"]


def test_deepspeed_gets_one_plain_word_and_nothing_to_export(tmp_path: Path) -> None:
    launch = LAUNCHERS["deepspeed"](across(run_dir=tmp_path / "a b%$(x)", env={"TOKEN": "secret"}))
    (command,) = launch.commands
    word = command.argv[-1]
    assert command.argv[-3:-1] == ["--module", "launch.watch.rank"]
    assert set(word) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./=")
    path = Path(unquote(word.removeprefix("--file=").replace("=", "%")))
    assert json.loads(launch.files[path])["env"]["TOKEN"] == "secret"
    assert launch.files[path.with_name("hostfile")] == "node0 slots=2\nnode1 slots=1\n"
    assert {"PYTHON", "NCCL"} <= set(command.without)
    assert "secret" not in " ".join(command.argv)


def test_deepspeed_refuses_what_its_shell_would_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(UsageError, match=r"its launcher passes .*a b"):
        LAUNCHERS["deepspeed"](across())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_whatever_the_program_is_told_arrives(words: list[str]) -> None:
    program = ("python", *HOSTILE, *words)
    for name, launch in {
        "torchrun": LAUNCHERS["torchrun"](across(program=program)),
        "deepspeed": LAUNCHERS["deepspeed"](across(program=program)),
        "mpirun": mpirun.build(across(program=program), Path("mpirun"), "Open MPI", 5),
    }.items():
        if name == "torchrun":
            argvs = [json.loads(command.stdin or "")["argv"] for command in launch.commands]
        else:
            argvs = [json.loads(text)["argv"] for path, text in launch.files.items() if path.name == "order.json"]
        assert argvs
        assert all(tuple(argv[-len(program) :]) == program for argv in argvs)


def test_threads_are_shared_out_unless_the_user_decided() -> None:
    assert int(rank_defaults(1, {})["OMP_NUM_THREADS"]) >= 1
    assert rank_defaults(10_000, {})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in rank_defaults(2, {"OMP_NUM_THREADS": "7"})


def test_variables_for_other_hosts_are_chosen() -> None:
    given = {"NCCL_DEBUG": "INFO", "PATH": "/bin", "HISTFILE": "x", "WANDB_API_KEY": "k", "WANDB_MODE": "off"}
    assert forwarded(given) == {"NCCL_DEBUG": "INFO", "PATH": "/bin"}
    assert forwarded(given, ["WANDB_*"]) == {k: v for k, v in given.items() if k != "HISTFILE"}


def test_dry_run_text_is_quoted_for_reading() -> None:
    text = describe(LAUNCHERS["torchrun"](job(env={"A": "x y"})))
    assert "A='x y' \\\n" in text
    assert text.endswith("python train.py 'a b'")


def test_places_on_the_mesh() -> None:
    mesh = {"dp_replicate": 2, "dp_shard": 2, "tp": 2}
    assert coordinates(0, mesh) == {"dp_replicate": 0, "dp_shard": 0, "tp": 0}
    assert coordinates(5, mesh) == {"dp_replicate": 1, "dp_shard": 0, "tp": 1}
    assert coordinates(3, {"tp": 1}) == {}


@pytest.mark.parametrize(
    ("slots", "tp", "fits"), [((4, 4), 4, True), ((4, 2), 2, True), ((3, 3), 2, False), ((2, 2), 4, False)]
)
def test_tensor_parallel_groups_stay_on_a_host(slots: tuple[int, ...], tp: int, fits: bool) -> None:
    hosts = tuple(Host(f"h{i}", n) for i, n in enumerate(slots))
    check_layout(hosts, tp, across=True)
    if fits:
        check_layout(hosts, tp, across=False)
        return
    with pytest.raises(UsageError, match=f"parallel.tp={tp} would span hosts: h0 has {slots[0]} ranks; use tp 1"):
        check_layout(hosts, tp, across=False)
