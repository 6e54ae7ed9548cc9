"""Starts ranks through Slurm: a batch script that asks for nodes, and the srun that starts ranks on them.

Outside of an allocation, ``launch run --via=slurm`` submits the script. The script runs the same command again inside
the allocation, where it is a launch like any other: it is supervised and restarted, and names the first cause.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.hosts.hostfile import Host, UsageError, check_name, count
from launch.hosts.job import Command, Job, Launch, Slurm
from launch.launchers import torchrun

_MAX_NODES = 65536
_MAX_TASKS = 10000
_SPECIAL_STEPS = 0xFFFFFFF0  # SLURM_STEP_IDs from here on are batch scripts and interactive shells
_PLAIN = re.compile(r"[\w.,:/=@%+*&|()\[\]-]*", re.ASCII)
_TASK = "SLURM_ARRAY_TASK_ID"
RESUME = "--checkpoint.resume=auto"
# Options of sbatch and srun that the launcher sets itself; a second value would contradict what it relies on.
_BOTH = {
    "N nodes": "use --nodes=N of launch run",
    "n ntasks ntasks-per-node": "use --nproc=N of launch run",
    "o output e error open-mode": "logs are in the run folder",
    "D chdir": "the job runs where it was submitted",
    "test-only h help usage V version": "--dry_run shows what would be started",
}
_OWN = {
    "extra": _BOTH
    | {
        "a array": "use launch.slurm.array",
        "t time": "use launch.slurm.time",
        "signal": "use launch.slurm.signal_seconds",
        "requeue no-requeue": "use launch.slurm.requeue",
        "W wait": "launch logs JOB --follow waits for its end",
    },
    "srun_extra": _BOTH
    | {
        "w nodelist x exclude F nodefile r relative m distribution jobid": "ranks fill the nodes of the job in order",
        "i input export multi-prog pty": "ranks get what the launcher has",
    },
}
_BARE = "EHIOQXZhklsuvV"  # short options without a value, which others may follow in one word: -vn4
# SLURM_JOB_ID of an array's last task stands for the whole array, so tasks are named as ARRAY_TASK.
_JOB_ID = f'"${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{{_TASK}:+_${_TASK}}}"'
# A failing line of setup ends the job, but not a failing line inside a file that it sources.
_FAILED = (
    """trap 'code=$?; [ ${#BASH_SOURCE[@]} -gt 1 ] || """
    """{ echo "error: launch.slurm.setup: exit code $code: $(sed -n ${LINENO}p "$0")" >&2; exit 2; }' ERR"""
)


def allocated(env: Mapping[str, str]) -> bool:
    """Whether this process is inside an allocation. Raises UsageError if srun started it as a task."""
    if "SLURM_JOB_ID" not in env:
        return False
    if "SLURM_STEP_ID" in env and _number(env, "SLURM_STEP_ID") < _SPECIAL_STEPS:
        raise UsageError(
            "--via=slurm starts srun itself, but srun has started this: leave out srun, or use --via=torchrun"
        )
    return True


def _number(env: Mapping[str, str], name: str) -> int:
    """A number in a Slurm variable; 0 if it is not set. Raises UsageError."""
    value = env.get(name) or "0"
    if not (value.isascii() and value.isdecimal()):
        raise UsageError(f"{name}={value}: expected a number, as Slurm sets it")
    return int(value)


