"""Ctrl-C on a terminal, once and twice."""

from pathlib import Path

from tests.kit.terminal import CTRL_C
from tests.kit.tiny import TinyRuns, assert_same_run, checkpoint_steps


def test_once_saves_twice_ends_it_now(tiny: TinyRuns, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    saved = tiny.on_terminal(tmp_path, [("2/12", CTRL_C)], slow=0.2).expect(exit_code=75)
    assert saved.stdout.count("the ranks finish their step, save and exit") == 1
    assert "Traceback" not in saved.stdout
    assert saved.stdout.endswith("\x1b[?25h"), "the cursor is shown again"
    steps = checkpoint_steps(run_dir)
    assert 2 < steps[-1] < 12

    ended = tiny.on_terminal(tmp_path, [(f"{steps[-1] + 1}/12", CTRL_C), ("finish their step", CTRL_C)], slow=1)
    ended.expect(exit_code=130, stdout="SIGINT again: ended at once, without saving")
    assert "Traceback" not in ended.stdout
    assert checkpoint_steps(run_dir) == steps

    tiny.run(tmp_path).expect(exit_code=0)
    assert_same_run(run_dir, tiny.reference)
