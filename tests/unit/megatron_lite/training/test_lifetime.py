"""One wish to stop may come as several signals; a second wish ends the process at once."""

import json

import pytest

from tests.kit.jobs import PYTHON, run_job

# Children of one process, which has imported torch for all of them, each with signals that come at their times.
SCRIPT = """
import json, os, signal, sys, time
from megatron_lite.training.lifetime import StopRequest

def child(begun):
    (relayed, relay), (ready, tell), (over, end) = os.pipe(), os.pipe(), os.pipe()
    if pid := os.fork():
        os.read(ready, 1)
        return pid, relay, end
    alone = begun == "without a shim"
    stop = StopRequest(None if alone else relayed, attached=alone, local_size=2)
    stop.begun = begun != "early"
    signal.signal(signal.SIGVTALRM, lambda *_: None)
    os.write(tell, b"1")
    os.read(over, 1)  # the main thread is busy, as in a collective
    os._exit(75 if stop.asked else 1)

cases = json.loads(sys.argv[1])
children = [child(case[0][0]) for case in cases]
began, due = time.monotonic(), sorted((at, i, name) for i, case in enumerate(cases) for name, at in case[1:])
for at, i, name in due:
    time.sleep(max(0, began + at - time.monotonic()))
    pid, relay, _ = children[i]
    if name == "relayed":
        os.write(relay, b"1")
    os.kill(pid, signal.SIGTERM if name == "relayed" else getattr(signal, "SIG" + name))
time.sleep(0.3)
for _, _, end in children:
    os.write(end, b"1")
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _, _ in children]))
"""
ONE_WISH = [
    [("TERM", 0), ("TERM", 0.001)],
    [("TERM", 0), ("TERM", 0.3)],
    [("TERM", 0), ("USR1", 0.1)],
    [("INT", 0), ("TERM", 0.01), ("HUP", 0.02)],
    [("relayed", 0), ("TERM", 1.2)],
    [("TERM", 0), ("relayed", 1.2)],
]
TWO_WISHES = {143: [("TERM", 0), ("TERM", 0.8)], 138: [("relayed", 0), ("INT", 0.1), ("USR1", 1.2)]}
WITHOUT_A_SHIM = {75: [("TERM", 0), ("TERM", 1.2)], 143: [("TERM", 0), ("INT", 0.1), ("TERM", 1.8)]}


def test_signals_that_are_one_wish_and_a_second_wish() -> None:
    wishes = [*ONE_WISH, *TWO_WISHES.values()]
    cases = [*([["begun"], *case] for case in wishes), [["early"], ("TERM", 0)], [["begun"], ("VTALRM", 0)]]
    cases += [[["without a shim"], *case] for case in WITHOUT_A_SHIM.values()]
    result = run_job([PYTHON, "-c", SCRIPT, json.dumps(cases)], timeout=60).expect(exit_code=0)
    assert json.loads(result.stdout) == [75] * len(ONE_WISH) + [*TWO_WISHES, 75, 1, *WITHOUT_A_SHIM]
    assert result.stderr == "SIGTERM: stopped before training had begun\n"


ORPHANED = """
import os, signal, sys, time
from megatron_lite.training.lifetime import StopRequest
(ready, tell), (said, say) = os.pipe(), os.pipe()
if not (parent := os.fork()):
    if not (rank := os.fork()):
        stop = StopRequest(attached=True)
        stop.begun = True
        os.write(tell, b"1")
        time.sleep(1.5)
        os.write(say, b"saved" if stop.asked else b"trained on")
        os._exit(75)
    os.read(ready, 1)
    time.sleep(0.3)  # for the thread
    if sys.argv[1] == "asked":
        os.kill(rank, signal.SIGTERM)
        time.sleep(0.3)
    os._exit(0)
os.waitpid(parent, 0)
os.close(say)
print(os.read(said, 100).decode())
"""


@pytest.mark.parametrize(("wish", "end"), [("asked", "saved\n"), ("not asked", "\n")])
def test_a_rank_outlives_its_launcher_only_to_save(wish: str, end: str) -> None:
    assert run_job([PYTHON, "-c", ORPHANED, wish], timeout=60).expect(exit_code=0).stdout == end
