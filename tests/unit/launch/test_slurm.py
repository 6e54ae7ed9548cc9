"""Batch scripts, what they start and how they end, and node lists; Slurm's own commands are stand-ins on PATH."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import slurm
from launch.hostfile import Host, UsageError
from launch.job import Job, Slurm
from launch.launchers import LAUNCHERS
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
trap 'exit 75' USR1 TERM
echo $$ >"$LOG.pid.tmp"; mv "$LOG.pid.tmp" "$LOG.pid"
[ -z "$CODE" ] || exit "$CODE"
while :; do sleep 0.05; done
"""


def options(**changes: Any) -> dict[str, Any]:
    return SlurmConfig(**changes).model_dump(mode="json")


def job(**changes: Any) -> Job:
    return Job(**{"program": ("python", "t.py"), "hosts": TWO, "run_dir": Path("runs/x"), "slurm": Slurm(), **changes})


def stand_ins(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make ``folder`` the current directory, its ``python`` the launcher, and put an scontrol on PATH."""
    patch.chdir(folder)
    for name, text in (("python", LAUNCHER), ("scontrol", '#!/bin/sh\necho "$*" >>"$LOG.scontrol"\n')):
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
    ("signum", "requeue", "again"),
    [(signal.SIGUSR1, True, True), (signal.SIGUSR1, False, False), (signal.SIGTERM, True, False)],
)
def test_a_script_waits_for_the_save_and_asks_for_another_start_only_at_the_time_limit(
    signum: int, requeue: bool, again: bool, folder: Path
) -> None:
    text = slurm.script(job(), ["c.yaml"], {}, options(requeue=requeue))
    with subprocess.Popen(["bash", "-c", text], env={**os.environ, "CODE": ""}) as script:
        eventually((folder / "log.pid").exists, "the launcher runs")
        script.send_signal(signum)
        assert script.wait(timeout=20) == 75
    assert (folder / "log.scontrol").exists() == again
    if again:
        assert (folder / "log.scontrol").read_text() == "requeue 7\n"


@pytest.mark.parametrize("code", [0, 2, 5, 75])
@pytest.mark.parametrize("saved", [False, True])
def test_after_a_lost_rank_there_is_another_start_if_there_is_something_new_to_start_from(
    code: int, saved: bool, folder: Path
) -> None:
    run_dir = folder / "runs/a run"
    for path, age in ((run_dir / "logs/launcher.lock", 100), (run_dir / "checkpoints/latest", 50 if saved else 150)):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    text = slurm.script(job(run_dir=Path("runs/a run")), ["c.yaml"], {}, options())
    ended = subprocess.run(["bash"], input=text.encode(), timeout=20, env={**os.environ, "CODE": str(code)})
    assert ended.returncode == code
    assert (folder / "log.scontrol").exists() == (code == 5 and saved)


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
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS_PER_NODE": "4"}
    assert slurm.choose_hosts(where, env) == tuple(Host(f"n{i}", 4) for i in (1, 2, 3))
    assert slurm.choose_hosts({**where, "nodes": (2, 2), "nproc": 1}, env) == (Host("n1", 1), Host("n2", 1))
    assert len(slurm.choose_hosts({**where, "nodes": (2, 2)}, {})) == 2
    for wrong, given_env, message in (
        ({"nodes": (4, 4)}, env, "--nodes=4: this allocation has 3"),
        ({"nodes": (1, 4)}, env, "ask for one number"),
        ({"hostfile": Path("h"), "exclude": "n1"}, env, "--hostfile, --exclude: Slurm chooses the nodes"),
        ({}, {**env, "SLURM_STEP_ID": "0"}, "a task of srun's"),
    ):
        with pytest.raises(UsageError, match=message):
            slurm.choose_hosts({**where, **wrong}, given_env)
    assert slurm.choose_hosts(where, {**env, "SLURM_STEP_ID": str(0xFFFFFFFA)})  # an interactive shell of salloc's


@pytest.mark.parametrize(("mode", "tasks", "cpus"), [("tasks", 4, 3), ("torchrun", 2, 6)])
def test_srun_is_told_everything(mode: str, tasks: int, cpus: int) -> None:
    launch = LAUNCHERS["slurm"](job(slurm=Slurm(srun=mode, cpus_per_task=3), rendezvous=("n1", 29500)))
    (command,) = launch.commands
    assert {"--nodes=2", f"--ntasks={tasks}", f"--ntasks-per-node={tasks // 2}", f"--cpus-per-task={cpus}"} <= set(
        command.argv
    )
    assert (command.env["MASTER_ADDR"], command.env["MASTER_PORT"]) == ("n1", "29500")
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
        ({"extra": ["mail-type=END"]}, "runs/x", "launch.slurm.extra: 'mail-type=END' is not an option of sbatch"),
        ({"array": "1-3", "chain": 2}, "runs/x", "give one of them"),
        ({}, "runs\\/x", "does not take a backslash"),
    ],
)
def test_scripts_that_slurm_would_misread_are_refused(changes: dict[str, Any], run_dir: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        slurm.script(job(run_dir=Path(run_dir)), ["c.yaml"], {}, options(**changes))


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
    assert shown.endswith("\nslurm: 2 ranks on 1 hosts, each where the plan has it\n")
    reports = [json.loads((tmp_path / f"it's $(x)\n/verify/slurm/logs/rank_{n}.exit.json").read_text()) for n in (0, 1)]
    assert [report["exit_code"] for report in reports] == [0, 0]
    assert run_job(argv, timeout=60).expect(exit_code=2, stderr="^error: verify --via=slurm starts ranks where it is")
