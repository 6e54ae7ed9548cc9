"""Requests to a model and its answers: one prompt, or a file of requests, each a line of JSON. No torch."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_lite.cli import nearest
from megatron_lite.data.messages import present, read_message
from megatron_lite.data.template import Message
from megatron_lite.errors import ConfigError, DataError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 do not restrict the distribution."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def mistakes(self) -> list[str]:
        """A line for each invalid number, with its valid range."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            found.append(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            found.append(f"top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p}: must be above 0 and at most 1 (off)")
        if not 0 <= self.seed < 1 << 64:
            found.append(f"seed={self.seed}: must be from 0 to 2**64 - 1")
        return found

    def check(self) -> None:
        """Raises ConfigError with every invalid number."""
        if found := self.mistakes():
            raise ConfigError("\n".join(f"--{mistake}" for mistake in found))


@dataclass(frozen=True)
class Request:
    """A text to be continued, or a conversation to be answered, by the model as it is or with one of its adapters.

    ``own``: its own values for fields of ``Sampling``, by name. In a file of requests, ``line`` is its line number, and
    ``id`` an optional name.
    """

    prompt: str | Sequence[Message]
    adapter: str | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = None
    id: str | int | None = None


class Answer(NamedTuple):
    """The result of a request: the text of the prompt and the text that continues it, the number of tokens produced,
    and whether an end token (``stop``) or a limit (``length``) ended it. Or the ``error``."""

    adapter: str | None = None
    prompt: str = ""
    text: str = ""
    num_tokens: int = 0
    finish_reason: Literal["stop", "length"] | None = None
    error: str | None = None

    def to_json(self, index: int, request: Request) -> str:
        """The answer to request number ``index``, as a line of JSON."""
        told = ("adapter", "text", "num_tokens", "finish_reason") if self.error is None else ("error",)
        named = {} if request.id is None else {"id": request.id}
        return json.dumps({"index": index, "line": request.line, **named, **{key: getattr(self, key) for key in told}})


_NUMBERS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}
_KEYS = ("prompt", "messages", "adapter", "id", *_NUMBERS)
_SHOWN = 20  # mistakes


def read_requests(path: Path, adapters: Collection[str] | None = None) -> list[Request]:
    """Read one JSON object per line: ``prompt`` or ``messages`` and optionally ``adapter``, ``id`` and numbers of
    ``Sampling``; blank lines are skipped. ``adapters``: the known names. Raises DataError naming every invalid line.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    found, mistakes = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(replace(_request(line, adapters), line=number))
            except (ValueError, RecursionError) as error:
                mistakes.append(f"{path}:{number}: {error}")
    if not found and not mistakes:
        mistakes = [f"{path} holds no requests"]
    if mistakes:
        more = [f"and {len(mistakes) - _SHOWN} lines more"] if len(mistakes) > _SHOWN else []
        raise DataError("\n".join([*mistakes[:_SHOWN], *more]))
    return found


def _request(line: bytes, adapters: Collection[str] | None) -> Request:
    """The request in a line. Raises ValueError."""
    tree = json.loads(line.decode(), object_pairs_hook=_once)
    if not isinstance(tree, dict):
        raise ValueError("expected an object with prompt or messages")
    if unknown := [key for key in tree if key not in _KEYS]:
        told = f"{unknown[0]!a:.100} is unknown{nearest(unknown[0], _KEYS)}"
        raise ValueError(f"expected an object with {', '.join(_KEYS)}; {told}")
    given = {key: value for key, value in tree.items() if value is not None}
    if ("prompt" in given) == ("messages" in given):
        raise ValueError("expected an object with prompt or messages, and not both")
    if not isinstance(given.get("prompt", ""), str) or not isinstance(given.get("adapter", ""), str):
        raise ValueError("prompt and adapter must be strings")
    if type(given.get("id", "")) not in (str, int):
        raise ValueError("id must be a string or a whole number")
    if "messages" in given:
        _check_messages(given["messages"])
    adapter = given.get("adapter")
    if adapter is not None and adapters is not None and adapter not in adapters:
        raise ValueError(f"no adapter {adapter!a:.100}{nearest(adapter, adapters)}; --adapters loads them by name")
    own: dict[str, Any] = {name: _number(name, given[name]) for name in _NUMBERS if name in given}
    if mistakes := Sampling(**own).mistakes():
        raise ValueError("; ".join(mistakes))
    return Request(given["prompt"] if "prompt" in given else given["messages"], adapter, own, id=given.get("id"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return found


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise ValueError("messages must be a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        read_message(present(message), f"message {number}: ", "objects")


def _number(name: str, value: Any) -> int | float:
    wanted = _NUMBERS[name]
    if type(value) is not int and (wanted is int or type(value) is not float):
        raise ValueError(f"{name} must be a {'whole ' if wanted is int else ''}number, not {value!a:.100}")
    try:
        return wanted(value)
    except OverflowError:
        return math.inf
