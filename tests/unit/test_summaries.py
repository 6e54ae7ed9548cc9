"""Every command is told in one whole line."""

import re

import pytest

from tests.kit.jobs import PYTHON, run_job


@pytest.mark.parametrize("words", ["launch", "megatron_lite", "megatron_lite ckpt", "data_tools"])
def test_summaries_are_whole(words: str) -> None:
    shown = run_job([PYTHON, "-m", *words.split(), "--help"], timeout=60).expect(exit_code=0).stdout
    lines = re.findall(r"^  \w+ +(.*)$", shown, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        assert re.match(r"[A-Z].*\.$", line) or re.fullmatch(r"\w+(, \w+)+", line), line  # or the names of a group
        assert line.count("(") == line.count(")"), line
