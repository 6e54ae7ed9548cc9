import sys
from pathlib import Path

from launch import LAUNCHERS, Job
from launch.job import rank_defaults
from launch.supervise import describe


def job(**changes) -> Job:
    return Job(**{"program": ("python", "train.py", "a b"), "nproc": 2, "run_dir": Path("runs/x"), **changes})


def test_command_starts_every_rank_in_its_shim_on_a_free_port_without_restarts() -> None:
    launch = LAUNCHERS["torchrun"](job(nproc=3))
    assert launch.argv[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=3", "--max-restarts=0"} <= set(launch.argv)
    shim = launch.argv[launch.argv.index("launch.rank") + 1 :]
    assert shim == ["--log-dir=runs/x/logs", "--stderr-fd=0", "--", "python", "train.py", "a b"]


def test_command_is_pure() -> None:
    assert LAUNCHERS["torchrun"](job()) == LAUNCHERS["torchrun"](job())


def test_a_restart_says_so_to_the_ranks_and_resumes() -> None:
    first = job(resume=("--checkpoint.resume=auto",))
    again = LAUNCHERS["torchrun"](first.next_attempt())
    assert LAUNCHERS["torchrun"](first).argv[-1] == "a b"
    assert again.argv[-1] == "--checkpoint.resume=auto"
    assert again.env["MLITE_ATTEMPT"] == "1"


def test_threads_are_shared_out_unless_the_user_decided() -> None:
    assert int(rank_defaults(1, {})["OMP_NUM_THREADS"]) >= 1
    assert rank_defaults(10_000, {})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in rank_defaults(2, {"OMP_NUM_THREADS": "7"})


def test_dry_run_text_is_quoted_for_reading() -> None:
    text = describe(LAUNCHERS["torchrun"](job(env={"A": "x y"})))
    assert "A='x y' \\\n" in text
    assert text.endswith("python train.py 'a b'")
