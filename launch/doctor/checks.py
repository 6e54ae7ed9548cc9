"""What the doctor checks: pure functions from what hosts said (an ``Examination``) to findings, causes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from launch.doctor.examination import Examination, Finding, amount
from launch.doctor.facts import PACKAGES, Facts, Peer
from launch.hosts import network
from launch.hosts.hostfile import count
from launch.watch.report import PEER_LOST, STORAGE, USAGE

# Clock skew in seconds: logs are out of order; tickets, certificates and file times fail, too.
_SKEW_S, _FAR_S = 1.0, 60.0
_SHM, _SHM_SMALL = 16 << 20, 512 << 20  # bytes of /dev/shm: free space that NCCL and workers need; recommended size
_FILES, _FILES_PER_RANK = 256, 8  # open files of a rank; connections to each of its peers
_THREADS = 64  # threads of a rank, besides its compute threads
_SHARE = 0.2  # an all-reduce should reach at least this share of the link's speed
_GLOO_MBITS = 10_000  # gloo cannot use much more than this
_LOOPBACK = 0.2e9  # bytes a second, between ranks of one machine


Check = Callable[[Examination], Iterator[Finding]]


def ssh(exam: Examination) -> Iterator[Finding]:
    """Every host answers over ssh, without a prompt."""
    for host in exam.hosts:
        if said := exam.silent.get(host.name):
            fix = next((f"; {fix}" for sign, fix in SSH_FIXES.items() if sign in said), "")
            yield Finding("error", said + fix, host.name)


SSH_FIXES = {  # message of ssh or of the remote shell: how to fix it
    "resolve hostname": "correct the name in the hostfile, or add it to DNS or /etc/hosts",
    "Host key verification failed": "connect once by hand to accept its key: ssh HOST true",
    "HOST IDENTIFICATION HAS CHANGED": "if it was reinstalled: ssh-keygen -R HOST, then ssh HOST true",
    "Permission denied (": "it would ask for a password: copy your key there with ssh-copy-id HOST, or start ssh-agent",
    "Connection refused": "start sshd there, or give its port as --launch.ssh.port=N or in ~/.ssh/config",
    "timed out": "is it up, and is port 22 open in its firewall?",
    "No route to host": "is it up, and on this network?",
    "Network is unreachable": "is it up, and on this network?",
    "change directory": "the code has to lie at the same path on every host, as on a shared file system",
    "No module named": "the same version of this project has to be installed there",
    ": No such file or directory": "Python has to lie at the same path on every host: share the virtual environment",
    "unrecognized option": "env there has no --chdir: install GNU coreutils 8.28 or newer",
}


def names(exam: Examination) -> Iterator[Finding]:
    """Every host resolves every name, to an address that is not its own loopback, and resolves that address back."""
    for host, known in exam.facts.items():
        nameless = []
        for other, peer in known.peers.items():
            first = peer.addresses[:1]
            if not first:
                yield Finding("error", f"does not know the name {other}; add it to DNS or to /etc/hosts there", host)
            elif other != host.rpartition("@")[2] and network.is_loopback(first[0]):
                fix = f"give {other} its network address in /etc/hosts there"
                yield Finding("error", f"resolves {other} to its own loopback address, {first[0]}; {fix}", host)
            elif not peer.name and not network.is_loopback(first[0]):
                nameless.append(f"{first[0]} ({other})")
        if nameless:
            fix = "torch warns at each connection; add reverse DNS, or lines in /etc/hosts"
            yield Finding("warning", f"no name belongs to {', '.join(nameless)}; {fix}", host)


def interface(exam: Examination) -> Iterator[Finding]:
    """Ranks listen on the interface that the user chose, or gloo on the host name's own address: not loopback."""
    if len(exam.hosts) == 1:
        yield Finding("note", "one host")
        return
    for host, known in exam.facts.items():
        way = next((peer.interface for peer in known.peers.values() if peer.interface), "")
        hint = " and ".join(f"{name}={way}" for name in network.VARIABLES)
        trap = f"its own name {known.hostname} leads to {known.own_address}, where no other host can connect"
        if wrong := [f"{name}={value}" for name, value in exam.chosen.items() if not _leads_out(value, known)]:
            fix = f"set {hint}, or unset it" if way else "unset it"
            yield Finding("error", f"{' and '.join(wrong)}, but it has {', '.join(known.speeds)}; {fix}", host)
        elif gloo := exam.chosen.get(network.VARIABLES[0]):
            yield Finding("note", f"{gloo}, as you have chosen", host)
        elif not network.is_loopback(known.own_address):
            if ":" in known.own_address:
                fix = f"where ranks do not connect, set {hint}, or give the host an IPv4 address"
                yield Finding("warning", f"its name leads to IPv6 only ({known.own_address}); {fix}", host)
            yield Finding("note", f"{known.own_address} ({way or 'no interface'})", host)
        elif way:
            fix = f"launch run sets {hint} there; other starters need the same, or another line in /etc/hosts"
            yield Finding("warning", f"{trap}; {fix}", host)
        else:
            yield Finding("error", f"{trap}, and no interface leads to the others; correct /etc/hosts", host)


