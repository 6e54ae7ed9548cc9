"""A ``Job``: what to run and where, independent of the launcher that starts it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from launch.hosts.hostfile import Host
from launch.hosts.network import HOSTS

# Variables that are forwarded to ranks on other hosts: names, or prefixes with a star.
FORWARDED = (
    *("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHON*", "TMPDIR", "LANG", "LC_*"),
    *("CUDA_*", "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "OMP_*", "MKL_*", "TORCH*", "PYTORCH_*", "TRITON_*", "DS_*"),
    *("HF_*", "HUGGINGFACE_*", "TOKENIZERS_*", "MLITE_*"),
)


@dataclass(frozen=True)
class Ssh:
    """ssh settings beyond the user's ssh config."""

    port: int | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slurm:
    """How ranks are started in an allocation. ``srun``: one task for each rank (``tasks``) or one torchrun for each
    node (``torchrun``), optionally in a container. ``port``: the rendezvous port if no free one can be looked for."""

    srun: str = "tasks"
    cpus_per_task: int | None = None
    container: str | None = None
    container_mounts: str | None = None
    srun_extra: tuple[str, ...] = ()
    port: int = 20000


@dataclass(frozen=True)
class Place:
    """Where a rank runs. ``node``: index of its host; ``local_rank``: index among the ranks of that host."""

    rank: int
    host: Host
    node: int
    local_rank: int


@dataclass(frozen=True)
class Job:
    """Copies of ``program`` (an argv), one for each slot of ``hosts``: one distributed run, its files in ``run_dir``.

    Under every launcher, ranks count through the slots of the first host, then of the second, and so on.

    ``node``: start the ranks of this host only, because each host starts its own. ``rendezvous``: address and port at
    which ranks meet, if decided beforehand; the name may take ``rendezvous_wait`` seconds to resolve. ``attempt``: the
    number of automatic restarts so far. ``resume``: arguments appended to the program after a restart. ``begin``:
    arguments used instead of them until something has been saved (the ``checkpoint.resume`` of the config). ``name``
    and ``nonce`` together identify the job; hosts that start their own ranks share no nonce, so there the name must do.
    ``runner``: how DeepSpeed's launcher reaches hosts. ``mpirun``: the executable, if not the one that
    ``launch/launchers/mpirun.py`` finds.
    """

    program: tuple[str, ...]
    hosts: tuple[Host, ...]
    run_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)
    resume: tuple[str, ...] = ()
    begin: tuple[str, ...] = ()
    attempt: int = 0
    name: str = ""
    nonce: str = ""
    node: int | None = None
    rendezvous: tuple[str, int] | None = None
    rendezvous_wait: int = 0
    ssh: Ssh = Ssh()
    slurm: Slurm | None = None
    runner: str = "pdsh"
    mpirun: Path | None = None

    @property
    def size(self) -> int:
        """The number of ranks of the whole run."""
        return sum(host.slots for host in self.hosts)

    @property
    def places(self) -> list[Place]:
        """The place of every rank of the run, in rank order."""
        slots = [(node, host, slot) for node, host in enumerate(self.hosts) for slot in range(host.slots)]
        return [Place(rank, host, node, slot) for rank, (node, host, slot) in enumerate(slots)]

    @property
    def watched(self) -> list[Place]:
        """The ranks that this launcher starts and watches."""
        return [place for place in self.places if self.node in (None, place.node)]

    @property
    def distributed(self) -> bool:
        """Whether some of its ranks cannot be signalled from here: on other machines, or started by Slurm's daemons."""
        if self.slurm is not None:
            return True
        return any(not place.host.local for place in self.watched) if self.node is None else False

    @property
    def log_dir(self) -> Path:
        return self.run_dir / "logs"

    @property
    def own(self) -> str:
        """Suffix of this launcher's own files, where each host has a launcher."""
        return "" if self.node is None else f"_{self.node}"

    @property
    def lock(self) -> Path:
        """The lock file, held while the launcher runs and written when it starts."""
        return self.log_dir / f"launcher{self.own}.lock"

    @property
    def control(self) -> Path:
        """The file that tells ranks on other machines what their launcher wants of them (``launch/watch/rank.py``)."""
        return self.log_dir / "control"

    def next_attempt(self) -> Job:
        """The job of the next attempt, which resumes from what this one has saved."""
        latest, started = self.run_dir / "checkpoints" / "latest", self.lock
        saved = latest.is_file() and latest.stat().st_mtime_ns > started.stat().st_mtime_ns
        return replace(self, attempt=self.attempt + 1, begin=() if saved or self.begin == self.resume else self.begin)

    @property
    def rank_env(self) -> dict[str, str]:
        """Variables that are added to the environment of every rank."""
        name = self.name if self.node is not None else f"{self.name}{self.nonce}.{self.attempt}"
        env = {**self.env, "MLITE_ATTEMPT": str(self.attempt), "MLITE_JOB": name, "MLITE_RANKS": str(self.size)}
        if len(self.hosts) > 1:
            known = [host.address for host in self.hosts[:2]] if self.node is None else []
            env[HOSTS] = ",".join(dict.fromkeys([*(self.rendezvous or ())[:1], *known]))
        return env

    def rank_argv(self, *options: str) -> list[str]:
        """The argv of one rank, after the Python executable: the shim (``launch/watch/rank.py``) around the program."""
        program = self.program + (self.begin or (self.resume if self.attempt else ()))
        control = [f"--control={self.control}"] if self.distributed else []
        return ["-m", "launch.watch.rank", f"--log-dir={self.log_dir}", *control, *options, "--", *program]


