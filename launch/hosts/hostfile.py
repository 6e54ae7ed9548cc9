"""Hostfiles, in DeepSpeed's format (``HOST slots=N`` a line), and its filters (``host1@host2:0,2``)."""

from __future__ import annotations

import difflib
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

MAX_SLOTS = 1024
# Names that ssh and schedulers accept; never an option, never a character that a shell interprets.
_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9]([A-Za-z0-9._:-]*[A-Za-z0-9])?")


class UsageError(Exception):
    """A mistake on the command line or in a hostfile; the message has one line for each mistake."""


@dataclass(frozen=True)
class Host:
    """One machine and the number of ranks it runs. ``devices``: its GPUs to use, if a filter chose some."""

    name: str
    slots: int
    devices: tuple[int, ...] | None = None

    @property
    def local(self) -> bool:
        """Whether it is this machine, judged by the name alone."""
        here = socket.gethostname()
        return self.name in ("localhost", "127.0.0.1", "::1", here, here.partition(".")[0])

    @property
    def address(self) -> str:
        """The name without ``user@``."""
        return self.name.rpartition("@")[2]


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s'[: number != 1]}"


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts listed in ``path``, in order. Raises UsageError with the line number of every mistake."""
    try:
        if path.stat().st_size > 1_000_000:
            raise UsageError(f"{path} is over 1 MB: not a hostfile")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the hostfile {path}: {getattr(error, 'strerror', error)}") from None
    hosts: dict[str, Host] = {}
    mistakes = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, slots = words[0], words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not check_name(name):
            mistakes.append(f"{path}:{number}: {name!r} is not a host name")
        elif len(words) != 2 or not words[1].startswith("slots="):
            mistakes.append(f"{path}:{number}: expected 'HOST slots=N', found {line.strip()!r}")
        elif not (slots.isascii() and slots.isdecimal() and 1 <= int(slots[:9]) <= MAX_SLOTS):
            mistakes.append(f"{path}:{number}: slots={slots}: expected a whole number from 1 to {MAX_SLOTS}")
        elif name in hosts:
            mistakes.append(f"{path}:{number}: {name} is listed twice; add its slots up in one line")
        else:
            hosts[name] = Host(name, int(slots))
    if not hosts and not mistakes:
        mistakes.append(f"{path} lists no host")
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return tuple(hosts.values())


def check_name(name: str) -> bool:
    """Whether ``name`` is a valid host name: letters, digits, ``.``, ``-``, ``_`` and ``:``, optionally ``user@``
    first."""
    return len(name) <= 255 and _NAME.fullmatch(name) is not None


def select(hosts: tuple[Host, ...], include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """The hosts and slots that remain after filtering, in the hostfile's order. Raises UsageError.

    A filter is ``HOST`` or ``HOST:SLOT,SLOT``; several are joined by ``@``. ``devices`` holds the remaining slots.
    """
    if include and exclude:
        raise UsageError("--include and --exclude are two ways to say the same: give one of them")
    slots = {host.address: set(range(host.slots)) for host in hosts}
    if include:
        named = _read_filter(slots, include, "include")
        slots = {name: named.get(name, set()) for name in slots}
    if exclude:
        gone = _read_filter(slots, exclude, "exclude")
        slots = {name: kept - gone.get(name, set()) for name, kept in slots.items()}
    found = []
    for host in hosts:
        left = slots[host.address]
        if len(left) == host.slots:
            found.append(host)
        elif left:
            found.append(replace(host, slots=len(left), devices=tuple(sorted(left))))
    if not found:
        raise UsageError("--include and --exclude leave no host")
    return tuple(found)


def _read_filter(slots: Mapping[str, set[int]], text: str, flag: str) -> dict[str, set[int]]:
    """The slots named by a filter, for each host."""
    found = {}
    for part in text.split("@"):
        name, _, listed = part.partition(":")
        if name not in slots:
            raise UsageError(f"--{flag}={text}: {name!r} is not in the hostfile{nearest(name, slots)}")
        known = {str(slot): slot for slot in slots[name]}
        chosen = listed.split(",") if listed else list(known)
        if unknown := [slot for slot in chosen if slot not in known]:
            raise UsageError(f"--{flag}={text}: {name} has slots 0 to {len(known) - 1}, not {unknown[0]!r}")
        found[name] = {known[slot] for slot in chosen}
    return found
