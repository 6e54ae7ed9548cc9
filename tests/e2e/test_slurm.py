"""Runs on a real Slurm: where their ranks are, what they compute, how they are asked after, and how they end."""

import json
import re
from pathlib import Path

import pytest

from launch.launchers.slurm import expand
from tests.kit.hosts import eventually
from tests.kit.jobs import PYTHON
from tests.kit.launches import HEALED, LIMIT, launch_on, output, queued_again, submit
from tests.kit.slurm import Slurm
from tests.kit.tiny import TinyRuns, assert_same_run, checkpoint_steps, tiny_config

pytestmark = pytest.mark.timeout(300)


def hosts_of_ranks(run_dir: Path) -> list[str]:
    reports = [json.loads((run_dir / f"logs/rank_{rank}.exit.json").read_text()) for rank in range(2)]
    return [report["host"] for report in reports]


@pytest.mark.parametrize("srun", ["tasks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_submitted_run_computes_what_torchrun_does_on_the_nodes_in_order(
    srun: str, slurm: Slurm, tiny: TinyRuns, tmp_path: Path
) -> None:
    flags = (f"--launch.slurm.srun={srun}", "--launch.slurm.gres=gpu:1", "--launch.slurm.chain=2")
    job, spare = submit(slurm, tiny, tmp_path, *flags)
    slurm.wait(job, "COMPLETED", LIMIT)
    slurm.wait(spare, "CANCELLED")  # there is nothing left to do
    assert_same_run(tmp_path / "run", tiny.reference)
    if slurm.cluster.kind == "namespaces":
        assert hosts_of_ranks(tmp_path / "run") == slurm.nodes[:2]
    status = launch_on(slurm, "status", str(job)).expect(exit_code=0).stdout
    assert re.search(rf"^job {job} \(run\): COMPLETED on \S+, .*\n.*: step 12; last outcome: done\n", status)
    for words in ([str(job)], [str(tmp_path / "run"), "--follow"]):
        launch_on(slurm, "logs", *words).expect(
            exit_code=0, stdout="run: 2 ranks on 2 hosts through slurm[^$]*step 12 "
        )
    launch_on(slurm, "logs", str(job), "--rank=1").expect(exit_code=0, stdout="# rank 1, attempt 0")


@pytest.mark.slow
def test_a_run_is_cancelled_when_it_has_saved_and_what_waits_for_it_with_it(
    slurm: Slurm, tiny: TinyRuns, tmp_path: Path
) -> None:
    first, second = submit(slurm, tiny, tmp_path, "--launch.slurm.chain=2", faults="sleep:seconds=0.2")
    run_dir = tmp_path / "run"
    eventually(lambda: "step 1 " in output(run_dir, first), f"{first} trains", LIMIT)
    assert slurm.job(second)["Dependency"].startswith(f"afternotok:{first}")
    shown = launch_on(slurm, "status", str(run_dir)).expect(exit_code=0).stdout
    assert re.search(rf"job {first} \(run\): RUNNING on \S+, .*\njob {second} \(run\): PENDING \(Dependency\)", shown)
    cancelled = launch_on(slurm, "cancel", str(first))
    cancelled.expect(exit_code=0, stderr=rf"cancelled {second}, which waited for it\nasked {first} to save")
    ended = slurm.job(first)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    assert slurm.job(second)["JobState"] == "CANCELLED"
    assert checkpoint_steps(run_dir)[-1] < 12
    launch_on(slurm, "cancel", str(first)).expect(exit_code=0, stderr="nothing left to cancel")


@pytest.mark.slow
def test_a_job_whose_node_dies_is_queued_again_and_goes_on(slurm: Slurm, tiny: TinyRuns, tmp_path: Path) -> None:
    (job,) = submit(slurm, tiny, tmp_path, HEALED, faults="sleep:seconds=0.2")
    run_dir = tmp_path / "run"
    eventually(lambda: checkpoint_steps(run_dir), f"{job} has saved", LIMIT)
    slurm.kill_node(1)
    queued_again(slurm, job)
    slurm.wait(job, "COMPLETED", LIMIT)
    assert_same_run(run_dir, tiny.reference)
    if slurm.cluster.kind == "namespaces":
        assert hosts_of_ranks(run_dir) == [slurm.nodes[0], slurm.nodes[2]]


@pytest.mark.slow
def test_a_preempted_run_is_queued_again_and_goes_on(slurm: Slurm, tiny: TinyRuns, tmp_path: Path) -> None:
    (job,) = submit(slurm, tiny, tmp_path, HEALED, faults="sleep:seconds=0.2")
    eventually(lambda: "step 1 " in output(tmp_path / "run", job), f"{job} trains", LIMIT)
    wanted = ["--partition=high", "--nodes=3", "--exclusive", "--time=5"]
    slurm.submit("#!/bin/sh\nsleep 1\n", *wanted)
    queued_again(slurm, job)
    slurm.wait(job, "COMPLETED", LIMIT)
    assert_same_run(tmp_path / "run", tiny.reference)


@pytest.mark.slow
def test_a_task_of_an_array_is_queued_again_and_cancelled_by_itself(
    slurm: Slurm, tiny: TinyRuns, tmp_path: Path
) -> None:
    (job,) = submit(slurm, tiny, tmp_path, "--launch.slurm.array=0-1", faults="sleep:seconds=0.5")

    def states() -> list[list[str]]:
        asked = slurm.run(["squeue", "-h", "-r", "-j", str(job), "-o", "%i %T"], timeout=20)
        return sorted(line.split() for line in asked.stdout.splitlines())

    for task in (0, 1):
        path = tmp_path / f"run-{task}/metrics.jsonl"
        eventually(lambda path=path: path.exists() and path.read_text(), f"{path.parent.name} trains", LIMIT)
    # The task that has started last has the number of the array.
    slurm.run(["scancel", "--batch", "--signal=USR1", f"{job}_1"], timeout=20).expect(exit_code=0)
    eventually(lambda: [f"{job}_1", "PENDING"] in states(), "the task is queued again", LIMIT, every=0.2)
    assert [f"{job}_0", "RUNNING"] in states()
    launch_on(slurm, "cancel", f"{job}_0").expect(exit_code=0, stderr=f"^asked {job}_0 to save")
    assert [state[0] for state in states()] == [f"{job}_1"]
    shown = launch_on(slurm, "status", str(job)).expect(exit_code=0).stdout
    assert re.search(rf"^job {job}_1 \(run\): .*, queued again 1 times$", shown, re.MULTILINE)
    assert re.search(r"/run-0: step \d+; last outcome: preempted, saved$", shown, re.MULTILINE)
    launch_on(slurm, "logs", f"{job}_0", "--rank=1").expect(exit_code=0, stdout="# rank 1, attempt 0")
    launch_on(slurm, "logs", str(job)).expect(exit_code=2, stderr=f"{job} is an array of 2 runs; give one of them")
    launch_on(slurm, "cancel", str(tmp_path / "run-1")).expect(exit_code=0)
    assert states() == []


@pytest.mark.parametrize(("asked", "counts"), [("--ntasks-per-node=2", (2, 2)), ("--ntasks=3", (2, 1))])
def test_ranks_fill_the_nodes_of_an_allocation_in_order(
    asked: str, counts: tuple[int, int], slurm: Slurm, tmp_path: Path
) -> None:
    nodes = ",".join(slurm.nodes[1:3])
    argv = ["salloc", f"--nodelist={nodes}", "--nodes=2", asked, PYTHON, "-m", "launch", "verify"]
    result = slurm.run([*argv, "--via=slurm", f"--dir={tmp_path}"], timeout=60)
    if slurm.cluster.kind == "loopback":
        result.expect(exit_code=1, stderr="hosts of the hostfile are one machine")  # in everything else they are right
        return
    size = sum(counts)
    result.expect(exit_code=0, stdout=f"slurm: {size} ranks on 2 hosts, each where the plan has it")
    reports = [json.loads((tmp_path / f"verify/slurm/logs/rank_{n}.exit.json").read_text()) for n in range(size)]
    placed = [node for node, count in zip(slurm.nodes[1:3], counts, strict=True) for _ in range(count)]
    assert [report["host"] for report in reports] == placed


def test_what_sbatch_refuses_is_one_line(slurm: Slurm, tiny: TinyRuns, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny.data)
    refused = launch_on(slurm, "run", str(config), "--via=slurm", "--launch.slurm.partition=none")
    refused.expect(exit_code=2, stderr=r"^error: sbatch: .*Invalid partition.*; the script: \S+/run/logs/slurm.sh\n$")


def test_an_option_that_srun_refuses_is_a_mistake_in_the_config(slurm: Slurm, tiny: TinyRuns, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny.data)
    argv = ["salloc", "--nodes=1", "--ntasks=2", PYTHON, "-m", "launch", "run", str(config), "--via=slurm"]
    for option, said in (
        ("--bogus", "srun: unrecognized option '--bogus'"),
        ("--ntasks=1", "--ntasks is set by the launcher"),
    ):
        result = slurm.run([*argv, "--max_restarts=1", f"--launch.slurm.srun_extra=[{option}]"], timeout=60)
        result.expect(exit_code=2, stderr=rf"\nerror: launch\.slurm\.srun_extra: {said}")
        assert "restart" not in result.stderr


def test_a_task_that_was_never_there_is_one_that_slurm_does_not_know(slurm: Slurm) -> None:
    job = slurm.submit("#!/bin/sh\nsleep 60\n", "--array=0-1", "--hold")
    launch_on(slurm, "status", f"{job}_9").expect(exit_code=2, stderr=f"^Slurm knows no job {job}_9 any more\n$")
    launch_on(slurm, "cancel", f"{job}_9").expect(exit_code=0, stderr="nothing left to cancel")


def test_slurm_reads_a_hostile_name_as_it_is_written(slurm: Slurm, tiny: TinyRuns, tmp_path: Path) -> None:
    folder = tmp_path / "a 'b\" #c 100% $(touch canary) é"
    folder.mkdir()
    config = tiny_config(folder, tiny.data)
    words = ["run", str(config), "--via=slurm", "--launch.slurm.extra=[--hold]", "--launch.slurm.constraint=cpu"]
    (job,) = launch_on(slurm, *words).expect(exit_code=0).stdout.split()
    shown = rf"PENDING \(JobHeldUser\).*\n{re.escape(str(folder))}/run: no step yet\n"
    launch_on(slurm, "status", job).expect(exit_code=0, stdout=shown)
    launch_on(slurm, "cancel", job).expect(exit_code=0, stderr=f"cancelled {job}\n")


def test_the_short_form_of_a_list_is_read_as_slurm_reads_it(slurm: Slurm) -> None:
    for hostlist in ("a[1-3,07],b", "n[009-011]x[1,3-4],c-1.d", "x[1-2]", "q"):
        asked = slurm.run(["scontrol", "show", "hostnames", hostlist], timeout=20).expect(exit_code=0)
        assert expand(hostlist) == asked.stdout.split()
