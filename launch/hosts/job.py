"""What is to be run, and where: a ``Job``, described without saying which launcher starts it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from launch.hosts.hostfile import Host
from launch.hosts.network import HOSTS

# Variables that ranks on other hosts need as much as those here; a name, or a prefix and a star.
FORWARDED = (
    *("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHON*", "TMPDIR", "LANG", "LC_*"),
    *("CUDA_*", "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "OMP_*", "MKL_*", "TORCH*", "PYTORCH_*", "TRITON_*", "DS_*"),
    *("HF_*", "HUGGINGFACE_*", "TOKENIZERS_*", "MLITE_*"),
)


@dataclass(frozen=True)
class Ssh:
    """How other hosts are reached, beyond what the user's ssh config says."""

    port: int | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slurm:
    """How the nodes of an allocation are reached: ``srun`` starts a task for each rank (``tasks``) or a ``torchrun`` on
    each node, perhaps in a container. ``port``: where ranks meet if no free one can be looked for."""

    srun: str = "tasks"
    cpus_per_task: int | None = None
    container: str | None = None
    container_mounts: str | None = None
    srun_extra: tuple[str, ...] = ()
    port: int = 20000


@dataclass(frozen=True)
class Place:
    """Where a rank runs: ``node`` counts hosts, ``local_rank`` the ranks of one host."""

    rank: int
    host: Host
    node: int
    local_rank: int


@dataclass(frozen=True)
class Job:
    """Copies of ``program`` (an argv), one for each slot of ``hosts``: one distributed run, its files in ``run_dir``.

    Ranks count through the slots of the first host, then of the second, and so on, under every launcher.
    ``node``: start the ranks of this host alone, because somebody else starts the others'. ``rendezvous``: the address
    and port at which ranks meet, where that is decided beforehand; its name may take ``rendezvous_wait`` seconds to
    resolve. ``attempt`` counts automatic restarts from 0; from the first restart on, ``resume`` is appended to the
    program, but as long as nothing has been saved ``begin``, if any: where the config has it begin. ``name`` with
    ``nonce`` tells this job from every other one; hosts that start their own ranks share no nonce, and each counts its
    own restarts: there the name is all. ``runner``: what DeepSpeed's launcher reaches hosts with. ``mpirun``: the one
    to use, where it is not the one that ``launch/launchers/mpirun.py`` finds.
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
        """Ranks of the whole run."""
        return sum(host.slots for host in self.hosts)

    @property
    def places(self) -> list[Place]:
        """Where every rank of the run is, in order."""
        slots = [(node, host, slot) for node, host in enumerate(self.hosts) for slot in range(host.slots)]
        return [Place(rank, host, node, slot) for rank, (node, host, slot) in enumerate(slots)]

    @property
    def watched(self) -> list[Place]:
        """The ranks that this launcher starts and answers for."""
        return [place for place in self.places if self.node in (None, place.node)]

    @property
    def distributed(self) -> bool:
        """Whether some of the ranks it starts are on other machines, or Slurm's children, out of reach of a signal."""
        if self.slurm is not None:
            return True
        return any(not place.host.local for place in self.watched) if self.node is None else False

    @property
    def log_dir(self) -> Path:
        return self.run_dir / "logs"

    @property
    def own(self) -> str:
        """What tells the files of this launch from those of the other hosts', where each has one."""
        return "" if self.node is None else f"_{self.node}"

    @property
    def lock(self) -> Path:
        """Held while it runs, and written when it begins."""
        return self.log_dir / f"launcher{self.own}.lock"

    @property
    def control(self) -> Path:
        """The file that tells ranks on other machines what their launcher wants of them (``launch/watch/rank.py``)."""
        return self.log_dir / "control"

    def next_attempt(self) -> Job:
        """The same again, after this start, which goes on from what this one has saved."""
        latest, started = self.run_dir / "checkpoints" / "latest", self.lock
        saved = latest.is_file() and latest.stat().st_mtime_ns > started.stat().st_mtime_ns
        return replace(self, attempt=self.attempt + 1, begin=() if saved or self.begin == self.resume else self.begin)

    @property
    def rank_env(self) -> dict[str, str]:
        """Variables to add to the environment of every rank."""
        name = self.name if self.node is not None else f"{self.name}{self.nonce}.{self.attempt}"
        env = {**self.env, "MLITE_ATTEMPT": str(self.attempt), "MLITE_JOB": name, "MLITE_RANKS": str(self.size)}
        if len(self.hosts) > 1:
            known = [host.address for host in self.hosts[:2]] if self.node is None else []
            env[HOSTS] = ",".join(dict.fromkeys([*(self.rendezvous or ())[:1], *known]))
        return env

    def rank_argv(self, *options: str) -> list[str]:
        """The argv, after the Python executable, of one rank: the program in its shim (``launch/watch/rank.py``)."""
        program = self.program + (self.begin or (self.resume if self.attempt else ()))
        control = [f"--control={self.control}"] if self.distributed else []
        return ["-m", "launch.watch.rank", f"--log-dir={self.log_dir}", *control, *options, "--", *program]


def ordered(job: Job, env: Mapping[str, str], *options: str, lease: bool = False) -> tuple[list[str], dict[Path, str]]:
    """For launchers that carry arguments and variables badly: a short argv of the shim, and the file that it reads the
    rest from. The file is the user's alone: variables may be secret.

    ``lease``: ranks end themselves when the launcher gives no sign of life, because nothing else would end them.
    """
    path = job.log_dir / "order.json"
    argv = job.rank_argv(*options, *(["--lease"] if lease and job.distributed else []))
    order = {"argv": argv[2:], "env": {**job.rank_env, **env}, "cwd": str(Path.cwd())}
    plain = quote(str(path.absolute()), safe="/").replace("%", "=")
    return [*argv[:2], f"--file={plain}"], {path: json.dumps(order, indent=1) + "\n"}


def rank_defaults(slots: int, given: Mapping[str, str]) -> dict[str, str]:
    """Variables that ranks should have; what the user has set in ``given`` is left alone."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // slots)),
        "PYTHONUNBUFFERED": "1",  # a killed rank's last lines are in its log
    }
    return {name: value for name, value in defaults.items() if name not in given}


def forwarded(given: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The part of ``given`` that ranks on other hosts get, too: ``FORWARDED`` and ``more``."""
    wanted = (*FORWARDED, *more)
    exact, prefixes = set(wanted), tuple(name[:-1] for name in wanted if name.endswith("*"))
    return {name: value for name, value in given.items() if name in exact or name.startswith(prefixes)}


def device_env(host: Host) -> dict[str, str]:
    """What lets the ranks of ``host`` see the devices that a filter chose, and no other."""
    return {} if host.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))}


@dataclass(frozen=True)
class Command:
    """One process that a launcher starts on this machine, which starts ranks on ``host`` (or, without one, on all).

    ``env`` is added to the environment, and what starts with ``without`` taken out of it. ``stdin``, if there is any,
    is written to it, and the pipe then held open: a host that hears no more from this machine ends what runs there
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
    """What a launcher is started with: commands to run side by side, and files to write first."""

    name: str
    commands: list[Command]
    files: dict[Path, str] = field(default_factory=dict)
