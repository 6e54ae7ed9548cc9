"""Command lines, whatever becomes of what they print."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.kit.jobs import PYTHON

CONFIG = [PYTHON, "-m", "megatron_lite", "config", "demo", "--model.vocab_size=9"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_or_that_does_not_fit_is_no_defect(unbuffered):
    def run(*flags, stdout):
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run([*CONFIG, *flags], stdout=stdout, stderr=-1, env=env, text=True, timeout=60)
        return done.returncode, done.stderr

    reader, writer = os.pipe()
    os.close(reader)
    assert run(stdout=writer) == run("--help", stdout=writer) == (141, "")
    os.close(writer)
    with Path("/dev/full").open("w") as full:
        assert run(stdout=full) == (7, "error: standard output: No space left on device\n")
