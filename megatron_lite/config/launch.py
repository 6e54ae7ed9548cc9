"""How ``python -m launch`` starts a run. Defined here so that a config is checked as a whole."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_lite.section import Integer, Positive, Section


def _as_written(value: Any) -> Any:
    """Accepts an integer for a text, as its digits; the text of a bool or a float is lost once YAML has read it."""
    if isinstance(value, bool | float):
        raise ValueError("this is not a text: write it in quotes")
    return str(value) if isinstance(value, int) else value


def _option(word: str) -> str:
    if not word.startswith("-"):
        raise ValueError("expected an option, as in --name=value")
    return word


def _limit(text: str) -> str:
    if seconds(text) is None and text.lower() not in ("unlimited", "infinite", "-1"):
        raise ValueError("expected minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED")
    return text


def _tasks(text: str) -> str:
    part = r"\d{1,7}(-\d{1,7}(:0*[1-9]\d{0,6})?)?"
    if not re.fullmatch(rf"{part}(,{part})*(%[1-9]\d{{0,6}})?", text, re.ASCII):
        raise ValueError("expected tasks as sbatch takes them: 0-4, 1,3,7, 0-8:2, and 1-9%1 for parts of one run")
    return text


_N = r"(\d{1,6})"
_FORMS = {  # each number's unit in seconds
    f"{_N}": (60,),
    f"{_N}:{_N}": (60, 1),
    f"{_N}:{_N}:{_N}": (3600, 60, 1),
    f"{_N}-{_N}": (86400, 3600),
    f"{_N}-{_N}:{_N}": (86400, 3600, 60),
    f"{_N}-{_N}:{_N}:{_N}": (86400, 3600, 60, 1),
}


def seconds(limit: str) -> int | None:
    """The seconds of a Slurm time limit: ``30`` is minutes, ``4:00`` minutes and seconds, ``1-12`` a day and 12 hours.
    None for any other text, such as ``UNLIMITED``."""
    for form, units in _FORMS.items():
        if found := re.fullmatch(form, limit, re.ASCII):
            return sum(int(number) * unit for number, unit in zip(found.groups(), units, strict=True))
    return None


_Text = Annotated[str, BeforeValidator(_as_written)]
_Line = Annotated[_Text, Field(pattern=r"^[^\n\r\x00]*$")]  # becomes a line of a script, or an argument of a command
_Option = Annotated[_Line, AfterValidator(_option)]
_Limit = Annotated[_Text, AfterValidator(_limit)]
_Tasks = Annotated[_Text, AfterValidator(_tasks)]


class SshConfig(Section):
    """How ``launch`` reaches other hosts, beyond the user's ssh config; ``options`` as in ``ssh -o``."""

    port: Annotated[Integer, Field(gt=0, lt=65536)] | None = None
    options: list[_Line] = []


class SlurmConfig(Section):
    """The job that ``launch --via=slurm`` submits. ``srun``: start one task per rank, or one torchrun per node.

    ``signal_seconds`` before the time limit, the run saves, ends with 75 and, with ``requeue``, is queued again; it is
    also requeued after a lost rank or node if there is a new checkpoint. ``chain``: the number of jobs, each of which
    continues where the last one stopped. ``array``: as in ``sbatch --array``; with ``%1`` its tasks are parts of one
    run, else separate runs, ``NAME-I`` with seed I. ``setup``: shell commands before the run (modules, environments),
    without ``${…}``; if one fails, the job ends. ``extra``, ``srun_extra``: further options for sbatch, such as
    ``--mail-type=END``, and for srun, such as ``--gpu-bind=closest``. ``container``: as in ``srun --container-image``
    (enroot with pyxis). ``time`` and ``mem``: as in sbatch; ``30`` is minutes, ``64`` megabytes.
    """

    srun: Literal["tasks", "torchrun"] = "tasks"
    partition: _Line | None = None
    account: _Line | None = None
    qos: _Line | None = None
    time: _Limit | None = None
    gres: _Line | None = None
    constraint: _Line | None = None
    cpus_per_task: Positive | None = None
    mem: _Line | None = None
    exclusive: bool = False
    container: _Line | None = None
    container_mounts: _Line | None = None
    array: _Tasks | None = None
    chain: Positive = 1
    signal_seconds: Annotated[Integer, Field(ge=0, lt=65536)] = 120
    requeue: bool = True
    setup: list[_Line] = []
    extra: list[_Option] = []
    srun_extra: list[_Option] = []

    @model_validator(mode="after")
    def _time_to_save(self) -> SlurmConfig:
        limit = seconds(self.time or "")
        if limit and self.signal_seconds >= limit:  # a limit of 0 is none
            raise ValueError(
                f"signal_seconds={self.signal_seconds} must be less than time={self.time} ({limit} s); "
                "lower it or raise time"
            )
        return self


class KubernetesConfig(Section):
    """The manifest that ``launch k8s`` prints. ``kind``: an indexed Job, a PyTorchJob of Kubeflow's training operator,
    or a TrainJob of Kubeflow Trainer, whose ClusterTrainingRuntime is ``runtime``, by default torch-distributed.

    ``volumes``: persistent volume claims and where they are mounted. ``resources``: of each pod. ``shm``: the size of
    its /dev/shm. ``secrets``: Secrets whose keys become environment variables of the ranks.
    """

    kind: Literal["Job", "PyTorchJob", "TrainJob"] = "Job"
    runtime: str | None = None
    image: str | None = None
    namespace: str | None = None
    volumes: dict[str, str] = {}
    resources: dict[str, _Text] = {}
    shm: str = "8Gi"
    secrets: list[str] = []


class LaunchConfig(Section):
    """How ``python -m launch`` starts ranks. ``env``: environment variables of every rank. ``forward``: names (or
    prefixes with a ``*``) of this machine's variables that are passed to ranks on other hosts, besides the usual ones.

    ``tp_across_hosts`` allows tensor-parallel groups that span hosts, although the network makes them slow.
    """

    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], _Text] = {}
    forward: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\*?$")]] = []
    tp_across_hosts: bool = False
    ssh: SshConfig = SshConfig()
    slurm: SlurmConfig = SlurmConfig()
    k8s: KubernetesConfig = KubernetesConfig()
