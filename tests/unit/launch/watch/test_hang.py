"""Who hangs, from recorded flights: what the ranks left, and the line that the user reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.hosts.hostfile import Host
from launch.hosts.job import Job
from launch.watch.hang import explain
from launch.watch.outcome import judge
from launch.watch.report import Report, Reports

# Names of groups, as torch numbers them: axis and ranks.
TP2 = {"0": ("world", [0, 1]), "3": ("tp", [0, 1])}
SQUARE = {
    0: {"0": ("world", [0, 1, 2, 3]), "5": ("dp", [0, 2]), "7": ("tp", [0, 1])},
    1: {"0": ("world", [0, 1, 2, 3]), "6": ("dp", [1, 3]), "7": ("tp", [0, 1])},
    2: {"0": ("world", [0, 1, 2, 3]), "5": ("dp", [0, 2]), "8": ("tp", [2, 3])},
    3: {"0": ("world", [0, 1, 2, 3]), "6": ("dp", [1, 3]), "8": ("tp", [2, 3])},
}
IN_LAYER = [
    "torch/distributed/distributed_c10d.py:3252 (all_reduce)",
    "megatron_lite/distributed/comm.py:33 (all_reduce)",
    "megatron_lite/layers/linear.py:58 (backward)",
    "megatron_lite/training/step.py:103 (train_step)",
]
IN_LOADER = ["megatron_lite/data/loader.py:120 (__next__)", "megatron_lite/training/run.py:260 (loop)"]


def call(group: str, number: int, *, done: bool = False, op: str = "all_reduce", size: int = 4, **more: Any) -> dict:
    facts = {"sizes": [[size, 8]], "dtypes": ["Float"], "created": 100.0 + number / 100, "layer": "", "backward": False}
    return {"group": group, "number": number, "op": op, "done": done, **facts, **more}


def leave(folder: Path, rank: int, groups: dict, *calls: dict, stack: list[str] = IN_LAYER, **more: Any) -> None:
    """The record of one rank, written 12 s after what it is in had begun."""
    entered = {name: max((c["number"] for c in calls if c["group"] == name), default=0) for name in groups}
    record = {"rank": rank, "host": f"node{rank // 2}", "pid": 100 + rank, "attempt": 0, "time": 112.1, "step": 7}
    tree = {
        **record,
        "waiting": any(not c["done"] for c in calls),
        "stack": stack,
        "groups": {name: {"axis": axis, "ranks": ranks} for name, (axis, ranks) in groups.items()},
        "entered": entered,
        "collectives": calls,
        **more,
    }
    (folder / f"rank_{rank}.flight.json").write_text(json.dumps(tree))


def told(folder: Path) -> str:
    finding = explain(folder, Reports(folder, 0, range(8)))
    assert finding is not None
    assert "\n" not in finding.line
    return finding.line.replace(str(folder), "logs")


def test_a_rank_in_its_own_code(tmp_path: Path) -> None:
    waits = call("3", 10, layer="blocks.3.attention.qkv", backward=True)
    leave(tmp_path, 0, TP2, call("3", 9, done=True), waits)
    leave(tmp_path, 1, TP2, call("3", 9, done=True), stack=IN_LOADER)
    (tmp_path / "rank_1.stacks.txt").write_text("stack")
    assert told(tmp_path) == (
        "rank 1 (node0, pid 101) hangs in megatron_lite/data/loader.py:120 (__next__): it has not entered all_reduce "
        "#10 (group tp, blocks.3.attention.qkv backward, megatron_lite/layers/linear.py:58 (backward), step 7); "
        "rank 0 has waited for it for 12 s; stacks: logs/rank_1.stacks.txt"
    )


def test_the_root_of_a_chain_of_waits(tmp_path: Path) -> None:
    """0 waits for 1 in tp, 1 and 2 wait for 3: the one that nobody has to wait behind is named."""
    leave(tmp_path, 0, SQUARE[0], call("7", 5))
    leave(tmp_path, 1, SQUARE[1], call("7", 4, done=True), call("6", 2))
    leave(tmp_path, 2, SQUARE[2], call("8", 4))
    leave(tmp_path, 3, SQUARE[3], call("8", 3, done=True), call("6", 1, done=True), stack=IN_LOADER)
    line = told(tmp_path)
    assert line.startswith("rank 3 (node1, pid 103) hangs in megatron_lite/data/loader.py:120")
    assert "it has not entered all_reduce #2 (group dp, " in line
    assert "ranks 1, 2 have waited for it for 12 s" in line


def test_a_stopped_rank_leaves_no_record(tmp_path: Path) -> None:
    leave(tmp_path, 0, TP2, call("3", 10))
    stopped = Report(1, "h", 11, 9, 0, 0.0, signal=9, stopped=True, asked=True, time=1.0)
    (tmp_path / "rank_1.exit.json").write_text(json.dumps(stopped.__dict__))
    assert told(tmp_path).startswith(
        "rank 1 (h, pid 11) was stopped (SIGSTOP?) and killed: it has not entered all_reduce #10 (group tp, "
    )


def test_a_rank_in_native_code_is_found_by_faulthandlers_stack(tmp_path: Path) -> None:
    leave(tmp_path, 0, TP2, call("3", 10))
    (tmp_path / "rank_1.start.json").write_text(json.dumps(Report(1, "h", 11, 9, 0, 0.0).__dict__))
    (tmp_path / "rank_1.stacks.txt").write_text(
        'Thread 0x0001 (most recent call first):\n  File "/usr/lib/python3.11/threading.py", line 3 in run\n\n'
        'Current thread 0x0002 (most recent call first):\n  File "/x/site-packages/numpy/core.py", line 3 in sort\n'
        '  File "/home/me/megatron_lite/data/order.py", line 44 in shuffled\n'
        '  File "/home/me/megatron_lite/training/run.py"'
    )
    assert "rank 1 (h, pid 11) hangs in megatron_lite/data/order.py:44 (shuffled): it has not" in told(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"size": 7}, "rank 1 (node0, pid 101) called all_reduce of 7×8 float"),
        ({"op": "barrier", "sizes": [], "dtypes": []}, "rank 1 (node0, pid 101) called barrier of nothing"),
    ],
)
def test_ranks_that_disagree(tmp_path: Path, theirs: dict, said: str) -> None:
    leave(tmp_path, 0, TP2, call("3", 10, layer="blocks.0.mlp.down"))
    leave(tmp_path, 1, TP2, call("3", 10, **theirs))
    line = told(tmp_path)
    assert (
        "ranks disagree about collective #10 (group tp, ranks 0, 1): rank 0 (node0, pid 100) called all_reduce" in line
    )
    assert f"of 4×8 float (blocks.0.mlp.down, megatron_lite/layers/linear.py:58 (backward), step 7), but {said}" in line


def test_sizes_may_differ_where_they_may(tmp_path: Path) -> None:
    leave(tmp_path, 0, TP2, call("3", 10, op="all_to_all"))
    leave(tmp_path, 1, TP2, call("3", 10, op="all_to_all", size=7))
    assert "ranks 0, 1 have all entered all_to_all #10" in told(tmp_path)


def test_another_order_of_groups(tmp_path: Path) -> None:
    leave(tmp_path, 0, TP2, call("0", 4))
    leave(tmp_path, 1, TP2, call("3", 9))
    line = told(tmp_path)
    assert "ranks wait for each other, in different collectives: rank 0 waits in all_reduce #4 (group world," in line
    assert "rank 1 waits in all_reduce #9 (group tp," in line


def test_a_link_that_is_down(tmp_path: Path) -> None:
    for rank in range(4):
        leave(tmp_path, rank, SQUARE[rank], call("0", 6))
    assert "ranks 0, 1, 2, 3 have all entered all_reduce #6 (group world," in told(tmp_path)
    assert "is the network between node0, node1 up?" in told(tmp_path)


def test_records_of_another_attempt_and_broken_ones_do_not_count(tmp_path: Path) -> None:
    leave(tmp_path, 0, TP2, call("3", 10), attempt=1)
    (tmp_path / "rank_1.flight.json").write_text('{"rank": 1')
    assert explain(tmp_path, Reports(tmp_path, 0, range(8))) is None


def test_a_rank_that_was_killed_comes_before_any_record(tmp_path: Path) -> None:
    job = Job(("train",), (Host("localhost", 2),), tmp_path)
    job.log_dir.mkdir()
    leave(job.log_dir, 0, TP2, call("3", 10))
    for rank, end in enumerate(({"exit_code": 5}, {"signal": 11})):
        report = {"rank": rank, "host": "h", "pid": 10 + rank, "shim": 9, "attempt": 0, "started": 0.0, **end}
        (job.log_dir / f"rank_{rank}.exit.json").write_text(json.dumps(report))
    assert "rank 1 (h, pid 11) was killed by SIGSEGV" in judge(job, "torchrun", [(None, 1)], False).cause
    (job.log_dir / "rank_1.exit.json").unlink()
    outcome = judge(job, "torchrun", [(None, 1)], False)
    assert (outcome.exit_code, outcome.rank) == (5, 1)
    assert outcome.cause.startswith("rank 1 never started: it has not entered all_reduce #10")
