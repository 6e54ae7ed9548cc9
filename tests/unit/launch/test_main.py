"""The command line, against a stand-in for ``megatron_lite`` that lies in the current directory."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import cli as launch_cli
from launch.__main__ import COMMANDS
from launch.cli import parse
from launch.hosts.hostfile import UsageError
from megatron_lite import cli as trainer_cli
from tests.kit.jobs import PYTHON, REPOSITORY, Result, run_job

STAND_IN = """
import json, os, sys
command, config, *flags = sys.argv[1:]
if command == "config":
    if config != "good.yaml":
        print("error: optim.lr=-1: must be greater than 0", file=sys.stderr)
        sys.exit(2)
    launch = {"env": {}, "forward": [], "tp_across_hosts": False, "ssh": {"port": None, "options": []}}
    checkpoint = {"resume": "auto"}
    run = {"dir": "runs", "name": "a run"}
    print(json.dumps({"run": run, "launch": launch, "checkpoint": checkpoint, "mesh": {"tp": 1}}))
else:
    print(json.dumps([os.environ["RANK"], config, flags]))
    sys.exit(6)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "megatron_lite").mkdir()
    (tmp_path / "megatron_lite" / "__init__.py").touch()
    (tmp_path / "megatron_lite" / "__main__.py").write_text(STAND_IN)
    return tmp_path


def read(words: list[str]) -> dict:
    run = COMMANDS["run"]
    return parse(words, run.flags, run.arguments, overrides=True)


def launch(folder: Path, *words: str) -> Result:
    return run_job([PYTHON, "-m", "launch", *words], timeout=30, cwd=folder, env={"PYTHONPATH": str(REPOSITORY)})


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.sampled_from(["--", "-x", "1e5"])
WORDS = st.builds("--{}={}".format, st.from_regex(r"[a-z][a-z0-9_.-]{0,9}", fullmatch=True), TEXT) | TEXT