def _leads_out(chosen: str, known: Facts) -> bool:
    """Whether a chosen interface exists and is not loopback; NCCL also accepts prefixes of names."""
    outward = [name for name in known.speeds if name != "lo"]
    words = [word.removeprefix("=") for word in chosen.split(",")]
    return chosen.startswith("^") or any(name.startswith(word) for word in words for name in outward)


def versions(exam: Examination) -> Iterator[Finding]:
    """The same Python, packages and code on every host; what most hosts have counts as intended."""
    having: dict[str, dict[str, str | None]] = {
        "Python": {host: known.python for host, known in exam.facts.items()},
        **{name: {host: known.versions.get(name) for host, known in exam.facts.items()} for name in PACKAGES},
        "code": {host: known.code for host, known in exam.facts.items()},
    }
    for what, found in having.items() if exam.facts else ():
        usual = Counter(found.values()).most_common(1)[0][0]  # in a tie, the first host's
        usual_text = f"{what} {usual}" if usual else f"no {what}"
        for host, version in found.items():
            if version != usual:
                where = "copy the code there" if what == "code" else f"install it for {exam.facts[host].executable}"
                has = f"{what} {version}" if version else f"no {what}"
                yield Finding("error", f"has {has}, others {usual_text}; {where}", host)
        if what == "torch" and usual is None:
            yield Finding("error", "no torch for this Python; pip install torch")
        elif usual:
            yield Finding("note", usual_text)


def devices(exam: Examination) -> Iterator[Finding]:
    """A GPU for every slot or, if no host has GPUs, a core."""
    some = any(known.gpus for known in exam.facts.values())
    for host in exam.hosts:
        if (known := exam.facts.get(host.name)) is None:
            continue
        wanted = max(host.devices) + 1 if host.devices else host.slots
        if some and known.gpus < wanted:
            fix = f"slots={known.gpus}" if known.gpus else "leave it out, or look at nvidia-smi there"
            yield Finding("error", f"{wanted} slots but {count(known.gpus, 'GPU')}; {fix}", host.name)
        elif not some and known.cores < host.slots:
            fix = f"slots={known.cores} is faster"
            yield Finding("warning", f"{host.slots} slots share {count(known.cores, 'core')}; {fix}", host.name)
        else:
            has = count(known.gpus, "GPU") if some else count(known.cores, "core") + ", no GPU"
            yield Finding("note", f"{has} for {count(host.slots, 'rank')}", host.name)


