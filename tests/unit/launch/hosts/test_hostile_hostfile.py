"""Whatever a hostfile, a filter or a variable says, nothing of it is run or taken for an option.

``ssh`` is a stand-in that does what a server does with what it is sent: it hands one string to a shell.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from launch.doctor.contacts import Contacts
from launch.doctor.facts import Facts
from launch.hosts.hostfile import Host
from launch.hosts.job import Job, Ssh
from launch.hosts.ssh import over_ssh
from tests.kit.jobs import PYTHON, REPOSITORY, Result, run_job
from tests.kit.tiny import tiny_config

SSH = """#!/bin/sh
printf '%s\\0' "$@" >> "$SSH_CALLS"
for last; do :; done
exec sh -c "$last"
"""
RECORD = "import json, os, sys; json.dump([sys.argv[2:], dict(os.environ), os.getcwd()], open(sys.argv[1], 'w'))"
CANARY = "touch canary"
LINES = {  # a line of a hostfile, and what is said of it
    f"-oProxyCommand={CANARY} slots=1": "is not a host name",
    f"-oProxyCommand={CANARY.replace(' ', '${IFS}')} slots=1": "is not a host name",
    "-G slots=1": "is not a host name",
    "--help slots=1": "is not a host name",
    "node1;touch${IFS}canary slots=1": "is not a host name",
    "$(touch${IFS}canary) slots=1": "is not a host name",
    "`touch${IFS}canary` slots=1": "is not a host name",
    "node1|canary slots=1": "is not a host name",
    "node1&& slots=1": "is not a host name",
    "-x@node1 slots=1": "is not a host name",
    "user@-oProxyCommand=x slots=1": "is not a host name",
    "../node1 slots=1": "is not a host name",
    "nöde slots=1": "is not a host name",
    "node\u200b1 slots=1": "is not a host name",
    "node1\x07 slots=1": "is not a host name",
    f"{'n' * 300} slots=1": "is not a host name",
    "node1": "expected 'HOST slots=N'",
    "node1 slots = 2": "expected 'HOST slots=N'",
    "node1 slots=1 $(touch canary)": "expected 'HOST slots=N'",
    "node1 max_slots=1": "expected 'HOST slots=N'",
    "node1 slots=": "expected a whole number from 1 to 1024",
    "node1 slots=0": "expected a whole number from 1 to 1024",
    "node1 slots=-1": "expected a whole number from 1 to 1024",
    "node1 slots=1e9": "expected a whole number from 1 to 1024",
    "node1 slots=1000000000": "expected a whole number from 1 to 1024",
    "node1 slots=99999999999999999999999999": "expected a whole number from 1 to 1024",
    "node1 slots=٣": "expected a whole number from 1 to 1024",
    "node1 slots=0x10": "expected a whole number from 1 to 1024",
    "twice slots=2": "twice is listed twice",
}
COMMANDS = ("run", "plan", "doctor")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the stand-in on PATH; the file to which it adds the arguments of each call, an empty line after each."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path / "calls"


def launch(folder: Path, command: str, *flags: str) -> Result:
    argv = [PYTHON, "-m", "launch", command, str(tiny_config(folder, folder / "data")), *flags]
    result = run_job(argv, timeout=30, cwd=folder)
    assert not (folder / "canary").exists()
    assert not (folder / "run").exists()
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_every_bad_line_is_named_and_nothing_is_started(calls: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "hosts").write_text("\n".join(["twice slots=1", *LINES]), encoding="utf-8")
    result = launch(tmp_path, command, "--hostfile=hosts").expect(exit_code=2, stdout="^$", within=5)
    said = result.stderr.splitlines()
    assert len(said) == len(LINES)
    for number, (line, message) in enumerate(zip(said, LINES.values(), strict=True), 2):
        assert line.startswith(f"error: hosts:{number}: ")
        assert message in line
    assert not calls.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--hostfile=hosts: no such file"),
        (b"", "hosts lists no host"),
        (b"# node1 slots=1\n\n", "hosts lists no host"),
        (b"\xff\xfe slots=1\n", "cannot read the hostfile hosts: "),
        (b"node1 slots=1\0\n", "hosts:1: slots=1\0: expected a whole number"),
        (b"x" * 2_000_000, "hosts is over 1 MB: not a hostfile"),
    ],
    ids=["missing", "empty", "comments", "not text", "a NUL", "2 MB"],
)
def test_a_file_that_is_no_hostfile_is_an_error(
    calls: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "hosts").write_bytes(content)
    result = launch(tmp_path, "run", "--hostfile=hosts").expect(exit_code=2)
    assert result.stderr.startswith(f"error: {message}")
    assert not calls.exists()


@pytest.mark.parametrize(
    "flag",
    [
        "--include=$(touch canary)",
        "--include=node1:0;touch canary",
        "--exclude=-oProxyCommand=touch canary",
        "--rdzv=$(touch canary):1",
        "--rdzv=-oProxyCommand=x:1",
        "--rdzv=node1:99999999",
        "--rdzv=",
        "--nodes=1;touch canary",
    ],
)
def test_hostile_flags_are_refused(calls: Path, tmp_path: Path, flag: str) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    result = launch(tmp_path, "plan", "--hostfile=hosts", flag).expect(exit_code=2, stdout="^$")
    assert result.stderr.startswith(f"error: {flag}")
    assert not calls.exists()


def test_line_ends_of_windows_are_line_ends(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"# ours\r\nnode1 slots=1\r\nroot@node2\tslots=1  # second\r\n")
    result = launch(tmp_path, "plan", "--hostfile=hosts", "--via=torchrun").expect(exit_code=0)
    assert "\r" not in result.stdout
    assert " -- root@node2 " in result.stdout
    assert not calls.exists()


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["", " ", "-oProxyCommand=touch canary", "$(touch canary)", "`touch canary`", ";touch canary", "'", '"', "\\", "\n"]
)


@pytest.fixture
def odd_place(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory whose name is a trap."""
    place = tmp_path / "a 'b' \"c\" $(touch canary);\n`touch canary` é"
    (place / "run" / "logs").mkdir(parents=True)
    (place / "run" / "logs" / "launcher.lock").touch()
    monkeypatch.chdir(place)
    return place


