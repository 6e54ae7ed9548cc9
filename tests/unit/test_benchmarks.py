"""Every benchmark says what it is."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS.glob("*.py") if path.stem not in ("help", "memory")])
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which one of them sets
    with pytest.raises(SystemExit) as end:
        runpy.run_path(f"{SCRIPTS}/{script}.py", run_name="__main__")
    first, *_ = (SCRIPTS / f"{script}.py").read_text().removeprefix('"""').splitlines()
    assert not end.value.code and first in capsys.readouterr().out