@pytest.mark.parametrize("cli", [launch_cli, trainer_cli], ids=lambda cli: cli.__name__)
@given(words=st.lists(WORDS, unique_by=lambda word: word.partition("=")[0].replace("-", "_")))
def test_words_that_fire_is_not_asked_about_mean_what_it_says(cli, words: list[str]) -> None:
    words = [word for word in words if cli._PLAIN.fullmatch(word)]
    read = cli.split(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_PLAIN", re.compile("(?!)"))
        assert not words or cli.split(words) == read


def test_run_checks_the_config_and_trains_with_the_same_words(folder: Path) -> None:
    words = ("--model.name=two words", "--a.b='\"$(x)\n'", "--c.d=", "--e.f", "-1e-4")
    result = launch(folder, "run", "good.yaml", "--nproc", "2", *words)
    result.expect(
        exit_code=6,
        stderr=r"^a run: 2 ranks through torchrun, logs in runs/a run/logs\nerror: rank . \(\S+, pid \d+\) ended",
    )
    flags = ["--model.name=two words", "--a.b='\"$(x)\n'", "--c.d=", "--e.f=-1e-4"]
    assert json.loads(result.stdout) == ["0", "good.yaml", flags]
    assert json.loads((folder / "runs" / "a run" / "outcome.json").read_text())["exit_code"] == 6


def test_one_rank_is_one(folder: Path) -> None:
    launch(folder, "run", "good.yaml").expect(exit_code=6, stderr="^a run: 1 rank through torchrun")


def test_dry_run_starts_and_makes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    result = launch(folder, "run", "good.yaml", "--dry_run", "--optim.lr=1e-3").expect(exit_code=0, stderr="^$")
    variables, command = result.stdout.rsplit("\\\n", 1)
    assert "MLITE_ATTEMPT=0" in variables
    assert command.split()[1:3] == ["-m", "torch.distributed.run"]
    assert command.endswith(" -m megatron_lite train good.yaml --optim.lr=1e-3\n")
    assert " --standalone " in command
    assert sorted(folder.iterdir()) == before


def test_a_bad_config_is_passed_on_at_once(folder: Path) -> None:
    result = launch(folder, "run", "bad.yaml", "--nproc=2")
    result.expect(exit_code=2, stderr="^error: optim.lr=-1: must be greater than 0\n$", busy=0.6)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.yaml", "--nprocs=2"], "unknown flag --nprocs (did you mean 'nproc'?)"),
        (["x.yaml", "--nodes=2:1"], "--nodes=2:1: expected MIN:MAX, the smaller number first"),
        (["x.yaml", "--nodes=x"], "--nodes=x: expected a whole number from 1 to 16384"),
        (["x.yaml", "--hostfile=none"], "--hostfile=none: no such file"),
        (["x.yaml", "--rdzv=-oProxyCommand=x"], "--rdzv=-oProxyCommand=x: expected HOST or HOST:PORT"),
        (["x.yaml", "--rdzv=h:99999"], "--rdzv=h:99999: expected HOST or HOST:PORT"),
        (["x.yaml", "--via=torchrn"], "--via=torchrn: expected one of torchrun, deepspeed, mpirun"),
        (["x.yaml", "--nproc=0"], "--nproc=0: expected a whole number from 1 to 1024"),
        (["x.yaml", "--nproc=1e3"], "--nproc=1e3: expected a whole number"),
        (["x.yaml", "--nproc=999999999999"], "expected a whole number"),
        (["x.yaml", "--nproc"], "--nproc=True: expected a whole number"),
        (["x.yaml", "--max_restarts=-1"], "--max_restarts=-1: expected a whole number from 0"),
        (["x.yaml", "--dry_run=maybe"], "--dry_run=maybe: expected true or false"),
        (["x.yaml", "y.yaml"], "unexpected argument 'y.yaml'"),
        (["x.yaml", "train.steps=30"], "unexpected argument 'train.steps=30' (did you mean --train.steps=30?)"),
        (["x.yaml", "--", "--interactive"], "unexpected argument '--'"),
        (["x.yaml", "-", "split"], "unexpected argument '-'"),
        (["x.yaml", "-x"], "unknown flag --x"),
        ([], "missing CONFIG"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        read(words)
    assert message in str(error.value).splitlines()[0]


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(UsageError) as error:
        read(["--nproc=0", "--node=2"])
    assert len(str(error.value).splitlines()) == 3


def test_a_flag_that_only_the_config_knows_is_answered_by_it(tmp_path: Path) -> None:
    """Without a stand-in."""
    told = launch(
        tmp_path,
        "run",
        "x.yaml",
        "--max_steps=3",
        "--nprocs=2",
        "--lr",
        "1",
        "--who=1",
        "--peft=null",
        "--master_port=1",
    ).expect(exit_code=2)
    assert told.stderr.splitlines() == [
        f"error: unknown flag --{flag}; config keys are written --section.key=value"
        for flag in (
            "max_steps (is train.steps here)",
            "nprocs (did you mean 'nproc'?)",
            "lr (is optim.lr here)",
            "who",
            "peft (is a section here)",
            "master_port (is --rdzv=HOST:PORT here)",
        )
    ]


def test_values_stay_text() -> None:
    words = read(["a,b", "--x.y=1e5", "--x.z=None", "--dry-run", "--nproc", "3", "--u.v", "[1, 2]"])
    assert (words["config"], words["nproc"], words["dry_run"]) == ("a,b", 3, True)
    assert words["overrides"] == {"x.y": "1e5", "x.z": "None", "u.v": "[1, 2]"}


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        ([], "COMMAND …"),
        (["--help"], "COMMAND …"),
        (["run", "--help"], "run CONFIG"),
        (["plan", "x", "-h"], "plan CONFIG"),
    ],
)
def test_help(folder: Path, words: list[str], usage: str) -> None:
    launch(folder, *words).expect(exit_code=0, stdout=f"^usage: python -m launch {usage}", stderr="^$")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes=2"], "--nodes=2 needs --hostfile=FILE; or, where every node starts its own ranks"),
        (["--nodes=2", "--node_rank=0"], "--node_rank=I requires --nodes=N"),
        (["--nodes=2", "--node_rank=2", "--rdzv=h:1"], "--node_rank=I requires --nodes=N"),
        (["--rdzv_wait=9"], "--rdzv_wait is for hosts that start their own ranks, with --node_rank"),
        (["--include=a"], "--include and --exclude choose among the hosts of a --hostfile"),
        (["--hostfile=HF", "--nodes=4"], "--nodes=4: HF has 3 hosts"),
        (["--hostfile=HF", "--nodes=1:4"], "--nodes=1:4: HF has 3 hosts"),
        (["--hostfile=HF", "--nproc=3"], "--nproc=3: b has slots=2 in HF"),
        (["--hostfile=HF", "--node_rank=0"], "--node_rank is for hosts that start their own ranks"),
    ],
)
def test_hosts_that_cannot_be_meant(folder: Path, words: list[str], message: str) -> None:
    (folder / "HF").write_text("a slots=4\nb slots=2\nc slots=4\n")
    launch(folder, "run", "good.yaml", *words).expect(exit_code=2, stderr=f"^error: {re.escape(message)}")
    assert not (folder / "runs").exists()


def test_launches_of_one_run_on_several_hosts_have_one_name(folder: Path) -> None:
    words = ["run", "good.yaml", "--nodes=2", "--node_rank=1", "--rdzv=h:29500", "--nproc=3", "--dry_run"]
    for _ in range(2):
        launch(folder, *words).expect(exit_code=0, stdout=r"MLITE_JOB='?a run'? \\\n(.*\n)*MLITE_RANKS=6 ")


def test_nodes_takes_the_first_hosts_and_nproc_fewer_slots(folder: Path) -> None:
    (folder / "HF").write_text("a slots=4\nb slots=2\nc slots=4\n")
    shown = launch(folder, "plan", "good.yaml", "--hostfile=HF", "--nodes=2", "--nproc=1", "--via=torchrun")
    assert shown.expect(exit_code=0).stdout.splitlines()[:3] == [
        "rank  node  host  local rank  device  mesh",
        "0     0     a     0           0       –",
        "1     1     b     0           0       –",
    ]