def choose_hosts(where: Mapping[str, Any], env: Mapping[str, str]) -> tuple[Host, ...]:
    """The nodes of the allocation, in Slurm's order; outside of one, placeholders. Raises UsageError."""
    if given := [
        f"--{name}" for name in ("hostfile", "include", "exclude", "node_rank") if where[name] not in (None, "")
    ]:
        raise UsageError(
            f"{', '.join(given)}: Slurm chooses the nodes; see launch.slurm.constraint and launch.slurm.extra"
        )
    if env.get("SLURM_HET_SIZE", "1") != "1":
        raise UsageError(
            "this is a heterogeneous job, of which only one component would be used: ask for nodes of a kind"
        )
    least, most = where["nodes"] or (None, None)
    if least != most:
        raise UsageError(f"--nodes={least}:{most}: Slurm gives all nodes of a job at once; ask for one number of them")
    if not allocated(env):
        return tuple(Host(f"node-{node}", where["nproc"] or 1) for node in range(most or 1))
    if "SLURM_JOB_NODELIST" not in env:
        raise UsageError("SLURM_JOB_ID is set without SLURM_JOB_NODELIST: this is no allocation of Slurm's; unset it")
    names = expand(env["SLURM_JOB_NODELIST"])
    if most is not None and most > len(names):
        raise UsageError(f"--nodes={most}: this allocation has {len(names)}: {env['SLURM_JOB_NODELIST']}")
    if where["nproc"]:
        return tuple(Host(name, where["nproc"]) for name in names[:most])
    slots = zip(names, tasks(env, len(names)), strict=True)
    return tuple(Host(name, count) for name, count in slots if count)[:most]


def tasks(env: Mapping[str, str], nodes: int) -> list[int]:
    """How many tasks srun would start on each node of an allocation: the number requested, or one. Raises
    UsageError."""
    if "SLURM_NTASKS" not in env:  # then SLURM_TASKS_PER_NODE only says how many would fit
        return [_number(env, "SLURM_NTASKS_PER_NODE") or 1] * nodes
    left, places = _number(env, "SLURM_NTASKS"), env.get("SLURM_TASKS_PER_NODE", "")
    counts = []
    for slots, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", places):  # 4(x2),3
        for _ in range(int(times or 1)):
            counts.append(min(int(slots), left))
            left -= counts[-1]
    if left or len(counts) != nodes:
        raise UsageError(
            f"SLURM_NTASKS={env['SLURM_NTASKS']} tasks on {nodes} nodes are not SLURM_TASKS_PER_NODE={places}; "
            "give --nproc=N"
        )
    return counts


def expand(hostlist: str) -> list[str]:
    """Expand Slurm's hostlist notation: ``a[1-2,07],b`` is a1, a2, a07, b. Raises UsageError."""
    words = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", hostlist)
    if not words or ",".join(words) != hostlist:
        raise UsageError(f"{hostlist!r} is not a list of hosts")
    names = list(itertools.islice(itertools.chain.from_iterable(map(_expand, words)), _MAX_NODES + 1))
    if wrong := [name for name in names if not check_name(name)]:
        raise UsageError(f"{hostlist!r}: {wrong[0]!r} is not a host name")
    if len(names) > _MAX_NODES:
        raise UsageError(f"{hostlist!r} names more than {_MAX_NODES} hosts")
    return names


def _expand(word: str) -> Iterator[str]:
    """The names of one word; with several brackets, the last one varies fastest."""
    head, bracket, rest = word.partition("[")
    if not bracket:
        yield head
        return
    inside, _, tail = rest.partition("]")
    for part in inside.split(","):
        if not (span := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)):
            raise UsageError(f"{word!r}: expected numbers or ranges of them in brackets, found {part!r}")
        for number in range(int(span[1]), int(span[2] or span[1]) + 1):
            yield from (f"{head}{number:0{len(span[1])}}{end}" for end in _expand(tail))


def describe(options: Mapping[str, Any], env: Mapping[str, str]) -> Slurm:
    """The part of ``launch.slurm`` and of the allocation that a job needs."""
    job = env.get("SLURM_JOB_ID", "0")
    port = 20000 + int(job) % 12000 if job.isdecimal() else 20000  # jobs on one node rarely get the same port
    names = ("srun", "container", "container_mounts")
    _refuse_own("srun_extra", options["srun_extra"])
    cpus = options["cpus_per_task"] or _number(env, "SLURM_CPUS_PER_TASK") or None
    return Slurm(
        port=port, cpus_per_task=cpus, srun_extra=tuple(options["srun_extra"]), **{n: options[n] for n in names}
    )


