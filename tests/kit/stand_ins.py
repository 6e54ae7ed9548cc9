"""Launchers for tests to put on PATH: each writes down what it is called with, and then does here what the real one
does on all hosts.

calls = put(tmp_path / "bin", "mpirun")        # an executable, and where it writes
json.loads(calls["mpirun"].read_text().splitlines()[0])   # {"argv": …, "env": …, "script": …}

An option that a stand-in does not know is an error, and ranks get no variable that the real one would not hand on.
Standard library only: they start often.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

NODES = (socket.gethostname(), "node1")  # for hostfiles: this host, and one that is pretended
JOB = "7"  # the number of every Slurm job
_SWITCHES = ("--allow-run-as-root", "-S", "-N")
_VALUES = {  # options, and how many words follow
    "mpirun": {"--host": 1, "-n": 1, "-x": 1, "--bind-to": 1, "--mca": 2, "--prtemca": 2},
    "mpiexec": {"-launcher": 1, "-bind-to": 1, "-hosts": 1, "-n": 1, "-env": 2},
    "pdsh": {"-f": 1, "-w": 1},
}
_SRUN = (
    *("nodes", "relative", "ntasks", "ntasks-per-node", "cpus-per-task", "distribution", "kill-on-bad-exit"),
    *("wait", "mpi", "input", "export"),
)
_MAGIC = b"#SBATCH "  # which sbatch looks for down to the first command
_ELSEWHERE = ("PATH", "HOME", "MLITE_TEST_JOB")  # what a shell on another host has by itself, and the tests' own mark


def put(folder: Path, *names: str) -> dict[str, Path]:
    """Make executables of these names in ``folder``; returns the file to which each adds a line of JSON at every call.

    There are mpirun (Open MPI's), mpiexec (MPICH's), pdsh, sbatch and srun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        code += f"from tests.kit import stand_ins; sys.exit(stand_ins.{name}(sys.argv[1:]))\n"
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    return {name: folder / f"{name}.calls" for name in names}


def mpirun(argv: list[str]) -> int:
    """Open MPI's: ranks get what ``-x`` names, and their place."""
    if argv == ["--version"]:
        print("mpirun (Open MPI) 5.0.11\n\nReport bugs to …")
        return 0
    _write_down("mpirun", argv)
    contexts = [_read("mpirun", context) for context in _split(argv)]
    ranks = []
    for options, program in contexts:
        host, _, slots = options["--host"][0][0].rpartition(":")
        assert host in NODES
        assert [[slots]] == options["-n"]
        given = dict((word if "=" in word else f"{word}={os.environ[word]}").split("=", 1) for [word] in options["-x"])
        ranks += [({**_elsewhere(), **given}, program, local, int(slots)) for local in range(int(slots))]
    return _start(
        [
            (
                program,
                {
                    **env,
                    "OMPI_COMM_WORLD_RANK": str(rank),
                    "OMPI_COMM_WORLD_SIZE": str(len(ranks)),
                    "OMPI_COMM_WORLD_LOCAL_RANK": str(local),
                    "OMPI_COMM_WORLD_LOCAL_SIZE": str(size),
                },
            )
            for rank, (env, program, local, size) in enumerate(ranks)
        ]
    )


def mpiexec(argv: list[str]) -> int:
    """MPICH's: ranks get all variables and, as PMI_FD, a descriptor into which each has to write, as MPI_Init does."""
    if argv == ["--version"]:
        print("HYDRA build details:\n    Version:                                 4.3.0")
        return 0
    _write_down("mpiexec", argv)
    contexts = [_read("mpiexec", context) for context in _split(argv)]
    slots = [int(place.rpartition(":")[2]) for place in contexts[0][0]["-hosts"][0][0].split(",")]
    assert [[[str(number)]] for number in slots] == [options["-n"] for options, _ in contexts]
    ranks = [(node, local) for node, number in enumerate(slots) for local in range(number)]
    ours, theirs = os.pipe()
    code = _start(
        [
            (
                contexts[node][1],
                {
                    **os.environ,
                    **dict(contexts[node][0]["-env"]),
                    "PMI_RANK": str(rank),
                    "PMI_SIZE": str(len(ranks)),
                    "MPI_LOCALRANKID": str(local),
                    "MPI_LOCALNRANKS": str(slots[node]),
                    "PMI_FD": str(theirs),
                },
            )
            for rank, (node, local) in enumerate(ranks)
        ],
        pass_fds=[theirs],
    )
    heard = os.read(ours, 4096) if select.select([ours], [], [], 0)[0] else b""
    assert code or len(heard) == len(ranks), f"{len(heard)} ranks have found PMI_FD open"
    return code