def ordered(job: Job, env: Mapping[str, str], *options: str, lease: bool = False) -> tuple[list[str], dict[Path, str]]:
    """A short argv of the shim, and the file from which the shim reads its arguments and variables.

    For launchers that do not pass arguments and variables on faithfully. Only the user can read the file, because
    variables may be secret. ``lease``: ranks end themselves when the launcher falls silent, since nothing else would.
    """
    path = job.log_dir / "order.json"
    argv = job.rank_argv(*options, *(["--lease"] if lease and job.distributed else []))
    order = {"argv": argv[2:], "env": {**job.rank_env, **env}, "cwd": str(Path.cwd())}
    plain = quote(str(path.absolute()), safe="/").replace("%", "=")
    return [*argv[:2], f"--file={plain}"], {path: json.dumps(order, indent=1) + "\n"}


def rank_defaults(slots: int, given: Mapping[str, str]) -> dict[str, str]:
    """Default variables of ranks; those that the user has set in ``given`` are left alone."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // slots)),
        "PYTHONUNBUFFERED": "1",  # a killed rank's last lines are in its log
    }
    return {name: value for name, value in defaults.items() if name not in given}


def forwarded(given: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The variables in ``given`` that are forwarded to other hosts: those of ``FORWARDED`` and ``more``."""
    wanted = (*FORWARDED, *more)
    exact, prefixes = set(wanted), tuple(name[:-1] for name in wanted if name.endswith("*"))
    return {name: value for name, value in given.items() if name in exact or name.startswith(prefixes)}


def device_env(host: Host) -> dict[str, str]:
    """Makes only the devices that a filter chose visible to the ranks of ``host``."""
    return {} if host.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))}


@dataclass(frozen=True)
class Command:
    """One process that a launcher starts on this machine, which starts ranks on ``host`` (or, without one, on all).

    ``env`` is added to the environment; variables that start with one of ``without`` are removed. ``stdin`` is written
    to it, if given, and the pipe stays open as a lifeline: when it falls silent, the other host ends what runs there
    (``launch/watch/host.py``).
    """

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    host: Host | None = None
    stdin: str | None = None
    without: tuple[str, ...] = ()
    stop: int | None = None  # the signal on which it ends its ranks on other hosts; sent before SIGKILL
    console: bool = False  # descriptor 0 is the console's stderr (launch/launchers/torchrun.py)


@dataclass(frozen=True)
class Launch:
    """How a launcher is started: commands to run side by side, and files to write before."""

    name: str
    commands: list[Command]
    files: dict[Path, str] = field(default_factory=dict)