def command(job: Job) -> Launch:
    """One ``srun`` that starts every rank, or a torchrun on every node.

    Tasks fill the nodes in the order of Slurm's list, which is that of ``job.hosts``. srun does not end tasks when one
    of them fails: the supervisor does, once it knows which failed first. Raises UsageError.
    """
    slurm = job.slurm or Slurm()
    slots, files = job.hosts[0].slots, {}
    even = all(host.slots == slots for host in job.hosts)
    if any(host.devices is not None for host in job.hosts):
        raise UsageError("--via=slurm: Slurm chooses the devices; see launch.slurm.srun_extra")
    if not even and slurm.srun == "torchrun":
        raise UsageError("launch.slurm.srun=torchrun starts as many ranks on every node as on the first; use tasks")
    python = sys.executable
    if slurm.container is not None:
        python = "python3"  # that of the image
        job = replace(job, program=(python, *job.program[1:]))
    env = job.rank_env
    if job.rendezvous is not None:
        env |= {"MASTER_ADDR": job.rendezvous[0], "MASTER_PORT": str(job.rendezvous[1])}
    if slurm.srun == "tasks":
        per_node, cpus = slots, slurm.cpus_per_task
        program = job.rank_argv("--rank=SLURM_PROCID", "--stderr-fd=1", "--lease")
    else:
        per_node, cpus = 1, slurm.cpus_per_task and slots * slurm.cpus_per_task
        meeting = [f"--nnodes={len(job.hosts)}"]
        if job.rendezvous is not None:
            meeting += [f"--master-addr={job.rendezvous[0]}", f"--master-port={job.rendezvous[1]}"]
        agent = torchrun.agent(job, slots, meeting, "--stderr-fd=1", "--lease")
        program = ["-m", "launch.launchers.slurm_agent", *agent]
    if even:
        ntasks = len(job.hosts) * per_node
        places = ["--relative=0", f"--ntasks-per-node={per_node}", "--distribution=block"]
    else:
        ntasks, places, listed = job.size, ["--distribution=arbitrary"], job.log_dir / "slurm.hosts"
        files[listed] = "".join(f"{host.name}\n" * host.slots for host in job.hosts)
        env |= {"SLURM_HOSTFILE": str(listed.absolute())}
    argv = [
        "srun",
        f"--nodes={len(job.hosts)}",
        f"--ntasks={ntasks}",
        *places,
        *([f"--cpus-per-task={cpus}"] if cpus else []),  # since Slurm 22.05, srun does not inherit it from the job
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--mpi=none",
        "--input=none",
        "--export=ALL",
        *_container(job, slurm),
        *slurm.srun_extra,
        python,
        *program,
    ]
    return Launch("srun", [Command(argv, env, stop=signal.SIGTERM)], files)


def _container(job: Job, slurm: Slurm) -> list[str]:
    """Options of pyxis: the image, with this directory and the run folder mounted at the same paths."""
    if slurm.container is None:
        return []
    folders = {str(Path.cwd()), str(job.run_dir.absolute())}
    if odd := [folder for folder in folders if set(folder) & set(",:")]:
        raise UsageError(f"{odd[0]}: launch.slurm.container cannot mount a path with a comma or a colon in it")
    mounts = [*(f"{folder}:{folder}" for folder in sorted(folders)), *filter(None, [slurm.container_mounts])]
    return [
        f"--container-image={slurm.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={Path.cwd()}",
    ]


