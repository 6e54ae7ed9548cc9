"""Checkpoints that others wrote, as sources of ours: a format a file."""

from typing import Any


def __getattr__(name: str) -> Any:
    """What opens them lies above this package (``checkpoint/opening.py``); scripts know it by this place, too."""
    if name not in ("open_source", "open_adapter", "open_peft"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_lite.checkpoint import opening

    return getattr(opening, name)
