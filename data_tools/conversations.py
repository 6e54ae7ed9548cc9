"""Conversations: the forms in which instruction data comes, each turned into messages with roles."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from data_tools.documents import kind
from megatron_lite.cli import nearest


class Conversation(NamedTuple):
    """Messages, and what else the chat template is given (``tools``). ``plain``: no template, a prompt and what
    completes it."""

    messages: list[dict[str, Any]]
    given: Mapping[str, Any] = MappingProxyType({})
    plain: bool = False


_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def _field(found: Mapping[str, Any], key: str, default: str | None = None, where: str = "") -> str:
    """A text. Raises ValueError for anything else."""
    value = found.get(key, default)
    if not isinstance(value, str):
        problem = f"is {kind(value)}, expected a string" if key in found else "is missing"
        raise ValueError(f"{where}{json.dumps(key)} {problem}")
    return value


def _list(found: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects, not empty. Raises ValueError for anything else."""
    value = found[key]
    if not isinstance(value, list):
        raise ValueError(f"{json.dumps(key)} is {kind(value)}, expected a list")
    if not value:
        raise ValueError(f"{json.dumps(key)} is empty")
    for i, each in enumerate(value, 1):
        if not isinstance(each, dict):
            raise ValueError(f"message {i} is {kind(each)}, expected an object")
    return value


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message of OpenAI's form, its content one text."""
    role, content = _field(message, "role", where=where), message.get("content")
    if not role:
        raise ValueError(f'{where}"role" is empty')
    if isinstance(content, list):  # parts
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError(f"{where}a part of its content is not text")
        content = "".join(_field(part, "text", where=where) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    return {**message, "role": role, "content": _field({**message, "content": content}, "content", where=where)}


def _chat(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_message(message, f"message {i}: ") for i, message in enumerate(found, 1)]


def _messages(found: dict[str, Any]) -> Conversation:
    return Conversation(_chat(_list(found, "messages")), {"tools": found["tools"]} if found.get("tools") else {})


def _sharegpt(found: dict[str, Any]) -> Conversation:
    system = _field(found, "system", "")
    messages = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(_list(found, "conversations"), 1):
        where = f"message {i}: "
        speaker = _field(message, "from", where=where)
        if speaker not in _SHAREGPT_ROLES:
            hint = nearest(speaker, _SHAREGPT_ROLES)
            raise ValueError(f'{where}"from" is {speaker!a}{hint}; known are {", ".join(_SHAREGPT_ROLES)}')
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": _field(message, "value", where=where)})
    return Conversation(messages)


def _alpaca(found: dict[str, Any]) -> Conversation:
    system, more = _field(found, "system", ""), _field(found, "input", "")
    question = _field(found, "instruction") + (f"\n\n{more}" if more else "")
    messages = [{"role": "system", "content": system}] if system else []
    for pair in found.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError('"history": expected pairs of texts, a question and its answer')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = {"role": "assistant", "content": _field(found, "output")}
    return Conversation([*messages, {"role": "user", "content": question}, answer])


def _completion(found: dict[str, Any]) -> Conversation:
    if isinstance(found["prompt"], list):
        return Conversation(_chat(_list(found, "prompt")) + _chat(_list(found, "completion")))
    prompt, completion = _field(found, "prompt"), _field(found, "completion")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Conversation(messages, plain=True)


class Format(NamedTuple):
    """A form by the keys that tell it."""

    keys: tuple[str, ...]
    read: Callable[[dict[str, Any]], Conversation]


FORMATS = {
    "messages": Format(("messages",), _messages),
    "sharegpt": Format(("conversations",), _sharegpt),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "completion": Format(("prompt", "completion"), _completion),
}


def conversation(found: dict[str, Any], form: str = "auto") -> Conversation:
    """The conversation in one object, in the form named, or told by its keys. Raises ValueError with what is wrong."""
    fits = [name for name, each in FORMATS.items() if all(key in found for key in each.keys)]
    if form == "auto" and len(fits) == 1:
        form = fits[0]
    if form not in fits:
        wanted = (FORMATS[form],) if form in FORMATS else FORMATS.values()
        keys = "; or ".join(" and ".join(json.dumps(key) for key in each.keys) for each in wanted)
        has = ", ".join(json.dumps(key) for key in list(found)[:8]) or "none"
        many = f"{' and '.join(fits)} both fit (--format)" if len(fits) > 1 and form == "auto" else f"expected {keys}"
        raise ValueError(f"{many}; its keys are: {has}")
    return FORMATS[form].read(found)