def threads(exam: Examination) -> Iterator[Finding]:
    """Every compute thread of a host's ranks has a core. (``devices`` checks that every rank has one.)"""
    for host in exam.hosts:
        if (known := exam.facts.get(host.name)) is None or exam.omp <= 1:
            continue
        if (wanted := exam.omp * host.slots) > known.cores:
            has = f"OMP_NUM_THREADS={exam.omp} in {count(host.slots, 'rank')}: {wanted} threads share"
            fix = f"--launch.env.OMP_NUM_THREADS={max(1, known.cores // host.slots)} is faster"
            yield Finding("warning", f"{has} {count(known.cores, 'core')}; {fix}", host.name)
        else:
            yield Finding("note", f"OMP_NUM_THREADS={exam.omp}", host.name)


def clock(exam: Examination) -> Iterator[Finding]:
    """Clocks agree, because the first of several failures is found by its time."""
    for host, seconds in exam.skew.items():
        if abs(seconds) > _SKEW_S:
            text = f"its clock is {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}; run chrony or ntpd there"
            yield Finding("error" if abs(seconds) > _FAR_S else "warning", text, host)


def shm(exam: Examination) -> Iterator[Finding]:
    """Enough space in /dev/shm, through which processes of a host exchange data."""
    for host, known in exam.facts.items():
        fix = "in a container: --shm-size=1g (Kubernetes: launch.k8s.shm); else mount -o remount,size=1G /dev/shm"
        size = f"/dev/shm has {amount(known.shm_free)} free of {amount(known.shm_size)}"
        if known.shm_free < _SHM:
            yield Finding("error", f"{size}; remove what fills it, or {fix}", host)
        elif known.shm_size < _SHM_SMALL:
            yield Finding("warning", f"{size}; {fix}", host)


def limits(exam: Examination) -> Iterator[Finding]:
    """Limits (ulimit) on open files, threads and pinned memory."""
    ranks = sum(host.slots for host in exam.hosts)
    for host in exam.hosts:
        if (known := exam.facts.get(host.name)) is None:
            continue
        files = _FILES + _FILES_PER_RANK * ranks
        if 0 <= (limit := known.limits["nofile"]) < files:
            level: Literal["error", "warning"] = "error" if limit < _FILES // 4 else "warning"
            yield Finding(level, f"ulimit -n is {limit}, {count(ranks, 'rank')} may open {files} files; raise it in "
                          "/etc/security/limits.conf", host.name)  # fmt: skip
        threads = known.threads + host.slots * _THREADS + known.cores
        if 0 <= (limit := known.limits["nproc"]) < threads:
            yield Finding("warning", f"ulimit -u is {limit}, {count(host.slots, 'rank')} with what runs need {threads} "
                          "threads; raise it in /etc/security/limits.conf", host.name)  # fmt: skip
        if known.rdma and known.limits["memlock"] != -1:
            yield Finding("warning", f"ulimit -l is {amount(known.limits['memlock'])}, but its RDMA network pins "
                          "memory; set it to unlimited in /etc/security/limits.conf", host.name)  # fmt: skip


def folder(exam: Examination) -> Iterator[Finding]:
    """The run folder is shared: every host sees the same files and can write."""
    if exam.unusable:
        yield Finding("error", f"{exam.folder} cannot be used: {exam.unusable}; choose another run.dir")
    for host, known in exam.facts.items():
        trouble = known.folder or (
            "" if host in exam.seen else "is not the same folder: what it writes is not seen here"
        )
        if trouble:
            fix = "let the user write there" if "cannot be used" in trouble else "put it on a file system all share"
            yield Finding("error", f"{exam.folder} {trouble}; {fix} (run.dir)", host)


def disk(exam: Examination) -> Iterator[Finding]:
    """Enough disk space for the checkpoints that are kept and the one being written."""
    all_of_them = (exam.keep + 1) * exam.checkpoint
    has = f"{exam.folder} has {amount(exam.free)} free"
    if exam.checkpoint and exam.free < all_of_them:
        level: Literal["error", "warning"] = "error" if exam.free < exam.checkpoint else "warning"
        needs = f"a checkpoint takes {amount(exam.checkpoint)}, {exam.keep} kept and one being written "
        yield Finding(level, f"{has}; {needs}{amount(all_of_them)}; make room, or set run.dir or checkpoint.keep")
    else:
        takes = f"; a checkpoint takes {amount(exam.checkpoint)}" if exam.checkpoint else ""
        yield Finding("note", has + takes)


