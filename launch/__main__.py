"""``python -m launch run CONFIG --nproc=2 [--section.key=value …]``: start a training run on this machine."""

from __future__ import annotations

import difflib
import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFn

from launch import LAUNCHERS
from launch.job import Job, rank_defaults
from launch.supervise import describe, say, supervise


class UsageError(Exception):
    """What was typed cannot be meant; one line for each mistake."""


def run(config: str, *, via: str, nproc: int, max_restarts: int, dry_run: bool, overrides: dict[str, str]) -> int:
    """Check the config, start the ranks, watch them to their end; returns the exit code for the shell."""
    flags = [f"--{key}={value}" for key, value in overrides.items()]
    # The config is megatron_lite's to judge. Its answer comes in well under a second and without torch.
    check = [sys.executable, "-m", "megatron_lite", "config", config, f"--ranks={nproc}", *flags]
    checked = subprocess.run(check, stdout=subprocess.PIPE, check=False)
    if checked.returncode:
        return checked.returncode if checked.returncode > 0 else 1
    settings = json.loads(checked.stdout)["run"]
    job = Job(
        program=(sys.executable, "-m", "megatron_lite", "train", config, *flags),
        nproc=nproc,
        run_dir=Path(settings["dir"]) / settings["name"],
        env={**rank_defaults(nproc, os.environ), "MLITE_JOB": f"{settings['name']}-{secrets.token_hex(4)}"},
        resume=() if "checkpoint.resume" in overrides else ("--checkpoint.resume=auto",),
    )
    launcher = LAUNCHERS[via]
    if dry_run:
        print(describe(launcher(job)))
        return 0
    say(f"{settings['name']}: {nproc} ranks through {via}, logs in {job.log_dir}")
    outcome = supervise(job, launcher, max_restarts)
    if outcome.line:
        say(outcome.line)
    return outcome.exit_code


COMMANDS = {"run": run}
USAGE_TEXT = """\
usage: python -m launch run CONFIG [--nproc=N] [--via=NAME] [--max_restarts=N] [--dry_run] [--section.key=value …]

Start the training run that CONFIG (a YAML file) describes on this machine, and watch it to its end.

  --nproc=N           ranks to start (default 1)
  --via=NAME          what starts them: {launchers} (default torchrun)
  --max_restarts=N    start again from the last checkpoint when a rank is lost, up to N times (default 0)
  --dry_run           print what would be started, and start nothing
  --section.key=value override a key of CONFIG

Ctrl-C (or SIGTERM, SIGUSR1) lets the ranks finish their step and save; a second one ends them at once.
Exit codes: 0 done, 2 usage or config, 3 data, 4 checkpoint, 5 peer lost or hung, 6 non-finite loss, 7 disk or I/O,
75 preempted and saved: start it again. 128+N: ended by a second signal N, not saved."""


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(text)

    return convert


def _one_of(choices: Iterable[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(f"there is {', '.join(choices)}{_nearest(text, choices)}")
        return text

    return convert


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("expected true or false")
    return text.lower() == "true"


_FLAGS: dict[str, tuple[Callable[[str], Any], Any]] = {  # how to read each flag of `run`, and its default
    "nproc": (_whole(1, 1024), 1),
    "via": (_one_of(LAUNCHERS), "torchrun"),
    "max_restarts": (_whole(0, 1000), 0),
    "dry_run": (_switch, False),
}


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse(argv: list[str]) -> dict[str, Any]:
    """The arguments of ``run``; a flag with a dot in its name is a config override. UsageError lists all mistakes."""
    typed: list[tuple[tuple[str, ...], dict[str, str]]] = []

    @SetParseFn(str)
    def collect(*args: str, **flags: str) -> None:
        typed.append((args, flags))

    mistakes = [f"unexpected argument {word!r}" for word in argv if word in ("-", "--")]  # fire has uses for these
    names = Counter(word[2:].partition("=")[0].replace("-", "_") for word in argv if word[:2] == "--" != word)
    mistakes += [f"--{name} is given twice" for name, count in names.items() if count > 1]
    fire.Fire(collect, command=[word for word in argv if word not in ("-", "--")], name="launch run")
    args, flags = typed[0]
    arguments: dict[str, Any] = {name: default for name, (_, default) in _FLAGS.items()}
    arguments["overrides"] = {name: value for name, value in flags.items() if "." in name}
    for name, value in flags.items():
        if name in _FLAGS:
            try:
                arguments[name] = _FLAGS[name][0](value)
            except ValueError as error:
                mistakes.append(f"--{name}={value}: {error}")
        elif "." not in name:
            mistakes.append(
                f"unknown flag --{name}{_nearest(name, _FLAGS)}; config keys are written --section.key=value"
            )
    if len(args) != 1:
        mistakes.append(f"unexpected argument {args[1]!r}" if args else "missing CONFIG; see --help")
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return {"config": args[0], **arguments}


def main() -> int:
    """Entry point: 0, or the documented exit code after one ``error:`` line for each mistake."""
    name, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    try:
        if name in ("-h", "--help", "help") or {"-h", "--help"}.intersection(argv):
            print(USAGE_TEXT.format(launchers=", ".join(LAUNCHERS)))
            return 0
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}{_nearest(name, COMMANDS)}; there is: {', '.join(COMMANDS)}")
        if not sys.platform.startswith("linux"):
            raise UsageError("launch needs Linux; start the ranks yourself: torchrun -m megatron_lite train …")
        return COMMANDS[name](**parse(argv))
    except UsageError as error:
        for line in str(error).splitlines():
            say(f"error: {line}")
        return 2
    except KeyboardInterrupt:  # before anything was started
        return 130


if __name__ == "__main__":
    sys.exit(main())
