"""Whatever an override, a variable or a path says: under every launcher each rank's program gets it unchanged, or it is
refused in one line.

The launchers are stand-ins on PATH (``tests/kit/stand_ins.py``), the trainer is one in the current directory. ssh and
hostfiles: ``tests/unit/launch/hosts/test_hostile_hostfile.py``.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from megatron_lite.config import SlurmConfig
from tests.kit import stand_ins
from tests.kit.jobs import PYTHON, REPOSITORY, Result, run_job

TRAINER = """
import json, os, sys
from pathlib import Path
command, config, *flags = sys.argv[1:]
here = Path(__file__).parent.parent
if command == "config":
    print((here / "settings.json").read_text())
else:
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    rank = next(os.environ[name] for name in names if name in os.environ)
    record = {"config": config, "flags": flags, "env": dict(os.environ), "cwd": os.getcwd()}
    (here / f"rank{rank}.json").write_text(json.dumps(record))
    if "PMI_FD" in os.environ:
        os.write(int(os.environ["PMI_FD"]), b".")
"""
WORDS = [
    *("", " ", "two words", 'it\'s "quoted"', "'", '"', "\\", "\\n", "\n", "a\n#SBATCH --wrap=x", "\t", "\r\n"),
    *("$(touch canary)", "`touch canary`", ";touch canary", "&& touch canary", "| x", "$HOME", "${X}", "!!", "*", "~"),
    *("-x", "--", "--nproc=9", ":", "%n", "%h %u", "%%", "a,b=c", "=", ",", "FOO=bar,BAZ=1", "é×…", "\u202e", "\x07"),
]
NOT_UTF8 = "\udcff"  # as Python reads the byte 0xff
TEXT = st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
LISTS = st.lists(TEXT, min_size=20, max_size=40)
PATHS = TEXT.map(lambda text: text.replace("/", "∕").strip(".")).filter(lambda text: 0 < len(text.encode()) < 60)
TRAP = 'it\'s "q" $(touch canary);`touch canary`, -x=%n é'
VIAS = {"Open MPI": "mpirun", "MPICH": "mpirun", "deepspeed": "deepspeed", "slurm": "slurm"}
REFUSED = {"slurm": r"[\\\n\r]", "deepspeed": r"[^A-Za-z0-9_./:@,=+-]"}  # what it cannot take in a current directory
RUNS = {
    "Open MPI": 3,
    "MPICH": 2,
    "slurm": 3,
    "deepspeed": 0,
}  # beside the example; DeepSpeed imports torch three times


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The stand-ins on PATH; the file of each one's calls."""
    found = stand_ins.put(tmp_path / "bin", "mpirun", "mpiexec", "pdsh", "sbatch", "srun")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return found


@dataclass
class Place:
    """A folder in which ``launch run`` finds a trainer, a config and hosts."""

    tmp: Path
    here: Path
    config: str = "config.yaml"
    run_dir: str = "runs"

    def launch(self, name: str, overrides: Mapping[str, str], env: Mapping[str, str]) -> Result:
        """One rank on each of two hosts; ``env`` is the config's."""
        trainer = self.here / "megatron_lite"
        trainer.mkdir(parents=True, exist_ok=True)
        (trainer / "__init__.py").touch()
        (trainer / "__main__.py").write_text(TRAINER)
        launch = {"env": env, "forward": [], "tp_across_hosts": False, "ssh": {"port": None, "options": []}}
        launch["slurm"] = SlurmConfig().model_dump(mode="json")
        settings = {"run": {"dir": self.run_dir, "name": "run"}, "launch": launch, "mesh": {"tp": 1}, "checkpoint": {}}
        (self.here / "settings.json").write_text(json.dumps(settings))
        (self.tmp / "hosts").write_text("".join(f"{node} slots=1\n" for node in stand_ins.NODES))
        mpi = {"Open MPI": "mpirun", "MPICH": "mpiexec"}.get(name)
        flags = [f"--via={VIAS[name]}", *([f"--mpirun={self.tmp / 'bin' / mpi}"] if mpi else [])]
        flags.append("--nodes=2" if name == "slurm" else f"--hostfile={self.tmp / 'hosts'}")
        words = [f"--{key}={value}" for key, value in overrides.items()]
        return run_job([PYTHON, "-m", "launch", "run", self.config, *flags, *words], timeout=100, cwd=self.here)

    def recorded(self) -> list[dict[str, Any]]:
        """What ranks 0 and 1 have written down."""
        return [json.loads((self.here / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    def no_canary(self) -> bool:
        return not list(self.tmp.rglob("canary"))


def numbered(prefix: str, values: list[str]) -> dict[str, str]:
    return {f"{prefix}{number}": value for number, value in enumerate(values)}


@pytest.mark.parametrize("name", VIAS)
def test_overrides_variables_and_paths_arrive(
    calls: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    numbers = iter(range(100))

    @settings(max_examples=RUNS[name] or 1, phases=[Phase.explicit, *([Phase.generate] if RUNS[name] else [])])
    @example([*WORDS, NOT_UTF8], WORDS, [*WORDS, NOT_UTF8], [TRAP, TRAP, TRAP + NOT_UTF8])
    @given(LISTS, LISTS, LISTS, st.lists(PATHS, min_size=3, max_size=3))
    def arrive(typed: list[str], given: list[str], inherited: list[str], paths: list[str]) -> None:
        outer = tmp_path / str(next(numbers))
        here = outer / re.sub(REFUSED.get(name, "(?!)"), "", paths[0])
        run_dir = re.sub(REFUSED["slurm"], "", paths[1]) if name == "slurm" else paths[1]
        place = Place(tmp_path, here, f"./{paths[2]}", run_dir)
        overrides, env = numbered("a.k", typed), numbered("V", given) | {"TOKEN": "secret-4711"}
        outside = numbered("UCX_V", inherited)  # DeepSpeed would put these into its line of shell
        with monkeypatch.context() as patch:
            for key, value in outside.items():
                patch.setenv(key, value)
            place.launch(name, overrides, env).expect(exit_code=0)
        for found in place.recorded():
            assert found["config"] == place.config
            assert found["flags"] == [f"--{key}={value}" for key, value in overrides.items()]
            assert {key: found["env"].get(key) for key in env | outside} == env | outside
            assert found["cwd"] == str(here)
        assert (here / place.run_dir / "run/outcome.json").exists()

    arrive()
    called = [json.loads(line) for path in calls.values() if path.exists() for line in path.read_text().splitlines()]
    assert called
    assert not any("secret-4711" in json.dumps(call["argv"]) for call in called)  # which everybody here can read
    assert Place(tmp_path, tmp_path).no_canary()


@pytest.mark.parametrize(
    ("name", "here", "run_dir"),
    [
        *(("deepspeed", text, "runs") for text in ("two words", "$(touch canary)", "a'b", "é", "a\nb")),
        *(("slurm", text, "runs") for text in ("a\\b", "a\nb", "a\rb")),
        *(("slurm", "here", text) for text in ("a\\b", "a\nb")),
    ],
)
def test_a_path_that_a_launcher_would_misread_is_refused(
    calls: dict[str, Path], tmp_path: Path, name: str, here: str, run_dir: str
) -> None:
    place = Place(tmp_path, tmp_path / here, run_dir=run_dir)
    result = place.launch(name, {}, {}).expect(exit_code=2, stdout="^$")
    *_, line = result.stderr.splitlines()  # perhaps after the one that says what is run
    assert re.match(r"error: (--via=deepspeed: its launcher passes|'.*': Slurm does not take) ", line)
    assert not any(path.exists() for path in calls.values())
    assert place.no_canary()