def port(exam: Examination) -> Iterator[Finding]:
    """The rendezvous port is free."""
    if exam.port:
        yield Finding("error", exam.port, exam.hosts[0].name)


def links(exam: Examination) -> Iterator[Finding]:
    """Every host can connect to every other one, at any port, since ranks listen on arbitrary ports."""
    for (host, other), said in exam.links.items():
        if said:
            fix = "look at cable, routes and firewall between them: training needs all TCP ports"
            yield Finding("error", f"cannot connect to {other}: {said}; {fix}", host)


def bandwidth(exam: Examination) -> Iterator[Finding]:
    """An all-reduce among the hosts is about as fast as their links allow."""
    if isinstance(exam.reduced, str):
        fix = "; is it the interface ({} and {}), or torch itself? NCCL_DEBUG=INFO tells more".format(
            *network.VARIABLES
        )
        yield Finding("error", exam.reduced + fix) if exam.failed else Finding("note", exam.reduced)
        return
    for a, b, speed in exam.reduced["pairs"]:
        least, because = expected(exam, a, b)
        pair = f"{exam.hosts[a].name} and {exam.hosts[b].name}" if len(exam.hosts) > 1 else "two ranks"
        text = f"{pair}: {speed / 1e9:.2f} GB/s"
        if speed < least:
            text += f", expected {least / 1e9:.2f}: {because}"
            yield Finding("warning", f"{text}; look at the interface, its cable, and who else uses the link")
        else:
            yield Finding(
                "note", f"{text} ({f'at least {least / 1e9:.2f} expected' if least else 'no expectation'}: {because})"
            )
    together = f"{exam.reduced['all'] / 1e9:.2f} GB/s, 4 bytes in {exam.reduced['latency'] * 1e3:.2f} ms"
    yield Finding("note", f"all: {together}, {exam.reduced['backend']}")


def expected(exam: Examination, a: int, b: int) -> tuple[float, str]:
    """The least bandwidth to expect between two hosts, in bytes a second, and why."""
    if len(exam.hosts) == 1:
        return _LOOPBACK, "through this machine's memory"
    ends = [(exam.hosts[a], exam.hosts[b]), (exam.hosts[b], exam.hosts[a])]
    through = [(exam.facts[x.name], exam.facts[x.name].peers.get(y.address, Peer()).interface) for x, y in ends]
    speeds = [known.speeds.get(name, 0) for known, name in through]
    if not all(speeds):
        return 0.0, f"the driver of {through[speeds.index(0)][1] or 'the interface'} reports no speed"
    gloo, link = not isinstance(exam.reduced, str) and exam.reduced["backend"] == "gloo", min(speeds)
    used, cap = (_GLOO_MBITS, " of what gloo can use") if gloo and link > _GLOO_MBITS else (link, "")
    return _SHARE * used * 1e6 / 8, f"a fifth{cap} of a link of {link / 1000:g} Gbit/s"


# Name: exit code if it fails, function.
CHECKS: dict[str, tuple[int, Check]] = {
    "ssh": (PEER_LOST, ssh),
    "names": (PEER_LOST, names),
    "interface": (PEER_LOST, interface),
    "versions": (USAGE, versions),
    "devices": (USAGE, devices),
    "threads": (USAGE, threads),
    "clock": (USAGE, clock),
    "shm": (USAGE, shm),
    "limits": (USAGE, limits),
    "folder": (STORAGE, folder),
    "disk": (STORAGE, disk),
    "port": (USAGE, port),
    "links": (PEER_LOST, links),
    "bandwidth": (PEER_LOST, bandwidth),
}


def examine(exam: Examination, names: Sequence[str] = tuple(CHECKS)) -> dict[str, list[Finding]]:
    """The findings of the checks in ``names``."""
    return {name: list(CHECKS[name][1](exam)) for name in names}