def pdsh(argv: list[str]) -> int:
    """A shell on each host, which finds no variable of ours, reads the words; %n is the host's number."""
    _write_down("pdsh", argv)
    options, command = _read("pdsh", argv)
    assert command[0] != "pkill -f ", "DeepSpeed ends its ranks like this when it is interrupted: not here"
    hosts = options["-w"][0][0].split(",")
    assert set(hosts) <= set(NODES)
    return _start([
        (["sh", "-c", " ".join(command).replace("%n", str(number)).replace("%h", host)], _elsewhere())
        for number, host in enumerate(hosts)
    ], cwd=str(Path(sys.argv[0]).parent))  # fmt: skip


def srun(argv: list[str]) -> int:
    """All variables, and each task's place."""
    _write_down("srun", argv)
    count = next((number for number, word in enumerate(argv) if not word.startswith("--")), len(argv))
    options = dict(word[2:].split("=", 1) for word in argv[:count])
    assert set(options) <= set(_SRUN), f"unknown: {set(options) - set(_SRUN)}"
    assert options["export"] == "ALL"
    tasks, local = int(options["ntasks"]), int(options["ntasks-per-node"])
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"{local}(x{tasks // local})",
    }
    return _start(
        [
            (
                argv[count:],
                {
                    **os.environ,
                    **step,
                    "SLURM_PROCID": str(task),
                    "SLURM_LOCALID": str(task % local),
                    "SLURM_NODEID": str(task // local),
                },
            )
            for task in range(tasks)
        ]
    )


def sbatch(argv: list[str]) -> int:
    """Runs the script at once, as its directives say; srun has to be on PATH, too."""
    words = [word for word in argv if not word.startswith("--")]
    script = Path(words[0]).read_bytes()
    _write_down("sbatch", argv, os.fsdecode(script))
    head = itertools.takewhile(lambda line: line.strip()[:1] in (b"", b"#"), script.splitlines())
    lines = [os.fsdecode(line.removeprefix(_MAGIC)) for line in head if line.startswith(_MAGIC)]
    asked = dict(map(_directive, lines))
    output = asked["output"].replace("%%", "\0").replace("%j", JOB).replace("\0", "%")
    env = {
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NODELIST": ",".join(NODES[: int(asked["nodes"])]),
        "SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"],
    }
    with Path(output).open("wb") as log:
        subprocess.run(
            ["bash", str(Path(words[0]).absolute()), *words[1:]],
            cwd=asked["chdir"],
            env={**os.environ, **env},
            stdout=log,
            stderr=log,
            timeout=120,
        )
    print(JOB)
    return 0


def _directive(text: str) -> tuple[str, str]:
    """``--name=value`` as sbatch reads it: quotes of both kinds, a backslash before any character, # for comments."""
    word, quote = "", ""
    characters = iter(text)
    for character in characters:
        if character == "\\":
            word += next(characters)
        elif character in ("'", '"') and quote in ("", character):
            quote = "" if quote else character
        elif not quote and character in " \t#":
            break
        else:
            word += character
    assert not quote, f"open quote: {text}"
    assert word.startswith("--"), text
    name, _, value = word[2:].partition("=")
    return name, value


def _write_down(name: str, argv: Sequence[str], script: str = "") -> None:
    with Path(sys.argv[0]).with_name(f"{name}.calls").open("a") as file:
        print(json.dumps({"argv": argv, "env": dict(os.environ), "script": script}), file=file)


def _split(argv: Sequence[str]) -> list[list[str]]:
    """The contexts of an mpirun's command line."""
    contexts: list[list[str]] = [[]]
    for word in argv:
        if word == ":":
            contexts.append([])
        else:
            contexts[-1].append(word)
    return contexts


def _read(name: str, words: Sequence[str]) -> tuple[dict[str, list[list[str]]], list[str]]:
    """The options in front of a program, each with what follows it at each time, and the program."""
    known, number = _VALUES[name], 0
    found: dict[str, list[list[str]]] = {option: [] for option in known}
    while number < len(words) and words[number].startswith("-"):
        option = words[number]
        assert option in known or option in _SWITCHES, f"{name}: unknown option {option}"
        count = known.get(option, 0)
        if count:
            found[option].append(list(words[number + 1 : number + 1 + count]))
        number += 1 + count
    return found, list(words[number:])


def _elsewhere() -> dict[str, str]:
    return {name: os.environ[name] for name in _ELSEWHERE if name in os.environ}


def _start(
    commands: Sequence[tuple[list[str], Mapping[str, str]]], cwd: str | None = None, pass_fds: Sequence[int] = ()
) -> int:
    """Run them side by side; the highest exit code, at least 1 where one was killed."""
    started = [subprocess.Popen(argv, env=env, cwd=cwd, pass_fds=pass_fds) for argv, env in commands]
    return max((abs(process.wait()) for process in started), default=0)