def test_arguments_and_variables_cross_ssh_unchanged(calls: Path, odd_place: Path) -> None:
    record, host, options = odd_place / "record", Host("root@node1", 1), ("SetEnv=A='b c'", "ProxyCommand=$(x) %h")
    job = Job(("x",), (host,), odd_place / "run", ssh=Ssh(2222, options))

    @settings(max_examples=8, phases=[Phase.generate])  # each costs two processes: no shrinking
    @given(st.lists(TEXT, max_size=30), st.lists(TEXT, max_size=30))
    def crosses(words: list[str], values: list[str]) -> None:
        variables = {"TOKEN": "secret-4711"} | {f"V{number}": value for number, value in enumerate(values)}
        command = over_ssh(job, host, [PYTHON, "-c", RECORD, str(record), *words], variables)
        with subprocess.Popen(command.argv, stdin=subprocess.PIPE) as ssh:
            assert ssh.stdin and command.stdin
            ssh.stdin.write(command.stdin.encode())
            ssh.stdin.flush()
            assert ssh.wait(timeout=30) == 0
        argv, environ, place = json.loads(record.read_text())
        assert argv == words
        assert {name: environ.get(name) for name in variables} == variables
        assert place == str(odd_place)
        assert "secret-4711" not in " ".join(command.argv)  # which everybody on the machine can read

    crosses()
    sent = calls.read_text().split("\0")
    assert sent[: len(options)] == [f"-o{option}" for option in options]
    end = sent.index("--")
    assert all(word.startswith("-") or word == sent[sent.index("-E") + 1] for word in sent[:end])
    assert sent[end + 1] == "root@node1"
    assert not list(odd_place.rglob("canary"))


def test_the_doctor_asks_from_an_odd_place(calls: Path, odd_place: Path) -> None:
    host, secret = Host("node1", 1), "$(touch canary)'\"\n"
    (odd_place / "marker").write_text(secret)
    contacts = Contacts((host,), Ssh(), 30)
    try:
        about = {"folder": str(odd_place), "secret": secret, "own": "; touch canary", "visible": None}
        answer = contacts.ask(lambda _: {"ask": "facts", "names": ["$(touch canary)"], **about}, "itself")["node1"]
    finally:
        contacts.close()
    facts = Facts(**answer)
    assert (facts.folder, facts.peers["$(touch canary)"]["addresses"]) == ("", [])  # type: ignore[index]
    assert (odd_place / "; touch canary").read_text() == secret
    assert not list(odd_place.rglob("canary"))
