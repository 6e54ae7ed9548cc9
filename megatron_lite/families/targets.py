"""Names of a model's linears for users, and patterns that select some of them. No torch.

The model fuses q, k and v, and gate and up; here each has its own name: ``blocks.3.attention.q``.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from megatron_lite import cli
from megatron_lite.families.family import linears

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig

ENDS = ("embedding", "head")


def linear_names(model: ModelConfig) -> list[str]:
    """The names of all linears that can be adapted, in order, with the embedding and the head."""
    inside = [f"{linear.half}.{part}" for linear in linears(model) for part in linear.parts]
    return ["embedding", *(f"blocks.{i}.{name}" for i in range(model.num_layers) for name in inside), "head"]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern selects this linear: a short name (``q``), or a glob over full names (``blocks.[0-3].*``)."""
    return fnmatchcase(name, pattern) or ("." not in pattern and fnmatchcase(name.rpartition(".")[2], pattern))


def mistakes(key: str, patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """A line for each pattern that matches none of ``names``, with the closest existing names."""
    names = list(names)
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return [
        f"{key}: {pattern!r} matches no module{cli.nearest(pattern, [*short, *names])}; there are {', '.join(short)}, "
        f"or full names such as {names[len(names) // 2]!r}"
        for pattern in patterns
        if not any(matches(pattern, name) for name in names)
    ]


def summary(names: Iterable[str]) -> list[str]:
    """Names for the log, grouped by kind, with their blocks (``blocks.0-31 attention.q``)."""
    kinds: dict[str, list[int]] = {}
    for name in names:
        head, _, rest = name.partition(".")
        index, _, kind = rest.partition(".")
        kinds.setdefault(kind or head, []).extend([int(index)] if kind else [])
    return [f"blocks.{_ranges(blocks)} {kind}" if blocks else kind for kind, blocks in kinds.items()]


def _ranges(numbers: list[int]) -> str:
    """Increasing numbers as ranges: ``0-3,7``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
