"""Fault injection for tests of recovery.

Faults come from one environment variable (``distributed/env.py``) as ``kind:key=value:…``, separated by ``;``::

    kill:rank=1:step=7:phase=bwd ; enospc:step=100:op=3 ; sleep:rank=0:seconds=0.2

Kinds: kill (SIGKILL), stop (SIGSTOP), term (SIGTERM), sleep, raise, nan (poisons the loss), enospc (the disk is full).
``phase`` is fwd, bwd, optim, save or copy (the first part of a background save); ``op`` the n-th file operation of a
save, from 1; ``attempt`` the number of the restart (default 0, the first start). Other keys match everything if they
are left out; a fault with a ``step`` strikes once.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lite.errors import ConfigError

KINDS = ("kill", "stop", "term", "sleep", "raise", "nan", "enospc")
PHASES = ("fwd", "bwd", "optim", "save", "copy")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_KEYS: Mapping[str, Any] = {"rank": int, "step": int, "phase": str, "op": int, "seconds": float, "attempt": int}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong; ``None`` matches any."""

    kind: str
    rank: int | None = None
    step: int | None = None
    phase: str | None = None
    op: int | None = None
    seconds: float = 1.0
    attempt: int = 0


class Faults:
    """The faults of one process. Every method returns at once when there are none."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._faults = list(faults)
        self._save_step = self._operations = 0

    @classmethod
    def none(cls) -> Faults:
        """No faults."""
        return cls()

    @classmethod
    def parse(cls, text: str, rank: int = 0, attempt: int = 0) -> Faults:
        """The faults in ``text`` that are meant for this rank and this attempt. Raises ConfigError for bad grammar."""
        faults = [_parse(part.strip()) for part in text.split(";") if part.strip()]
        return cls(fault for fault in faults if fault.rank in (None, rank) and fault.attempt == attempt)

    def at(self, phase: str, step: int) -> None:
        """Called when a phase of a step begins; ``save`` also resets the count of file operations."""
        if phase == "save":
            self._save_step, self._operations = step, 0
        for fault in self._faults[:]:
            if fault.op is None and fault.kind != "nan" and fault.phase in (None, phase):
                self._strike(fault, step, phase)

    def file_operation(self, name: str) -> None:
        """Called before a save writes, fsyncs, renames or replaces ``name``."""
        self._operations += 1
        for fault in self._faults[:]:
            if fault.op == self._operations:
                self._strike(fault, self._save_step, name)

    def poison(self, loss: Any, step: int) -> Any:
        """``loss`` itself, or NaN with the same graph if a ``nan`` fault strikes."""
        for fault in self._faults[:]:
            if fault.kind == "nan" and fault.step in (None, step):
                self._use_up(fault)
                return loss * float("nan")
        return loss

    def _strike(self, fault: Fault, step: int, where: str) -> None:
        if fault.step not in (None, step):
            return
        self._use_up(fault)
        if fault.kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.kind])
        elif fault.kind == "sleep":
            time.sleep(fault.seconds)
        elif fault.kind == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
        else:
            raise RuntimeError(f"injected fault at step {step}, {where}")

    def _use_up(self, fault: Fault) -> None:
        if fault.step is not None:
            self._faults.remove(fault)


def _parse(text: str) -> Fault:
    kind, *settings = text.split(":")
    values: dict[str, Any] = {}
    if kind not in KINDS:
        raise ConfigError(f"fault {text!r}: unknown kind {kind!r}, allowed: {', '.join(KINDS)}")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in _KEYS or not equals or key in values:
            raise ConfigError(f"fault {text!r}: {setting!r} is not one of {'=, '.join(_KEYS)}=, each at most once")
        try:
            values[key] = _KEYS[key](value)
        except ValueError:
            raise ConfigError(f"fault {text!r}: {key} must be a number") from None
        if key != "phase" and not 0 <= values[key] < 1 << 31:
            raise ConfigError(f"fault {text!r}: {key} must not be negative")
    fault = Fault(kind, **values)
    if fault.phase not in (None, *PHASES):
        raise ConfigError(f"fault {text!r}: unknown phase {fault.phase!r}, allowed: {', '.join(PHASES)}")
    if fault.op == 0 or (kind == "enospc" and fault.op is None):
        raise ConfigError(f"fault {text!r}: op=N names the file operation, from 1")
    if kind == "nan" and (fault.op or fault.phase):
        raise ConfigError(f"fault {text!r}: nan takes rank, step and attempt only")
    return fault