def script(job: Job, words: Sequence[str], overrides: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """The batch script: ``python -m launch run`` with ``words`` and ``overrides`` on the nodes that ``options``
    (``launch.slurm``) describe. Raises UsageError."""
    name, array, kept = job.run_dir.name, options["array"], dict(overrides)
    if array is not None and options["chain"] > 1:
        raise UsageError("launch.slurm.array and launch.slurm.chain are two ways to get several jobs: give one of them")
    first_start, own = '"${SLURM_RESTART_COUNT:-0}" = 0', []
    if runs_of_their_own(array):
        own.append(f'set -- "$@" --run.name={shlex.quote(name)}-"${_TASK}"')
        if "run.seed" not in kept:
            own.append(f'set -- "$@" --run.seed="${_TASK}"')
        kept.pop("run.name", None)
    elif array is not None:  # tasks run one after the other; each resumes where the last one stopped
        first_start += f' -a "${_TASK}" = "$SLURM_ARRAY_TASK_MIN"'
    _check_shell(options["setup"])
    folder = shlex.quote(str(job.run_dir)) + (f'-"${_TASK}"' if own else "")
    resume = [f"[ {first_start} ] || set -- {RESUME}"]
    if wanted := kept.pop("checkpoint.resume", None):
        saved = f"{folder}/checkpoints/latest -nt {shlex.quote(str(job.log_dir))}/slurm.sh"
        resume = [
            "# Later starts go on from what those before them have saved.",
            f"resume={shlex.quote(wanted)}",
            f"[ {first_start} -a $# = 0 ] || ! [ {saved} ] || resume=auto",
            'set -- --checkpoint.resume="$resume"',
        ]
    argv = [sys.executable, "-m", "launch", "run", *words, *(f"--{key}={value}" for key, value in kept.items())]
    first, rest = shlex.join(argv[:5]), [shlex.quote(word) for word in argv[5:]]
    wait = options["signal_seconds"]
    lines = [
        "#!/bin/bash",
        f"# {name}: {count(job.size, 'rank')} on {count(len(job.hosts), 'node')}. "
        "Written by `python -m launch run`; edit it and submit it again as you like.",
        *(f"#SBATCH {line}" for line in _directives(job, options)),
        "",
        *([_FAILED, *options["setup"], "", "trap - ERR; set +e", ""] if options["setup"] else []),
        *resume,
        *own,
        "# On the first node: it starts the ranks with srun, watches them, and has them save when it is told to stop.",
        " \\\n    ".join([first, *rest, '"$@" &']),
        "launcher=$! told= expiring= again=",
        "# Once, since a second signal would cut the save short: scancel repeats its own to a task of an array.",
        'stop() { [ "$told" ] || kill -"$1" $launcher; told=yes; }',
        f"trap 'expiring=yes; stop USR1' USR1{f'  # {wait} s before the time limit' if wait else ''}",
        "trap 'stop TERM' TERM",
        "while kill -0 $launcher 2>/dev/null; do wait $launcher; done  # a signal ends a wait early",
        "wait $launcher",
        "code=$?",
    ]
    if options["requeue"]:
        lines += [
            f"job={_JOB_ID}",
            f"further() {{ [ {folder}/checkpoints/latest -nt {folder}/logs/launcher.lock ]; }}",
            'case "$code$expiring $(scontrol show job -o "$job")" in',
            "    # Cancelled, by `launch cancel` or by scancel: not again.",
            "    *Requeue=0* | *JobState=C*Reason=None*) ;;",
            "    # Cut off by a preemption: again.",
            "    [15]*PreemptTime=2*) again=yes ;;",
            "    # Its time is over, or a rank or a node was lost: again, if a checkpoint is younger than this start.",
            "    5* | 75yes* | [17]*Reason=TimeLimit*) further && again=yes ;;",
            "    # Saved, as somebody else has asked: again.",
            "    75*) again=yes ;;",
            "esac",
            '[ -z "$again" ] || scontrol requeue "$job"',
        ]
    return "\n".join([*lines, "exit $code", ""])


def _check_shell(setup: Sequence[str]) -> None:
    """Raises UsageError if setup leaves a quote or block open, which would swallow the rest of the script."""
    if setup and (bash := shutil.which("bash")):
        argv, lines = [bash, "-O", "extglob", "-n", "/dev/stdin"], os.fsencode("\n".join(setup))
        read = subprocess.run(argv, input=lines, env={"LC_ALL": "C"}, capture_output=True, check=False)
        if said := os.fsdecode(read.stderr).splitlines():  # bash only warns about an unterminated here-document
            raise UsageError(f"launch.slurm.setup: {said[0].removeprefix('/dev/stdin: ')}")


def runs_of_their_own(array: str | None) -> bool:
    """Whether each task of such an array is a run of its own, not a part of one run."""
    return array is not None and not array.endswith("%1")


def task_numbers(array: str) -> list[int]:
    """The task numbers of ``1-3,8`` or ``0-6:2%4``. Raises UsageError if there are too many."""
    spans = []
    for part in array.partition("%")[0].split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        spans.append(range(int(first), int(last or first) + 1, int(step or 1)))
    if sum(map(len, spans)) > _MAX_TASKS:
        raise UsageError(f"launch.slurm.array={array} is more than {_MAX_TASKS} runs")
    return sorted(set(itertools.chain.from_iterable(spans)))


def _directives(job: Job, options: Mapping[str, Any]) -> list[str]:
    """The options after ``#SBATCH``. Raises UsageError."""
    for path in (job.log_dir.absolute(), Path.cwd()):
        if set("\\\n\r") & set(str(path)):
            raise UsageError(f"{str(path)!r}: Slurm does not take a backslash or a line break in a path")
    output = str(job.run_dir.absolute()).replace("%", "%%") + ("-%a" if runs_of_their_own(options["array"]) else "")
    slots = job.hosts[0].slots
    asked = {
        "job-name": job.run_dir.name,
        "chdir": str(Path.cwd()),
        "output": f"{output}/logs/slurm-{'%j' if options['array'] is None else '%A_%a'}.out",
        "open-mode": "append",
        "nodes": len(job.hosts),
        "ntasks-per-node": slots,
    }
    names = ("cpus_per_task", "mem", "gres", "constraint", "partition", "account", "qos", "time", "array")
    asked |= {name.replace("_", "-"): options[name] for name in names if options[name] is not None}
    if options["signal_seconds"]:
        asked["signal"] = f"B:USR1@{options['signal_seconds']}"
    flags = ["--exclusive"] if options["exclusive"] else []
    flags.append("--requeue" if options["requeue"] else "--no-requeue")
    _refuse_own("extra", options["extra"])
    return [*(f"--{name}={_quote(str(value))}" for name, value in asked.items()), *flags, *options["extra"]]


def _refuse_own(key: str, options: Sequence[str]) -> None:
    """Raises UsageError if ``launch.slurm.KEY`` holds an option that the launcher sets itself. A line of ``extra`` may
    hold several options."""
    try:
        words = [word for line in options for word in (shlex.split(line) if key == "extra" else [line])]
    except ValueError as error:
        raise UsageError(f"launch.slurm.{key}: {error}") from None
    for word in words:
        for own, instead in _OWN[key].items():
            if any(_means(word, name) for name in own.split()):
                raise UsageError(f"launch.slurm.{key}: {word.partition('=')[0]} is set by the launcher; {instead}")


def _means(word: str, option: str) -> bool:
    """Whether getopt would read ``word`` as ``option``: its letter, perhaps after others, or a prefix of its name."""
    if len(option) == 1:
        return re.match(f"-[{_BARE}]*{option}", word) is not None
    return word.startswith("--") and word != "--" and f"--{option}".startswith(word.partition("=")[0])


def _quote(value: str) -> str:
    """``value`` quoted for ``#SBATCH`` lines: unlike in a shell, a backslash escapes inside all quotes."""
    return value if _PLAIN.fullmatch(value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
