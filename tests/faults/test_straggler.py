"""One rank is slower than the others."""

from pathlib import Path

from tests.kit.tiny import TinyRuns, assert_same_run, every_engine


@every_engine
def test_it_is_named_once_and_nothing_else_happens(tiny: TinyRuns, tmp_path: Path) -> None:
    result = tiny.run(tmp_path, faults="sleep:rank=1:seconds=0.2").expect(exit_code=0)
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1, result.stdout
    assert "rank 1 (" in warnings[0]
    assert "times the median rank: it works" in warnings[0]
    assert_same_run(tmp_path / "run", tiny.reference)
