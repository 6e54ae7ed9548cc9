"""Hosts that do not answer, with a script for ssh."""

import os
from pathlib import Path

import pytest

from launch.doctor.contacts import Contacts
from launch.hosts.hostfile import Host
from launch.hosts.job import Ssh


def test_a_host_that_is_gone_before_it_is_asked_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\necho no way >&2\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    contacts = Contacts((Host("elsewhere", 1),), Ssh(), 5)
    os.waitid(os.P_PID, contacts.contacts[0]._child.pid, os.WEXITED | os.WNOWAIT)
    assert contacts.ask(lambda host: {"ask": "facts"}, "all") == {}
    assert contacts.silent == {"elsewhere": "no way"}
