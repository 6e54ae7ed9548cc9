"""Starts ranks through ``mpirun`` (Open MPI, MPICH and its descendants such as Intel MPI), one context for each host.

Application contexts (``… : …``) are the only way to place ranks that all MPIs share, and the only one that surely puts
rank 0 on the first host of the hostfile.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from launch.hosts import network
from launch.hosts.hostfile import UsageError
from launch.hosts.job import Command, Job, Launch, device_env, ordered

_LIBRARIES = {"Open MPI": ("libmpi.so.40", "libmpi.so.80"), "MPICH": ("libmpi.so.12", "libmpich.so.12")}
_RANK = {"Open MPI": "OMPI_COMM_WORLD_RANK", "MPICH": "PMI_RANK"}


def command(job: Job) -> Launch:
    """One ``mpirun`` command: the mpirun installed beside this Python, else the first on PATH. Ranks read their program
    and variables from a file, and agree on a rendezvous over MPI (``megatron_lite/distributed/rendezvous.py``)."""
    mpirun = job.mpirun or find()
    flavour, major = version(mpirun)
    if flavour == "MPICH" and len(job.hosts) > 1:
        _check_ipv4(job)
    return build(job, mpirun, flavour, major)


def _check_ipv4(job: Job) -> None:
    """Refuse hosts with IPv6 addresses only: MPICH resolves names with gethostbyname(), which knows no IPv6. Hosts of
    one network are alike, so two are checked. Raises UsageError."""
    for host in job.hosts[:2]:
        found = network.resolve(host.address)
        if found and all(":" in address for address in found):
            raise UsageError(
                f"--via=mpirun: MPICH connects hosts by IPv4, and {host.address} has {', '.join(found)} only; "
                "use Open MPI, --via=torchrun, or give it an IPv4 address"
            )


def find() -> Path:
    """The mpirun to use: the one beside this Python (from pip), else the first on PATH. Raises UsageError."""
    own = Path(sys.executable).parent / "mpirun"
    found = str(own) if own.exists() else shutil.which("mpirun") or shutil.which("mpiexec")
    if found is None:
        raise UsageError("--via=mpirun: there is no mpirun; pip install 'megatron_lite[mpi]', or your system's MPI")
    return Path(found)


def version(mpirun: Path) -> tuple[str, int]:
    """Which MPI it is (Open MPI or MPICH), and its major version. Raises UsageError."""
    asked = subprocess.run([str(mpirun), "--version"], capture_output=True, text=True, check=False, timeout=20)
    if match := re.search(r"Open MPI\) (\d+)", asked.stdout):
        return "Open MPI", int(match[1])
    if match := re.search(r"HYDRA[\s\S]*?Version:\s*(\d+)|Intel\(R\) MPI", asked.stdout):
        return "MPICH", int(match[1] or 4)
    raise UsageError(f"{mpirun}: neither Open MPI nor MPICH; it says {asked.stdout.strip()[:80]!r}")


def build(job: Job, mpirun: Path, flavour: str, major: int) -> Launch:
    """The launch for an mpirun of known flavour and version. Raises UsageError."""
    if odd := next((host for host in job.hosts if ":" in host.address), None):
        raise UsageError(
            f"--via=mpirun: mpirun splits {odd.address} at its colons; write the host's name in the hostfile"
        )
    shim, files = ordered(job, _library(mpirun, flavour), "--stderr-fd=1", f"--rank={_RANK[flavour]}")
    argv = [
        str(mpirun),
        *(_open_mpi(job, major) if flavour == "Open MPI" else _mpich(job)),
    ]
    for node, host in enumerate(job.hosts):
        argv += [":"] * (node > 0)
        if flavour == "Open MPI":
            place = ["--host", f"{host.name}:{host.slots}", "-n", str(host.slots)]
            devices = [word for name, value in device_env(host).items() for word in ("-x", f"{name}={value}")]
            passed = [word for name in _passed() for word in ("-x", name)]
        else:
            place, passed = ["-n", str(host.slots)], []
            devices = [word for name, value in device_env(host).items() for word in ("-env", name, value)]
        argv += [*place, *passed, *devices, sys.executable, *shim]
    return Launch("mpirun", [Command(argv)], files)


def _mpich(job: Job) -> list[str]:
    """MPICH's contexts share one list of hosts and fill it in order."""
    hosts = ",".join(f"{host.name}:{host.slots}" for host in job.hosts)
    return ["-launcher", "ssh", "-bind-to", "none", "-hosts", hosts]


def _open_mpi(job: Job, major: int) -> list[str]:
    words = ["--bind-to", "none"]
    if os.geteuid() == 0:
        words.append("--allow-run-as-root")  # Open MPI refuses root by default; most containers run as root
    ssh = [*(["-p", str(job.ssh.port)] if job.ssh.port else []), *(f"-o{option}" for option in job.ssh.options)]
    if ssh:
        if any(shlex.quote(word) != word for word in ssh):
            raise UsageError(
                f"launch.ssh.options={list(job.ssh.options)}: mpirun splits them at spaces; put them in ~/.ssh/config"
            )
        words += (
            ["--prtemca", "plm_ssh_args", " ".join(ssh)] if major >= 5 else ["--mca", "plm_rsh_args", " ".join(ssh)]
        )
    return words


def _passed() -> list[str]:
    """Variables that Python needs to start on another host; all others are in the file."""
    return [name for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH") if os.environ.get(name)]


def _library(mpirun: Path, flavour: str) -> dict[str, str]:
    """Tells mpi4py which MPI library to load; it finds that of pip's MPI by itself."""
    if mpirun.parent == Path(sys.executable).parent or "MPI4PY_LIBMPI" in os.environ:
        return {}
    root = mpirun.resolve().parent.parent
    for folder in (root / "lib", root / "lib64", *sorted((root / "lib").glob("*-linux-gnu*"))):
        for name in _LIBRARIES[flavour]:
            if (folder / name).exists():
                return {"MPI4PY_LIBMPI": str(folder / name)}
    return {}
