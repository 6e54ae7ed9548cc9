"""How ``python -m launch`` starts a run: here alone, so that a config is checked as a whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_lite.config.section import Count, Integer, Positive, Section

_Line = Annotated[str, Field(pattern=r"^[^\n\r\x00]*$")]  # what becomes a line of a script, or a word of a command


class SshConfig(Section):
    """How ``launch`` reaches other hosts, beyond the user's ssh config; ``options`` as in ``ssh -o``."""

    port: Annotated[Integer, Field(gt=0, lt=65536)] | None = None
    options: list[_Line] = []


class SlurmConfig(Section):
    """The job that ``launch --via=slurm`` submits. ``srun``: a task for each rank, or a torchrun on each node.

    ``signal_seconds`` before the time limit the run saves, ends with 75 and, with ``requeue``, is queued again; also
    after a lost rank or node, if there is a new checkpoint. ``chain``: this many jobs, each of which goes on where
    those before it have stopped. ``array``: as in ``sbatch --array``; with ``%1`` its tasks are parts of one run, else
    runs of their own, ``NAME-I`` with seed I. ``setup``: lines of shell before the run (modules, environments),
    without ``${…}``. ``extra``: further options of sbatch, as in ``--mail-type=END``. ``container``: as in
    ``srun --container-image`` (enroot with pyxis).
    """

    srun: Literal["tasks", "torchrun"] = "tasks"
    partition: _Line | None = None
    account: _Line | None = None
    qos: _Line | None = None
    time: _Line | None = None
    gres: _Line | None = None
    constraint: _Line | None = None
    cpus_per_task: Positive | None = None
    mem: _Line | None = None
    exclusive: bool = False
    container: _Line | None = None
    container_mounts: _Line | None = None
    array: _Line | None = None
    chain: Positive = 1
    signal_seconds: Count = 120
    requeue: bool = True
    setup: list[_Line] = []
    extra: list[_Line] = []


class KubernetesConfig(Section):
    """The manifest that ``launch k8s`` prints. ``kind``: an indexed Job, or a PyTorchJob of the training operator.

    ``volumes``: persistent volume claims and where they are mounted. ``resources``: of each pod. ``shm``: the size of
    its /dev/shm. ``secrets``: Secrets whose keys become variables of the ranks.
    """

    kind: Literal["Job", "PyTorchJob"] = "Job"
    image: str | None = None
    namespace: str | None = None
    volumes: dict[str, str] = {}
    resources: dict[str, str] = {}
    shm: str = "8Gi"
    secrets: list[str] = []


class LaunchConfig(Section):
    """What ``python -m launch`` starts ranks with. ``env``: variables of every rank. ``forward``: names (or prefixes
    with a ``*``) of this machine's variables that ranks on other hosts get, beside the usual ones.

    ``tp_across_hosts`` allows tensor-parallel groups that span hosts, whose network is slow for them.
    """

    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    forward: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\*?$")]] = []
    tp_across_hosts: bool = False
    ssh: SshConfig = SshConfig()
    slurm: SlurmConfig = SlurmConfig()
    k8s: KubernetesConfig = KubernetesConfig()
