"""Asks many hosts questions at once, with a time limit for the answers; keeps the error of a host that fails."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launch import process
from launch.hosts.hostfile import Host
from launch.hosts.job import Ssh
from launch.hosts.ssh import check_program, here, ssh_argv
from launch.watch.report import last_words
from launch.watch.supervise import say


class Contact:
    """The connection to one host: ``launch/doctor/facts.py`` runs there; if it cannot start, ssh says why."""

    def __init__(self, host: Host, ssh: Ssh) -> None:
        self.host, self._heard = host, b""
        words = [*here(), "-m", "launch.doctor.facts"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._child = process.start(
            words if host.local else ssh_argv(host, words, ssh),
            unblock=(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert self._child.stdin and self._child.stdout
        self.stdin, self.stdout = self._child.stdin, self._child.stdout

    def ask(self, request: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # ``hear`` notices that it has ended
            self.stdin.write(json.dumps(request).encode() + b"\n")
            self.stdin.flush()

    def hear(self) -> dict[str, Any] | None:
        """Read what has arrived: an answer, or None (a login shell may print greetings). Raises EOFError at the end."""
        chunk = os.read(self.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        *lines, self._heard = (self._heard + chunk).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                if isinstance(answer := json.loads(line), dict):
                    return answer
        return None

    def last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1)
        self._errors.seek(0)
        said = self._errors.read()[-65536:]
        changed = "REMOTE HOST IDENTIFICATION HAS CHANGED: " if b"IDENTIFICATION HAS CHANGED" in said else ""
        return changed + (
            last_words(said).rstrip(".\r") or f"ended with exit code {self._child.poll()}, saying nothing"
        )

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # an unsent question is still in the buffer
            self.stdin.close()
        try:
            self._child.wait(2)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self.stdout.close()
        self._errors.close()


class Contacts:
    """All hosts that still answer. ``silent``: why the others do not. ``heard``: when each host answered last."""

    def __init__(self, hosts: tuple[Host, ...], ssh: Ssh, seconds: float) -> None:
        self.seconds = seconds
        self.silent: dict[str, str] = {}
        self.heard: dict[str, float] = {}
        if not all(host.local for host in hosts):
            check_program("ssh")
        self.contacts = [Contact(host, ssh) for host in hosts]

    def ask(self, request: Callable[[Host], Mapping[str, Any]], what: str) -> dict[str, dict[str, Any]]:
        """Ask all hosts at the same time; returns their answers in the order of the hosts."""
        deadline, answers = time.monotonic() + self.seconds, dict[str, dict[str, Any]]()
        waiting = {contact.stdout.fileno(): contact for contact in self.contacts}
        outputs = select.poll()
        for number, contact in waiting.items():
            outputs.register(number, select.POLLIN)
            contact.ask(request(contact.host))
        with progress(f"asking {what}") as show:
            while waiting and (left := deadline - time.monotonic()) > 0:
                show(f"waiting for {', '.join(contact.host.name for contact in waiting.values())[:60]}")
                for number, _ in outputs.poll(1000 * min(left, 0.5)):
                    contact = waiting[number]
                    try:
                        if (answer := contact.hear()) is None:
                            continue
                        answers[contact.host.name], self.heard[contact.host.name] = answer, time.time()
                    except EOFError:
                        self._lose(contact, contact.last_words())
                    del waiting[number]
                    outputs.unregister(number)
        for contact in waiting.values():
            self._lose(contact, f"timed out: no answer within {self.seconds:g} s to {what}")
        return {contact.host.name: answers[contact.host.name] for contact in self.contacts}

    def _lose(self, contact: Contact, why: str) -> None:
        self.silent[contact.host.name] = why
        self.contacts.remove(contact)
        contact.close()

    def close(self) -> None:
        for contact in self.contacts:
            contact.close()


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Print a line when something begins; on a terminal, a live status line that is removed at the end."""
    began, live = time.monotonic(), sys.stderr.isatty()
    if not live:
        say(f"doctor: {what}")

    def show(status: str) -> None:
        if live:
            print(f"\r\x1b[Kdoctor: {what}: {status}, {time.monotonic() - began:.0f} s", end="", file=sys.stderr)
            sys.stderr.flush()

    try:
        yield show
    finally:
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
