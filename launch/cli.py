"""Command lines of the launcher: all flags are checked before anything happens; each mistake is one line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.hosts.hostfile import UsageError, check_name, nearest

_PLAIN = re.compile(r"([^-].*)|--(\w[\w.-]*)=(.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Flag:
    """A flag ``--name=PLACEHOLDER``: the function that reads its text, its default, and a line of help."""

    read: Callable[[str], Any]
    default: Any
    placeholder: str
    help: str


def whole(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole numbers from ``low`` to ``high``."""

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 19 and low <= int(text) <= high):
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(text)

    return convert


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """A reader of one of the words in ``choices``."""

    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}{nearest(text, choices)}")
        return text

    return convert


def switch(text: str) -> bool:
    """true or false; a flag without a value is true."""
    if text.lower() not in ("true", "false"):
        raise ValueError("expected true or false")
    return text.lower() == "true"


def span(text: str) -> tuple[int, int]:
    """A number of nodes, ``4``, or a range, ``2:4`` (minimum:maximum)."""
    least, colon, most = text.partition(":")
    read = whole(1, 16384)
    pair = read(least), read(most if colon else least)
    if pair[0] > pair[1]:
        raise ValueError("expected MIN:MAX, the smaller number first")
    return pair


def endpoint(text: str) -> tuple[str, int]:
    """``HOST`` or ``HOST:PORT``; port 0 means: find a free one."""
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(\d{1,5}))?", text)
    if match is None or not check_name(match[1].strip("[]")) or not 0 <= int(match[2] or 0) < 65536:
        raise ValueError("expected HOST or HOST:PORT")
    return match[1].strip("[]"), int(match[2] or 0)


def shown(place: tuple[str, int]) -> str:
    """The inverse of ``endpoint``: ``HOST`` or ``HOST:PORT``."""
    host, port = place
    return (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")


def parse(
    words: Sequence[str],
    flags: Mapping[str, Flag],
    arguments: Sequence[str],
    *,
    overrides: bool = False,
    hints: Callable[[Sequence[str]], Mapping[str, str]] = lambda names: {},
) -> dict[str, Any]:
    """Arguments and flags by name. Raises UsageError, which lists all mistakes.

    ``arguments``: positional ones; ``[name]`` is optional. ``overrides``: accept flags with a dot in their name as
    config overrides. ``hints``: what to say about flags that this parser does not know but the config may.
    """
    mistakes = [f"unexpected argument {word!r}" for word in words if word in ("-", "--")]  # special to fire
    names = Counter(word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--" != word)
    mistakes += [f"--{name} is given twice" for name, count in names.items() if count > 1]
    args, given = split([word for word in words if word not in ("-", "--")])
    found: dict[str, Any] = {name: flag.default for name, flag in flags.items()}
    if overrides:
        found["overrides"] = {name: value for name, value in given.items() if "." in name}
    unknown = [name for name in given if name not in flags and not (overrides and "." in name)]
    hinted = hints(unknown) if overrides and unknown else {}
    for name, value in given.items():
        if name in flags:
            try:
                found[name] = flags[name].read(value)
            except ValueError as error:
                mistakes.append(f"--{name}={value}: {error}")
        elif name in unknown:
            dotted = "; config keys are written --section.key=value" if overrides else ""
            mistakes.append(f"unknown flag --{name}{hinted.get(name) or nearest(name, flags)}{dotted}")
    for word in args[len(arguments) :]:
        mistakes.append(f"unexpected argument {word!r}" + (f" (did you mean --{word}?)" if "=" in word else ""))
    mistakes += [f"missing {name.upper()}; see --help" for name in arguments[len(args) :] if name[0] != "["]
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return found | dict(zip((name.strip("[]") for name in arguments), args, strict=False))


def split(words: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Positional arguments, and flags by name, as fire parses them.

    If every word is a plain argument or ``--name=value``, fire is not needed; skipping its import saves a fifth of a
    short command's time.
    """
    plain = [_PLAIN.fullmatch(word) for word in words]
    if all(plain):
        found = [match.groups() for match in plain if match]
        return tuple(word for word, _, _ in found if word), {n.replace("-", "_"): v for _, n, v in found if n}
    import fire
    from fire.decorators import SetParseFn

    typed: list[tuple[tuple[str, ...], dict[str, str]]] = []

    @SetParseFn(str)
    def collect(*args: str, **flags: str) -> None:
        typed.append((args, flags))

    fire.Fire(collect, command=list(words), name="launch")
    return typed[0]


def usage(name: str, text: str, flags: Mapping[str, Flag], arguments: Sequence[str], *, overrides: bool) -> str:
    """The ``--help`` text of one command; ``text`` is its docstring."""
    line = " ".join([f"usage: python -m launch {name}", *(word.upper() for word in arguments), "[FLAGS]"])
    shown = [
        (f"--{key}" + (f"={flag.placeholder}" if flag.placeholder else ""), flag.help) for key, flag in flags.items()
    ]
    if overrides:
        line += " [--section.key=value …]"
        shown.append(("--section.key=value", "override a key of CONFIG"))
    wide = max((len(left) for left, _ in shown), default=0) + 2
    return "\n".join([line, "", text.strip(), "", *(f"  {left.ljust(wide)}{right}" for left, right in shown)])


def path(text: str) -> Path:
    """A file that exists."""
    if not Path(text).is_file():
        raise ValueError("no such file")
    return Path(text)
