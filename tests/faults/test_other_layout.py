"""A run goes on under another number of ranks, another layout and another engine, with the samples that
were to come (tests/multi/test_resharding.py has every pair, bit for bit)."""

from pathlib import Path

import pytest

from tests.kit.tiny import TinyRuns, losses


def test_every_leg_of_a_run_under_another_layout(tiny: TinyRuns, tmp_path: Path) -> None:
    legs = (
        ("--train.steps=3", "--parallel.tp=1", "--parallel.zero=3"),
        ("--train.steps=6", "--parallel.tp=2", "--parallel.sp=true"),
        ("--train.steps=9", "--parallel.tp=1", "--parallel.engine=deepspeed", "--parallel.zero=2"),
        ("--train.steps=12", "--parallel.tp=1", "--parallel.zero=2", "--train.micro_batch_size=2"),
    )
    for i, leg in enumerate(legs):
        stdout = rf"resumed \S+step_{3 * i:08d}" if i else ""
        # The length of the run is part of the schedule, which has to be the reference's.
        tiny.run(tmp_path, *leg, "--optim.schedule=constant").expect(exit_code=0, stdout=stdout)
    whole = tmp_path / "whole"
    whole.mkdir()
    tiny.run(whole, "--optim.schedule=constant").expect(exit_code=0)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole / "run"), rel=1e-5)
