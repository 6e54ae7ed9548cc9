"""Command lines: plain functions become commands through ``fire``, with values taken as typed.

fire alone guesses types (``1e5`` becomes a float, ``a,b`` a tuple) and reports an unknown flag only after the command
has run. Here every value stays a string until the command's annotations convert it, and every flag is checked before
anything runs. Only the standard library and fire are imported, so a mistake costs milliseconds.
"""

from __future__ import annotations

import difflib
import errno
import gc
import inspect
import os
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_lite.errors import ConfigError, MegatronLiteError, StorageError

Command = Callable[..., Any]
Commands = Mapping[str, "Command | Commands"]  # a group of commands is a command, too
_BOOLEANS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
_PLAIN = re.compile(r"([^-].*)|--(\w[\w.-]*)=(.*)", re.ASCII | re.DOTALL)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``known``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def of_the_hub(name: str) -> str:
    """A hint how to download a missing path that may be a Hugging Face hub name, or an empty string."""
    here = Path(name).exists() or ("/" in name and Path(name).parent.exists())
    if here or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(?<!\.json)(?<!\.model)", name, re.ASCII):
        return ""
    return f"; nothing is downloaded here; from the hub: hf download {name} --local-dir DIR"


def several(count: int, noun: str) -> str:
    """``1 document``, ``2,000 documents``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def convert(name: str, text: str, annotation: Any) -> Any:
    """Read ``text`` as ``annotation``: ``str``, ``int``, ``float``, ``bool`` or one of these ``| None`` (``auto``)."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(None) in options and text.lower() in ("none", "null", "auto"):
        return None
    for option in options:
        if option is bool:
            if text.lower() in _BOOLEANS:
                return _BOOLEANS[text.lower()]
        elif option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        elif option is str:
            return text
    wanted = " or ".join(option.__name__ for option in options if option is not type(None))
    if wanted == "bool":
        wanted = "true, false or auto" if type(None) in options else "true or false"
    raise ConfigError(f"--{name}={text}: expected {wanted}")


def parse_bytes(text: str, flag: str, least: int = 1) -> int:
    """Parse a size: ``256M``, ``5GB``, ``1.5G``, in powers of 1024. ``least``: the smallest allowed. Raises
    ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)I?B?", text.strip().upper())
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if size < least:
        above = f", and at least {least >> 20}M" if least > 1 else ""
        raise ConfigError(f"--{flag}={text}: expected a size such as 256M or 5G{above}")
    return size


def read_words(words: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments and flags as typed. Raises ConfigError for words that fire would drop."""
    names = Counter(word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--" != word)
    mistakes = [f"unexpected argument {word!r}; see --help" for word in words if word in ("-", "--")]
    mistakes += [f"--{name} is given twice" for name, count in names.items() if count > 1]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return split(words)


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

    fire.Fire(collect, command=list(words), name="arguments")
    return typed[0]


def bind(command: Command, args: tuple[str, ...], flags: Mapping[str, str]) -> tuple[list[Any], dict[str, Any]]:
    """Check and convert the words against the signature of ``command``; all mistakes are reported at once.

    A command that declares ``**overrides`` receives each flag with a dot in its name there, as an unconverted string.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = {n: p for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    required = [n for n, p in parameters.items() if p.default is p.empty]
    takes_overrides = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    overrides: dict[str, str] = {}

    if len(args) > len(required):
        word = args[len(required)]
        fix = f" (did you mean --{word}?)" if re.match(r"[\w.]+=", word) else "; see --help"
        mistakes.append(f"unexpected argument {word!r}{fix}")
    typed = list(zip(required, args, strict=False))
    for name, text in flags.items():
        if name in parameters:
            typed.append((name, text))
        elif takes_overrides and "." in name:
            overrides[name] = text
        else:
            hint, dotted = nearest(name, parameters), ""
            if takes_overrides:
                from megatron_lite.config.peers import meant  # imported only after a mistake

                hint, dotted = meant(name) or hint, "; config keys are written --section.key=value"
            mistakes.append(f"unknown flag --{name}{hint}{dotted}")
    for name, text in typed:
        if name in values:
            mistakes.append(f"{name} is given twice")
            continue
        try:
            values[name] = convert(name, text, parameters[name].annotation)
        except ConfigError as error:
            mistakes.append(str(error))
    given = {name for name, _ in typed}
    mistakes += [f"missing {name.upper()}; see --help" for name in required if name not in given]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return [], {**values, **overrides}


def usage(prog: str, name: str, command: Command) -> str:
    """The help text of one command: usage line, docstring, and flags with types and defaults."""
    signature = inspect.signature(command, eval_str=True)
    words, lines = [f"usage: python -m {prog} {name}"], []
    for key, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            words.append("[--section.key=value …]")
            continue
        kind = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        if parameter.default is parameter.empty:
            words.append(key.upper())
            lines.append(f"  {key.upper()} (or --{key}=…)  {kind}, required")
        else:
            lines.append(f"  --{key}=…  {kind}, default {parameter.default!r}")
    flags = ["", *lines] if lines else []
    return "\n".join([" ".join(words), "", inspect.getdoc(command) or "", *flags])


def fail(error: MegatronLiteError) -> NoReturn:
    """Print the error, one ``error:`` line for each line of its message, and exit with its exit code."""
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"error: {line}", file=sys.stderr)
    sys.stderr.flush()
    raise SystemExit(error.exit_code)


def _drop_unwritten() -> None:
    """Discard output that cannot be written: Python would try again at exit."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(commands: Commands, prog: str) -> None:
    """Run the command named in ``sys.argv``: parse, check, convert, call. Errors exit with their exit code.

    Writing to a closed pipe ends the command with 141, as SIGPIPE would.
    """
    gc.set_threshold(50_000, 20, 20)  # importing torch creates a million objects, none of them garbage
    try:
        _run(commands, prog, sys.argv[1:])
        print(end="", flush=True)
    except MegatronLiteError as error:
        fail(error)
    except BrokenPipeError:  # the reader of our output has closed the pipe
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(StorageError(f"{error.filename or 'standard output'}: {error.strerror}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        _drop_unwritten()
        gc.freeze()  # skip the interpreter's final garbage collections: with torch, they take half a second


def _run(commands: Commands, prog: str, argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        summaries = [f"  {name:<16} {_summary(command)}" for name, command in commands.items()]
        print("\n".join([f"usage: python -m {prog} COMMAND …", "", *summaries, "", "COMMAND --help tells more."]))
        return
    name, rest = argv[0], argv[1:]
    if name not in commands:
        known = ", ".join(commands)
        raise ConfigError(f"unknown command {name!r}{nearest(name, commands)}; there are: {known}")
    command = commands[name]
    if isinstance(command, Mapping):
        _run(command, f"{prog} {name}", rest)
    elif any(word in ("-h", "--help") for word in rest):
        print(usage(prog, name, command))
    else:
        _, values = bind(command, *read_words(rest))
        command(**values)


def _summary(command: Command | Commands) -> str:
    if isinstance(command, Mapping):
        return ", ".join(command)
    return (inspect.getdoc(command) or "").splitlines()[0]
