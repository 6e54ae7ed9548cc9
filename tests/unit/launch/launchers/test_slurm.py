"""Batch scripts, what they start and how they end, and node lists; Slurm's own commands are stand-ins on PATH."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.hosts.hostfile import Host, UsageError
from launch.hosts.job import Job, Slurm
from launch.launchers import slurm, slurm_jobs
from launch.launchers.registry import LAUNCHERS
from megatron_lite.config import SlurmConfig
from tests.kit.hosts import eventually
from tests.kit.jobs import PYTHON, REPOSITORY, Result, run_job
from tests.kit.stand_ins import put
from tests.kit.tiny import tiny_config, tiny_data

TWO = (Host("n1", 2), Host("n2", 2))
HOSTILE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20) | st.sampled_from(
    [
        "two words",
        'it\'s "q"',
        "line\n#SBATCH --wrap=x",
        "$(touch canary)",
        "`x`",
        "; exit 0",
        "\\",
        "-x",
        "!!",
        "é×…",
        "",
    ]
)
LAUNCHER = """#!/bin/sh
printf '%s\\0' "$@" >"$LOG.argv"
trap '[ -z "$told" ] || exit 143; told=yes' USR1 TERM
echo $$ >"$LOG.pid.tmp"; mv "$LOG.pid.tmp" "$LOG.pid"
[ -z "$CODE" ] || exit "$CODE"
while [ -z "$told" ]; do sleep 0.05; done; sleep 0.3; exit 75
"""
ASK = "scancel --batch --signal=TERM {}"
SCONTROL = """#!/bin/sh
[ "$1" != show ] || exec echo "${SHOWN:-JobState=RUNNING Reason=None Requeue=1 PreemptTime=None}"
echo "$*" >>"$LOG.scontrol"
"""
CANCELLED = (
    "JobState=COMPLETING Reason=None Requeue=1",
    "JobState=RUNNING Reason=None Requeue=0",
)  # by scancel, by `launch cancel`


def options(**changes: Any) -> dict[str, Any]:
    return SlurmConfig(**changes).model_dump(mode="json")


def job(**changes: Any) -> Job:
    return Job(**{"program": ("python", "t.py"), "hosts": TWO, "run_dir": Path("runs/x"), "slurm": Slurm(), **changes})


def stand_ins(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make ``folder`` the current directory, its ``python`` the launcher, and put an scontrol on PATH."""
    patch.chdir(folder)
    for name, text in (("python", LAUNCHER), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    patch.setattr(sys, "executable", str(folder / "python"))
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    patch.setenv("LOG", str(folder / "log"))
    patch.setenv("SLURM_JOB_ID", "7")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stand_ins(tmp_path, monkeypatch)
    return tmp_path


def launch_with_sbatch(folder: Path, sbatch: str, *flags: str) -> Result:
    """``launch run --via=slurm`` of a tiny config, with an sbatch on PATH that does this, or without one."""
    path = folder / "bin"
    path.mkdir(exist_ok=True)
    if sbatch:
        (path / "sbatch").write_text(f"#!/bin/sh\n{sbatch}\n")
        (path / "sbatch").chmod(0o755)
    config = tiny_config(folder, tiny_data(folder))
    argv = [PYTHON, "-m", "launch", "run", str(config), "--via=slurm", *flags]
    env = {"PATH": f"{path}:/usr/bin:/bin" if sbatch else str(path), "LOG": str(folder / "log")}
    return run_job(argv, timeout=30, env=env)


def argv_of(folder: Path) -> list[str]:
    return (folder / "log.argv").read_text(errors="surrogateescape").split("\0")[:-1]


def test_the_script_is_one_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.chdir("/tmp")
    text = slurm.script(
        job(run_dir=Path("runs/big")),
        ["big.yaml", "--via=slurm", "--nodes=2", "--nproc=2"],
        {"optim.lr": "1e-4", "data.note": "it's"},
        options(time="1:00:00", gres="gpu:2", setup=["module load cuda"], extra=["--mail-type=END"], constraint="a b"),
    )
    assert text == (REPOSITORY / "tests/golden/slurm.sh").read_text()


@settings(max_examples=30)
@given(st.lists(HOSTILE, max_size=4), st.dictionaries(st.sampled_from(["a.b", "c.d"]), HOSTILE))
def test_what_is_typed_reaches_the_launcher_in_the_job(words: list[str], overrides: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        here = Path(name)
        stand_ins(here, patch)
        patch.setenv("CODE", "0")
        text = slurm.script(job(), words, overrides, options())
        assert subprocess.run(["bash"], input=text.encode(), timeout=20).returncode == 0
        flags = [f"--{key}={value}" for key, value in overrides.items()]
        assert argv_of(here) == ["-m", "launch", "run", *words, *flags]
        assert not (here / "canary").exists()


@pytest.mark.parametrize(
    ("changes", "env", "more"),
    [
        ({}, {}, []),
        ({}, {"SLURM_RESTART_COUNT": "1"}, ["--checkpoint.resume=auto"]),
        ({"array": "3-5%1"}, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3"}, []),
        (
            {"array": "3-5%1"},
            {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "3"},
            ["--checkpoint.resume=auto"],
        ),
        ({"array": "3-5"}, {"SLURM_ARRAY_TASK_ID": "4"}, ["--run.name=x-4", "--run.seed=4"]),
    ],
)
def test_later_starts_resume_and_tasks_of_an_array_are_runs_of_their_own(
    changes: dict[str, Any], env: dict[str, str], more: list[str], folder: Path
) -> None:
    text = slurm.script(job(), ["c.yaml"], {}, options(**changes))
    subprocess.run(["bash"], input=text.encode(), timeout=20, env={**os.environ, **env, "CODE": "0"}, check=True)
    assert argv_of(folder) == ["-m", "launch", "run", "c.yaml", *more]


@pytest.mark.parametrize(
    ("restarts", "arguments", "saved", "resume"),
    [
        ("0", [], True, "old run"),
        ("1", [], True, "auto"),
        ("1", [], False, "old run"),  # it was stopped before it had saved anything
        ("0", [slurm.RESUME], True, "auto"),  # the next of a chain
    ],
)
def test_another_start_goes_on_from_its_own_checkpoint_wherever_the_first_began(
    restarts: str, arguments: list[str], saved: bool, resume: str, folder: Path
) -> None:
    for name, age in (("logs/slurm.sh", 100), ("checkpoints/latest", 50 if saved else 150)):
        path = folder / "runs/x" / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    text = slurm.script(job(), ["c.yaml"], {"checkpoint.resume": "old run"}, options())
    environ = {**os.environ, "CODE": "0", "SLURM_RESTART_COUNT": restarts}
    subprocess.run(["bash", "-s", "--", *arguments], input=text.encode(), timeout=20, env=environ, check=True)
    assert argv_of(folder) == ["-m", "launch", "run", "c.yaml", f"--checkpoint.resume={resume}"]


@pytest.mark.parametrize(
    ("signum", "requeue", "saved", "shown", "again"),
    [
        (signal.SIGTERM, True, False, "", True),  # somebody's, or the scheduler's
        (signal.SIGTERM, True, True, CANCELLED[0], False),
        (signal.SIGTERM, True, True, CANCELLED[1], False),
        (signal.SIGUSR1, True, True, "", True),
        (signal.SIGUSR1, True, True, "JobState=COMPLETING Reason=TimeLimit", True),  # saving took longer than that
        (signal.SIGTERM, True, True, "JobState=COMPLETING Reason=TimeLimit", True),  # without signal_seconds
        (signal.SIGTERM, True, False, "JobState=COMPLETING Reason=TimeLimit", False),
        (signal.SIGUSR1, True, False, "", False),  # it would come no further the next time
        (signal.SIGUSR1, False, True, "", False),
    ],
)
def test_a_script_waits_for_the_save_and_asks_for_another_start_unless_it_was_cancelled(
    signum: int, requeue: bool, saved: bool, shown: str, again: bool, folder: Path
) -> None:
    has_saved(folder / "runs/x", saved)
    text = slurm.script(job(), ["c.yaml"], {}, options(requeue=requeue))
    with subprocess.Popen(["bash", "-c", text], env={**os.environ, "CODE": "", "SHOWN": shown}) as script:
        eventually(lambda: (folder / "log.pid").exists() and catches_term(script.pid), "the launcher runs")
        for _ in range(3):
            script.send_signal(signum)
            time.sleep(0.1)
        assert script.wait(timeout=20) == 75
    assert (folder / "log.scontrol").exists() == again
    if again:
        assert (folder / "log.scontrol").read_text() == "requeue 7\n"


def catches_term(pid: int) -> bool:
    """Whether a script has come so far as to set its last trap."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def has_saved(run_dir: Path, saved: bool) -> None:
    """Leave a checkpoint in ``run_dir``, younger than the start or older."""
    for path, age in ((run_dir / "logs/launcher.lock", 100), (run_dir / "checkpoints/latest", 50 if saved else 150)):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))


@pytest.mark.parametrize("code", [0, 1, 2, 5, 75, 143])
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("shown", ["", "PreemptTime=2026-11-27T22:27:37"])
def test_how_a_run_ended_tells_whether_there_is_another_start(code: int, saved: bool, shown: str, folder: Path) -> None:
    has_saved(folder / "runs/a run", saved)
    text = slurm.script(job(run_dir=Path("runs/a run")), ["c.yaml"], {}, options())
    environ = {**os.environ, "CODE": str(code), "SHOWN": shown}
    ended = subprocess.run(["bash"], input=text.encode(), timeout=20, env=environ)
    assert ended.returncode == code
    again = code == 75 or (code == 5 and saved) or (bool(shown) and code in (1, 5, 143))
    assert (folder / "log.scontrol").exists() == again


@pytest.mark.parametrize("last", [False, True])
def test_a_task_of_an_array_queues_itself_again_and_no_other(last: bool, folder: Path) -> None:
    """The task that Slurm starts last keeps the number of the array, which means every task to scontrol."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "7" if last else "9"}
    text = slurm.script(job(), ["c.yaml"], {}, options(array="1-3", setup=["set -eu"]))
    subprocess.run(["bash"], input=text.encode(), timeout=20, env={**os.environ, **array, "CODE": "75"})
    assert (folder / "log.scontrol").read_text() == "requeue 7_3\n"


@pytest.mark.parametrize(
    ("setup", "failing"),
    [
        (["true", "modul load cuda", "touch canary"], "127: modul load cuda"),
        (["module() { false; true; return 3; }", "module load x"], "3: module load x"),
        (["source missing.sh"], "1: source missing.sh"),
        (["for a in 1 2; do", "  [ $a = 1 ]", "done"], "1:   [ $a = 1 ]"),
        (["[ -f missing ] && touch canary", "false || true", "if false; then", "  true", "fi"], ""),
        (["echo 'false; true' >there.sh", ". ./there.sh"], ""),  # how a file of somebody else's comes to its end
    ],
)
def test_a_line_of_setup_that_fails_ends_the_job(setup: list[str], failing: str, folder: Path) -> None:
    text = slurm.script(job(), ["c.yaml"], {}, options(setup=setup))
    (folder / "script").write_text(text)
    environ = {**os.environ, "CODE": "0"}
    ended = subprocess.run(["bash", "script"], timeout=20, env=environ, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == (2 if failing else 0)
    assert (f"error: launch.slurm.setup: exit code {failing}\n" in ended.stderr) == bool(failing)
    assert (folder / "log.argv").exists() != bool(failing)
    assert not (folder / "canary").exists()


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (["cat <<X", "abc"], "line 2: warning: here-document at line 1"),
        (["true", "echo 'it"], "line 2: unexpected EOF while looking for matching"),
        (["if true"], "line 2: syntax error"),
        (["shopt -s extglob", "ls !(a)", "cat <<X", "abc", "X", "f() { true; }"], ""),
    ],
)
def test_setup_that_leaves_something_open_is_refused(setup: list[str], message: str) -> None:
    if not message:
        assert "ls !(a)\n" in slurm.script(job(), [], {}, options(setup=setup))
        return
    with pytest.raises(UsageError, match=f"^launch.slurm.setup: {message}"):
        slurm.script(job(), [], {}, options(setup=setup))


@given(st.lists(st.tuples(st.sampled_from(["a", "n-", "x1."]), st.lists(st.integers(0, 30), max_size=3)), min_size=1))
def test_node_lists_are_read_as_they_are_written(parts: list[tuple[str, list[int]]]) -> None:
    short, names = [], []
    for head, numbers in parts:
        spans = [f"{first:02}-{first + 2:02}" for first in numbers]
        short.append(f"{head}[{','.join(spans)}]" if numbers else f"{head}z")
        names += [f"{head}{first + k:02}" for first in numbers for k in range(3)] if numbers else [f"{head}z"]
    assert slurm.expand(",".join(short)) == names


@pytest.mark.parametrize(
    "hostlist", ["", "a[1-", "a]b", "a[x]", "a,,b", "-oProxyCommand=x", "a[1-999999999]", "a b", "a[]"]
)
def test_what_is_no_node_list_is_refused(hostlist: str) -> None:
    with pytest.raises(UsageError):
        slurm.expand(hostlist)


def test_the_hosts_are_the_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"hostfile": None, "include": "", "exclude": "", "node_rank": None, "nodes": None, "nproc": None}
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"}
    env |= {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "12", "SLURM_TASKS_PER_NODE": "4(x3)"}
    assert slurm.choose_hosts(where, env) == tuple(Host(f"n{i}", 4) for i in (1, 2, 3))
    assert slurm.choose_hosts({**where, "nodes": (2, 2), "nproc": 1}, env) == (Host("n1", 1), Host("n2", 1))
    assert len(slurm.choose_hosts({**where, "nodes": (2, 2)}, {})) == 2
    for wrong, given_env, message in (
        ({"nodes": (4, 4)}, env, "--nodes=4: this allocation has 3"),
        ({"nodes": (1, 4)}, env, "ask for one number"),
        ({"hostfile": Path("h"), "exclude": "n1"}, env, "--hostfile, --exclude: Slurm chooses the nodes"),
        ({}, {**env, "SLURM_STEP_ID": "0"}, "srun has started this: leave out"),
        ({}, {**env, "SLURM_HET_SIZE": "2"}, "a heterogeneous job"),
    ):
        with pytest.raises(UsageError, match=message):
            slurm.choose_hosts({**where, **wrong}, given_env)
    assert slurm.choose_hosts(where, {**env, "SLURM_STEP_ID": str(0xFFFFFFFA)})  # an interactive shell of salloc's


@pytest.mark.parametrize(
    ("given", "counts"),  # as Slurm 22.05 says it
    [
        ({"SLURM_TASKS_PER_NODE": "4(x3)"}, [1, 1, 1]),  # --exclusive, without a word about tasks
        ({"SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8,4(x2)"}, [8, 4, 4]),
        ({"SLURM_NTASKS": "11", "SLURM_TASKS_PER_NODE": "4(x2),3"}, [4, 4, 3]),
        ({"SLURM_NTASKS": "5", "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x3)"}, [2, 2, 1]),
        ({"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x3)"}, [1, 1]),
    ],
)
def test_tasks_are_counted_as_slurm_says(given: dict[str, str], counts: list[int]) -> None:
    where = {"hostfile": None, "include": "", "exclude": "", "node_rank": None, "nodes": None, "nproc": None}
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", **given}
    assert [host.slots for host in slurm.choose_hosts(where, env)] == counts
    with pytest.raises(UsageError, match=r"SLURM_NTASKS=99 tasks on 3 nodes are not .*; give --nproc=N"):
        slurm.choose_hosts(where, {**env, "SLURM_NTASKS": "99"})


def test_cpus_are_those_of_the_allocation() -> None:
    """Which srun no longer takes from it."""
    assert slurm.describe(options(), {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}).cpus_per_task == 4
    assert slurm.describe(options(cpus_per_task=2), {"SLURM_CPUS_PER_TASK": "4"}).cpus_per_task == 2
    assert slurm.describe(options(), {}).cpus_per_task is None


def test_uneven_tasks_are_placed_one_by_one() -> None:
    hosts = (Host("n1", 2), Host("n2", 1))
    launch = LAUNCHERS["slurm"](job(hosts=hosts, slurm=Slurm(srun_extra=("--gpu-bind=closest",))))
    (command,) = launch.commands
    assert {"--nodes=2", "--ntasks=3", "--distribution=arbitrary", "--gpu-bind=closest"} <= set(command.argv)
    assert {str(path.absolute()): text for path, text in launch.files.items()} == {
        command.env["SLURM_HOSTFILE"]: "n1\nn1\nn2\n"
    }
    with pytest.raises(UsageError, match=r"srun=torchrun starts as many ranks on every node"):
        LAUNCHERS["slurm"](job(hosts=hosts, slurm=Slurm(srun="torchrun")))


@pytest.mark.parametrize(("mode", "tasks", "cpus"), [("tasks", 4, 3), ("torchrun", 2, 6)])
def test_srun_is_told_everything(mode: str, tasks: int, cpus: int) -> None:
    launch = LAUNCHERS["slurm"](job(slurm=Slurm(srun=mode, cpus_per_task=3), rendezvous=("n1", 29500)))
    (command,) = launch.commands
    assert {"--nodes=2", f"--ntasks={tasks}", f"--ntasks-per-node={tasks // 2}", f"--cpus-per-task={cpus}"} <= set(
        command.argv
    )
    assert (command.env["MASTER_ADDR"], command.env["MASTER_PORT"]) == ("n1", "29500")
    assert command.env["MLITE_RANKS"] == "4"  # which every rank compares with what it finds
    assert ("--rank=SLURM_PROCID" in command.argv) == (mode == "tasks")
    assert ("--master-addr=n1" in command.argv) == (mode == "torchrun")
    assert command.argv[-3:] == ["--", "python", "t.py"]


def test_a_container_brings_its_own_python_and_sees_the_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/tmp")
    (command,) = LAUNCHERS["slurm"](
        job(run_dir=Path("/runs/x"), slurm=Slurm(container="img", container_mounts="/d:/d"))
    ).commands
    assert "--container-mounts=/runs/x:/runs/x,/tmp:/tmp,/d:/d" in command.argv
    assert command.argv[-3:] == ["--", "python3", "t.py"]
    assert sys.executable not in command.argv


@pytest.mark.parametrize(
    ("changes", "run_dir", "message"),
    [
        ({"array": "1-3", "chain": 2}, "runs/x", "give one of them"),
        ({"extra": ["--array=1-3"]}, "runs/x", "extra: --array is set .* use launch.slurm.array"),
        ({"extra": ["--mem-per-cpu=4G", "-o x"]}, "runs/x", "extra: -o is set .* logs are in the run folder"),
        ({"extra": ["-t7"]}, "runs/x", "extra: -t7 is set .* use launch.slurm.time"),
        ({"extra": ["-vN3"]}, "runs/x", "extra: -vN3 is set .* use --nodes=N"),
        ({"extra": ["-o/tmp/zz"]}, "runs/x", "logs are in the run folder"),
        ({"extra": ["--arra=1-3"]}, "runs/x", "extra: --arra is set .* use launch.slurm.array"),
        ({"extra": ["--hold --sig=B:9"]}, "runs/x", "extra: --sig is set"),
        ({"extra": ["--test-only"]}, "runs/x", "--dry_run shows what"),
        ({"extra": ["--wait"]}, "runs/x", "launch logs JOB --follow"),
        ({}, "runs\\/x", "does not take a backslash"),
    ],
)
def test_scripts_that_slurm_would_misread_are_refused(changes: dict[str, Any], run_dir: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        slurm.script(job(run_dir=Path(run_dir)), ["c.yaml"], {}, options(**changes))


@pytest.mark.parametrize(
    "option", ["--ntasks=1", "-n1", "-n", "--nodel=n1", "--output=x", "--export=NONE", "-lwn1", "--jobid=3"]
)
def test_what_srun_is_told_is_not_said_again(option: str) -> None:
    with pytest.raises(UsageError, match=r"^launch.slurm.srun_extra: \S+ is set by the launcher; "):
        slurm.describe(options(srun_extra=["--overlap", option]), {})


def test_setup_ends_with_its_last_line() -> None:
    lines = slurm.script(job(), ["c.yaml"], {}, options(setup=["echo on \\"])).splitlines()
    assert lines[lines.index("echo on \\") + 1] == ""


def test_other_options_are_handed_on() -> None:
    sbatch = ["--mail-type=END", "-Jname", "--exclude=n1", "--wait-all-nodes=1", "--nice=9", "-H", "-I60", "-pmain"]
    sbatch.append('--comment="lr 1 -e 5"')
    assert [f"#SBATCH {option}" in slurm.script(job(), [], {}, options(extra=sbatch)) for option in sbatch]
    srun = ["--gpu-bind=closest", "--exclusive", "--exact", "--overlap", "--mem=0", "-l", "--container-writable", "-t9"]
    srun += ["--mpi=pmix", "--kill-on-bad-exit=1", "-c2", "--comment=a -n b"]
    assert slurm.describe(options(srun_extra=srun), {}).srun_extra == tuple(srun)


@pytest.mark.parametrize(("array", "numbers"), [("3", [3]), ("0-2", [0, 1, 2]), ("7,1-2,0-6:3%4", [0, 1, 2, 3, 6, 7])])
def test_tasks_are_counted_as_sbatch_counts_them(array: str, numbers: list[int]) -> None:
    assert slurm.task_numbers(options(array=array)["array"]) == numbers
    with pytest.raises(UsageError, match="is more than 10000 runs"):
        slurm.task_numbers(f"{array.partition('%')[0]},0-9999999")


def test_a_chain_is_one_script_submitted_again_and_again(tmp_path: Path) -> None:
    result = launch_with_sbatch(
        tmp_path, 'echo "$*" >>"$LOG"; echo "$(wc -l <"$LOG");cluster"', "--launch.slurm.chain=3"
    )
    result.expect(
        exit_code=0, stdout="^1\n2\n3\n$", stderr=r"as job 1, and 2, 3 after it; go on with\n  python -m launch"
    )
    script = f"{tmp_path}/run/logs/slurm.sh"
    later = f"--kill-on-invalid-dep=yes {script} --checkpoint.resume=auto"
    assert (tmp_path / "log").read_text().splitlines() == [
        f"--parsable {script}",
        f"--parsable --dependency=afternotok:1 {later}",
        f"--parsable --dependency=afternotok:1,afternotok:2 {later}",
    ]
    assert (tmp_path / "run/logs/slurm.jobs").read_text() == "1\n2\n3\n"


@pytest.mark.parametrize(
    ("sbatch", "said"),
    [
        (
            """echo "sbatch: unrecognized option '--x'" >&2; echo 'Try "sbatch --help" for more' >&2; exit 1""",
            "unrecogn",
        ),
        ("echo 'sbatch: Job 5 to start at noon' >&2", "Job 5 to start"),
    ],
)
def test_an_sbatch_that_submits_nothing_is_told_by_its_reason(tmp_path: Path, sbatch: str, said: str) -> None:
    launch_with_sbatch(tmp_path, sbatch).expect(
        exit_code=2, stdout="^$", stderr=f"^error: sbatch: {said}.*; the script"
    )
    assert not (tmp_path / "run/logs/slurm.jobs").exists()


def test_a_jobs_number_is_told_though_it_cannot_be_kept(tmp_path: Path) -> None:
    """As on a disk that has filled up."""
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run/logs/slurm.jobs").symlink_to("/dev/full")
    full = f"error: {tmp_path}/run/logs/slurm.jobs: No space left on device; it was submitted as job 4\n"
    launch_with_sbatch(tmp_path, "echo 4").expect(exit_code=7, stdout="^4\n$", stderr=f"^{full}$")
    (tmp_path / "run/logs/slurm.sh").unlink()
    (tmp_path / "run/logs/slurm.sh").symlink_to("/dev/full")
    full = f"error: {tmp_path}/run/logs/slurm.sh: No space left on device\n"
    launch_with_sbatch(tmp_path, "echo 4").expect(exit_code=7, stdout="^$", stderr=f"^{full}$")


def test_runs_of_an_array_have_their_own_folders(tmp_path: Path) -> None:
    """Slurm makes none for a job's output, and then fails without a word."""
    refused = launch_with_sbatch(tmp_path, "echo 'sbatch: error: no' >&2; exit 1", "--launch.slurm.array=0-1")
    refused.expect(exit_code=2, stderr="^error: sbatch: no; the script: ")
    assert not (tmp_path / "run-0").exists()
    launch_with_sbatch(tmp_path, "echo 4", "--launch.slurm.array=0-1").expect(exit_code=0)
    assert f"#SBATCH --output={tmp_path}/run-%a/logs/slurm-%A_%a.out\n" in (tmp_path / "run/logs/slurm.sh").read_text()
    assert slurm_jobs.find(str(tmp_path / "run")) == (["4"], [tmp_path / f"run-{task}/logs" for task in (0, 1)])
    assert slurm_jobs.find(str(tmp_path / "run-1")) == (["4_1"], [tmp_path / "run-1/logs"])


@pytest.mark.parametrize("task", ["4_0", "4_9"])
def test_a_task_that_slurm_has_forgotten_is_like_a_forgotten_job(
    task: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "scontrol").write_text('#!/bin/sh\necho "Job $3 not found"; exit 1\n')
    run_dir = folder / "run-0"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "logs/slurm.jobs").write_text(f"{task}\n")
    (run_dir / "logs/rank_0.log").write_text("trained\n")
    assert (slurm_jobs.status(task), slurm_jobs.status(str(run_dir))) == (2, 0)
    assert slurm_jobs.cancel(str(run_dir), wait=9) == 0
    assert slurm_jobs.logs(str(run_dir), rank=0, follow=True) == 0
    shown, said = capfd.readouterr()
    assert shown == f"{run_dir}: no step yet\ntrained\n"
    forgotten = f"Slurm knows no job {task} any more\n"
    assert said == f"{forgotten}{forgotten}{run_dir}: nothing left to cancel\n"
    with pytest.raises(UsageError, match=f"Slurm knows no job {task} any more; give its run folder"):
        slurm_jobs.logs(task, rank=None, follow=False)


def test_the_logs_of_a_run_that_was_not_submitted_are_its_first_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Until its launcher has gone."""
    monkeypatch.setattr(slurm_jobs, "_POLL_S", 0.05)
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs/rank_0.log"
    log.write_text("step 1\n")
    with (tmp_path / "logs/launcher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def ends() -> None:
            log.write_text("step 1\nstep 2\n")
            lock.close()

        threading.Timer(0.3, ends).start()
        assert slurm_jobs.logs(str(tmp_path), rank=None, follow=True) == 0
    assert capfd.readouterr().out == "step 1\nstep 2\n"


TASKS = """JobId=4 ArrayJobId=4 ArrayTaskId=2 JobName=x
   JobState=RUNNING
   StdOut=/x-2/logs/slurm-4_2.out

JobId=6 ArrayJobId=4 ArrayTaskId=1 JobName=x
   JobState=FAILED
   StdOut=/x-1/logs/slurm-4_1.out

JobId=4 ArrayJobId=4 ArrayTaskId=3-9%2 ArrayTaskThrottle=2 JobName=x
   JobState=PENDING
   StdOut=/x-4294967294/logs/slurm-4_4294967294.out
"""


@pytest.mark.parametrize(
    ("job_id", "shown", "calls"),
    [
        ("4", TASKS, ["scancel --state=PENDING 4", "scontrol update JobId=4_2 Requeue=0", ASK.format("4_2")]),
        ("4_2", TASKS.split("\n\n")[0], ["scontrol update JobId=4_2 Requeue=0", ASK.format("4_2")]),
        ("4_7", TASKS.split("\n\n")[2], ["scancel 4_7"]),
    ],
    ids=["all", "running", "waiting"],
)
def test_an_array_is_cancelled_as_a_whole_or_by_its_tasks(
    job_id: str, shown: str, calls: list[str], folder: Path
) -> None:
    """The last task to start has the array's number, which would mean all of them."""
    (folder / "shown").write_text(shown)
    for name in ("scontrol", "scancel", "squeue"):
        text = f"""case "{name} $*" in
            *--batch*) echo "{name} $*" >>calls; : >shown; exit ;;
            "scontrol show job "*) exec cat shown ;;
            squeue*) exit ;;
        esac
        echo "{name} $*" >>calls"""
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    assert slurm_jobs.cancel(job_id, wait=9) == 0
    assert (folder / "calls").read_text().splitlines() == calls


def test_without_sbatch_the_script_is_there_to_take_along(tmp_path: Path) -> None:
    result = launch_with_sbatch(tmp_path, "")
    result.expect(exit_code=2, stderr=f"^error: there is no sbatch here; .*: sbatch {tmp_path}/run/logs/slurm.sh\n$")
    assert shlex.quote(str(tmp_path / "tiny.yaml")) in (tmp_path / "run/logs/slurm.sh").read_text()
    shown = launch_with_sbatch(tmp_path, "", "--dry_run").expect(exit_code=0, stderr="^$").stdout
    assert shown == (tmp_path / "run/logs/slurm.sh").read_text()
    for command in ("status", "cancel"):
        asked = run_job([PYTHON, "-m", "launch", command, "7"], timeout=20, env={"PATH": str(tmp_path)})
        asked.expect(exit_code=2, stderr="^error: there is no scontrol here")


def test_srun_starts_every_rank_of_an_allocation(tmp_path: Path) -> None:
    """The whole way inside an allocation, with an srun that starts its tasks here."""
    put(tmp_path, "srun")
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = [PYTHON, "-m", "launch", "verify", "--via=slurm", "--nproc=2", f"--dir={tmp_path}/it's $(x)\n"]
    shown = run_job(argv, timeout=60, env=env).expect(exit_code=0, stderr="^$").stdout
    assert shown.endswith("\nslurm: 2 ranks on 1 host, each where the plan has it\n")
    reports = [json.loads((tmp_path / f"it's $(x)\n/verify/slurm/logs/rank_{n}.exit.json").read_text()) for n in (0, 1)]
    assert [report["exit_code"] for report in reports] == [0, 0]
    assert run_job(argv, timeout=60).expect(
        exit_code=2, stderr="^error: verify --via=slurm must run inside an allocation"
    )