def test_an_unknown_command_is_one_line(folder: Path) -> None:
    result = launch(folder, "rnu", "x.yaml")
    result.expect(
        exit_code=2, stderr=r"^error: unknown command 'rnu' \(did you mean 'run'\?\); there are: run, .*\n$", busy=0.6
    )


def test_a_run_folder_that_cannot_be_made_is_one_line(folder: Path) -> None:
    (folder / "runs").write_text("a file")
    launch(folder, "run", "good.yaml").expect(
        exit_code=7, stderr="error: runs/a run/logs: Not a directory\n$", busy=0.6
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder_is_one_line(folder: Path) -> None:
    (folder / "runs").mkdir(mode=0o500)
    launch(folder, "run", "good.yaml").expect(exit_code=7, stderr="error: .*: Permission denied\n$")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["plan", "good.yaml"]])
def test_output_that_nobody_reads_or_that_finds_no_room(folder: Path, words: list[str]) -> None:
    reader, closed = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for stdout, code, said in ((closed, 141, b""), (full, 7, b"error: the output: No space left on device\n")):
        argv, env = [PYTHON, "-m", "launch", *words], {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        ended = subprocess.run(argv, cwd=folder, env=env, stdout=stdout, stderr=subprocess.PIPE, timeout=30)
        os.close(stdout)
        assert (ended.returncode, ended.stderr) == (code, said)


def test_hosts_that_ssh_does_not_get_through_to_are_all_named(folder: Path) -> None:
    (folder / "HF").write_text("a slots=1\nb slots=1\nc slots=1\n")
    (folder / "ssh").write_text("#!/bin/sh\necho 'ssh: Could not resolve hostname' >&2; exit 255\n")
    env = {"PYTHONPATH": str(REPOSITORY), "PATH": f"{folder}"}
    argv = [PYTHON, "-m", "launch", "run", "good.yaml", "--hostfile=HF"]
    for examines in (argv, [PYTHON, "-m", "launch", "doctor", "--hostfile=HF"]):
        missing = run_job(examines, timeout=30, cwd=folder, env=env)
        missing.expect(exit_code=2, stderr="(^|\n)error: other hosts are reached by ssh, which is not in PATH\n$")
    (folder / "ssh").chmod(0o755)
    wrong = run_job(argv, timeout=30, cwd=folder, env={**env, "PATH": f"{folder}:{os.environ['PATH']}"})
    wrong.expect(exit_code=2, stderr="\nerror: a: ssh: Could not resolve hostname; ssh does not reach b, c either\n$")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "SLURM_JOB_ID is set without SLURM_JOB_NODELIST"),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "x"}, "SLURM_NTASKS=x: expected a number"),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS_PER_NODE": "x"}, "SLURM_NTASKS_PER_NODE=x: expected a number"),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_STEP_ID": "abc"}, "SLURM_STEP_ID=abc: expected a number"),
    ],
)
def test_odd_variables_of_slurms_are_one_line(folder: Path, given: dict[str, str], message: str) -> None:
    env = {"PYTHONPATH": str(REPOSITORY), "SLURM_JOB_ID": "5", **given}
    argv = [PYTHON, "-m", "launch", "run", "good.yaml", "--via=slurm", "--dry_run"]
    run_job(argv, timeout=30, cwd=folder, env=env).expect(exit_code=2, stderr=f"^error: {message}.*\n$")


def test_start_up_takes_no_time(folder: Path) -> None:
    began = time.monotonic()
    launch(folder, "run", "good.yaml", "--dry_run").expect(exit_code=0)
    assert time.monotonic() - began < 1


def test_a_host_that_cannot_be_examined_is_named(folder: Path) -> None:
    broken = "import resource\ndef getrlimit(_): raise OSError(13, 'Permission denied')\nresource.getrlimit = getrlimit"
    (folder / "sitecustomize.py").write_text(broken)
    (folder / "megatron_lite" / ".#open.py").symlink_to("me@host.1234")  # which is what editors leave, and no trouble
    paths = {"PYTHONPATH": f"{folder}:{REPOSITORY}"}
    result = run_job([PYTHON, "-m", "launch", "doctor"], timeout=30, cwd=folder, env=paths).expect(exit_code=5)
    assert result.stderr.splitlines()[1:] == ["error: [Errno 13] Permission denied"]


def test_the_doctor_overrides_only_a_config_that_is_given(folder: Path) -> None:
    result = launch(folder, "doctor", "--run.dir=x").expect(exit_code=2, stdout="^$")
    assert result.stderr == "error: --run.dir overrides a key of CONFIG, but no CONFIG is given\n"
    launch(folder, "doctor", "bad.yaml").expect(exit_code=2, stderr="^error: optim.lr=-1: must be greater than 0\n$")
