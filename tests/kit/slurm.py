"""A real Slurm on the hosts of a cluster: one slurmctld, a slurmd on each host, munge between them.

with Cluster(3) as cluster, Slurm(cluster) as slurm:
    slurm.run(["srun", "-N2", "hostname"], timeout=10).expect(exit_code=0)
    job = slurm.submit("#!/bin/sh\\nsrun …", "-N2")
    slurm.wait(job, "RUNNING")
    slurm.kill_node(2)

Every node has 4 CPUs, 4 pretended GPUs and the feature ``cpu``. On loopback hosts, nodes are named by their address.
Jobs in the partition ``high`` preempt those of ``main``, which get a minute to end.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.kit.cluster import Cluster
from tests.kit.hosts import SYSTEM_PATH, eventually, free_port, program
from tests.kit.jobs import MARK, REPOSITORY, Result

_NO_CGROUPS = """CgroupPlugin=cgroup/v1
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
"""


class Slurm:
    """Slurm on the first ``nodes`` hosts of a cluster; its servers are the cluster's, and end with it."""

    def __init__(self, cluster: Cluster, nodes: int | None = None, *, node_timeout: int = 5) -> None:
        """``node_timeout``: seconds without an answer after which a node is down, at the earliest."""
        self.cluster, self.node_timeout = cluster, node_timeout
        self.nodes = cluster.hosts[:nodes]
        self.folder = cluster.folder / "slurm"

    def __enter__(self) -> Slurm:
        munged = shutil.which("munged", path=SYSTEM_PATH)
        slurmctld, slurmd = program("slurmctld", "slurmctld"), program("slurmd", "slurmd")
        for name in ("srun", "sbatch", "squeue", "scontrol", "scancel", "sinfo"):
            program(name, "slurm-client")
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(self._config(with_munge=munged is not None))
        (self.folder / "cgroup.conf").write_text(_NO_CGROUPS)
        for number in range(4):
            (self.folder / f"gpu{number}").touch()  # Slurm wants to see a device's file, and looks no closer
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        if munged:
            self._start_munge(munged)
        ready = "Running as primary controller"
        self.cluster.serve(0, "slurmctld", [slurmctld, "-D"], ready=ready, env=self.env)
        for index, node in enumerate(self.nodes):
            which = ["-N", node] if self.cluster.kind == "loopback" else []
            self.cluster.serve(index, "slurmd", [slurmd, "-D", *which], ready="slurmd started", env=self.env)
        self.wait_until_idle()
        return self

    def __exit__(self, *exception: object) -> None:
        self.cluster.stop(range(len(self.nodes)), ["slurmd", "slurmctld", "munged"])

    @property
    def env(self) -> dict[str, str]:
        """What its commands need in their environment."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def argv(self, argv: Sequence[str]) -> list[str]:
        """``argv`` for ``cluster.run`` and ``start``, so that batch jobs it submits may live on after it has ended."""
        return ["env", "-u", MARK, *(f"{name}={value}" for name, value in self.env.items()), *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        index: int = 0,
        env: Mapping[str, str | None] | None = None,
        cwd: Path = REPOSITORY,
    ) -> Result:
        """Run a command of Slurm, or one that calls them, on a host."""
        return self.cluster.run(index, self.argv(argv), timeout=timeout, env=env, cwd=cwd)

    def submit(self, script: str, *options: str, env: Mapping[str, str | None] | None = None) -> int:
        """Submit a batch script; returns the job's number. Its output is in ``output(job)``."""
        path = self.folder / "script"
        path.write_text(script)
        argv = ["sbatch", "--parsable", f"--output={self.folder}/%j.out", *options, str(path)]
        return int(self.run(argv, timeout=20, env=env).expect(exit_code=0).stdout)

    def output(self, job: int) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def job(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` tells: JobState, Reason, Restarts, NodeList, ExitCode, …"""
        shown = self.run(["scontrol", "show", "job", "-o", str(job)], timeout=20).expect(exit_code=0).stdout
        return dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", shown))

    def wait(self, job: int, state: str, timeout: float = 30) -> dict[str, str]:
        """Poll until a job's JobState matches the regular expression; fails at another end."""
        ended = "COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL"

        def reached() -> bool:
            now = self.job(job)["JobState"]
            assert re.fullmatch(state, now) or not re.fullmatch(ended, now), f"{now}, not {state}: {self.output(job)}"
            return bool(re.fullmatch(state, now))

        eventually(reached, f"job {job} is {state}; its output: {self.output(job)[-2000:]}", timeout, every=0.2)
        return self.job(job)

    def kill_node(self, index: int, *, silently: bool = False) -> None:
        """As ``cluster.kill_host``; Slurm calls it down after ``node_timeout`` and up to 10 seconds."""
        self.cluster.kill_host(index, silently=silently)

    def revive_node(self, index: int) -> None:
        """Start its servers again; idle, soon."""
        self.cluster.revive_host(index)

    def node_state(self, index: int) -> str:
        """As sinfo prints it: idle, mixed, allocated, down, with * where it does not answer."""
        argv = ["sinfo", "-h", "-n", self.nodes[index], "-o", "%T"]
        return self.run(argv, timeout=20).expect(exit_code=0).stdout.strip()

    def wait_until_idle(self, timeout: float = 30) -> None:
        """Until no job is left and every node is there and idle."""

        def idle() -> bool:
            argv = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
            counted = self.run(argv, timeout=20).expect(exit_code=0).stdout.split()
            return counted == [str(len(self.nodes))]

        eventually(idle, "every node is idle", timeout, every=0.1)

    def reset(self) -> None:
        """No jobs, and every node idle."""
        jobs = self.run(["squeue", "-h", "-o", "%A"], timeout=20).expect(exit_code=0).stdout.split()
        if jobs:
            self.run(["scancel", *sorted(set(jobs))], timeout=20)
        self.cluster.reset()
        for index, node in enumerate(self.nodes):
            if re.match("down|drain", self.node_state(index)):
                self.run(["scontrol", "update", f"nodename={node}", "state=resume"], timeout=20)
        self.wait_until_idle()

    def _config(self, with_munge: bool) -> str:
        user = pwd.getpwuid(os.getuid()).pw_name
        controller, ports = self.nodes[0], dict.fromkeys(self.nodes, "")
        if self.cluster.kind == "loopback":
            controller = f"{socket.gethostname()}(127.0.0.1)\nSlurmctldPort={free_port('127.0.0.1')}"
            ports = {node: f" NodeHostname=localhost NodeAddr={node} Port={free_port(node)}" for node in self.nodes}
        # cred_expire: a requeued job starts no earlier than this; its default is two minutes.
        auth, socket_of_munge = ("munge", f"socket={self.folder}/munge/socket,") if with_munge else ("none", "")
        described = "CPUs=4 RealMemory=4000 Gres=gpu:4 Feature=cpu State=UNKNOWN"
        everyone = ",".join(self.nodes)
        nodes = "\n".join(f"NodeName={node}{ports[node]} {described}" for node in self.nodes)
        return f"""
ClusterName=lab
SlurmctldHost={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/{auth}
AuthInfo={socket_of_munge}cred_expire=10
CredType=cred/{auth}
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout={self.node_timeout}
KillWait=3
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes={everyone} Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes={everyone} PriorityTier=2 PreemptMode=OFF State=UP
"""

    def _start_munge(self, munged: str) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o711)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        argv = [munged, "-F", "--force", "--num-threads=2", *(f"--{name}={folder}/{p}" for name, p in paths.items())]

        def answers() -> bool:
            with socket.socket(socket.AF_UNIX) as client:
                return client.connect_ex(str(folder / "socket")) == 0

        self.cluster.serve(0, "munged", argv, ready=answers)
