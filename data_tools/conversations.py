"""Conversations: reads the formats of instruction data and turns each into messages with roles.

A null field counts as absent, because exports write null where another line has the field. Every other field is used,
refused by name or, if it does not affect what is trained on, returned as unused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron_lite.data.messages import (
    LOSS_MARKS,
    MEDIA,
    WEIGHTS,
    Calls,
    decoded,
    kind,
    present,
    read_message,
    text_field,
)


class Conversation(NamedTuple):
    """Messages, and the other inputs of the chat template (``given``).

    ``plain``: a prompt and its completion, without a template. ``untrained``: indices of messages that the data
    excludes from training. ``prompt``: the number of messages before the completion that is trained on. ``unused``:
    keys that have no meaning here.
    """

    messages: list[dict[str, Any]]
    given: Mapping[str, Any] = MappingProxyType({})
    plain: bool = False
    untrained: frozenset[int] = frozenset()
    prompt: int = 0
    unused: tuple[str, ...] = ()


_PREFERENCES = ("chosen", "rejected", "preferred_output", "non_preferred_output", "kto_tag")
_BESIDE = ("system", "tools", "functions", "chat_template_kwargs")  # allowed beside the messages in every format
_UNREAD = ("system_prompt", "system_message", "documents", "context", "query")  # content that must not be lost
_TEMPLATE_ARGUMENTS = (  # not allowed in chat_template_kwargs
    *("messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
)


def _list(found: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Read a non-empty list of objects. Raises ValueError for anything else."""
    value = found[key]
    if not isinstance(value, list):
        raise ValueError(f"{json.dumps(key)} is {kind(value)}, expected a list")
    if not value:
        raise ValueError(f"{json.dumps(key)} is empty")
    for i, each in enumerate(value, 1):
        if not isinstance(each, dict):
            raise ValueError(f"message {i} is {kind(each)}, expected an object")
    return value


def _tools(found: dict[str, Any], wrap: bool) -> list[dict[str, Any]]:
    """The tools of a line, a list or its JSON text. ``wrap``: put bare functions into OpenAI's tool objects."""
    if found.get("tools") and found.get("functions"):
        raise ValueError('"tools" and "functions" are both given')
    key = "functions" if found.get("functions") else "tools"
    listed = decoded(found.get(key, []), json.dumps(key), [])
    if not isinstance(listed, list):
        raise ValueError(f"{json.dumps(key)} is {kind(listed)}, expected a list")
    tools = [decoded(tool, json.dumps(key), None) for tool in listed]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{json.dumps(key)}: a tool is not an object")
    wrap = wrap or key == "functions"
    return [{"type": "function", "function": tool} if wrap and "name" in tool else tool for tool in tools]


def _given(found: dict[str, Any], wrap: bool = False) -> dict[str, Any]:
    """The inputs of the template besides the messages."""
    more = decoded(found.get("chat_template_kwargs", {}), '"chat_template_kwargs"', {})
    if not isinstance(more, dict):
        raise ValueError(f'"chat_template_kwargs" is {kind(more)}, expected an object')
    for key in _TEMPLATE_ARGUMENTS:
        if key in more:
            raise ValueError(f'"chat_template_kwargs": {json.dumps(key)} cannot be given by a line')
    tools = _tools(found, wrap)
    return {**more, **({"tools": tools} if tools else {})}


def _turns(key: str, wrap: bool) -> Callable[[dict[str, Any], Calls], Conversation]:
    """A reader for formats that list their messages under ``key``."""

    def read(found: dict[str, Any], calls: Calls) -> Conversation:
        read = [read_message(message, f"message {i}: ", calls) for i, message in enumerate(_list(found, key), 1)]
        system, first = text_field(found, "system", ""), read[0][0]
        if system and first["role"] != "system":
            read.insert(0, ({"role": "system", "content": system}, True))
        elif system and first["content"] != system:
            raise ValueError('"system" is not what the first message, of role system, says')
        untrained = frozenset(i for i, (_, trained) in enumerate(read) if not trained)
        return Conversation([message for message, _ in read], _given(found, wrap), untrained=untrained)

    return read


def _alpaca(found: dict[str, Any], _: Calls) -> Conversation:
    system, more = text_field(found, "system", ""), text_field(found, "input", "")
    question = "\n\n".join(filter(None, (text_field(found, "instruction"), more)))
    messages = [{"role": "system", "content": system}] if system else []
    history = found.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError('"history": expected pairs of texts, a question and its answer')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = {"role": "assistant", "content": text_field(found, "output")}
    return Conversation([*messages, {"role": "user", "content": question}, answer], _given(found, wrap=True))


def _completion(found: dict[str, Any], calls: Calls) -> Conversation:
    if isinstance(found["prompt"], list):
        whole = _turns("both", wrap=False)(
            {**found, "both": [*_list(found, "prompt"), *_list(found, "completion")]}, calls
        )
        return whole._replace(prompt=len(whole.messages) - len(found["completion"]))
    if found.get("system"):
        raise ValueError('"system" has no place beside a prompt and completion that are texts')
    texts = text_field(found, "prompt"), text_field(found, "completion")
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    return Conversation(messages, _given(found), plain=True)


class Format(NamedTuple):
    """A format. ``keys``: those that identify it; ``more``: others that it may have."""

    keys: tuple[str, ...]
    read: Callable[[dict[str, Any], Calls], Conversation]
    more: tuple[str, ...] = _BESIDE


FORMATS = {
    "messages": Format(("messages",), _turns("messages", wrap=False)),
    "sharegpt": Format(("conversations",), _turns("conversations", wrap=True)),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "history", *_BESIDE)),
    "completion": Format(("prompt", "completion"), _completion),
}


def conversation(found: dict[str, Any], form: str = "auto", calls: Calls = "objects") -> Conversation:
    """Read the conversation in one object; format "auto" is recognised by its keys. Raises ValueError with the reason.

    ``calls``: how the chat template takes tool calls (``ChatTemplate.calls``). If it takes none, function calls in
    ShareGPT's format stay text.
    """
    found = present(found)
    preferences = [key for key in _PREFERENCES if key in found]
    if isinstance(found.get("label"), bool):
        preferences.append("label")
    if preferences:
        names = ", ".join(map(json.dumps, preferences))
        raise ValueError(f"{names}: preference data, which is not trained on; keep only conversations to imitate")
    for key in MEDIA:
        if found.get(key):
            raise ValueError(f"{json.dumps(key)} is not read: only text is trained on")
    for key in (*LOSS_MARKS, *WEIGHTS):
        if key in found:
            raise ValueError(f'"{key}" is not read on a line; "weight" 0 or "train" false in a message holds it back')
    for key in _UNREAD:
        if found.get(key):
            better = '"system" is' if key.startswith("system") else "what the model is to see stands in the messages"
            raise ValueError(f'"{key}" is not read; {better}')
    fits = [name for name, each in FORMATS.items() if all(key in found for key in each.keys)]
    if form == "auto" and len(fits) == 1:
        form = fits[0]
    if form not in fits:
        wanted = (FORMATS[form],) if form in FORMATS else FORMATS.values()
        keys = "; or ".join(" and ".join(json.dumps(key) for key in each.keys) for each in wanted)
        has = ", ".join(json.dumps(key) for key in list(found)[:8]) or "none"
        many = f"{' and '.join(fits)} both fit (--format)" if len(fits) > 1 and form == "auto" else f"expected {keys}"
        raise ValueError(f"{many}; its keys are: {has}")
    read = {*FORMATS[form].keys, *FORMATS[form].more}
    unused = tuple(key for key, value in found.items() if key not in read and value not in ("", [], {}))
    return FORMATS[form].read(found, calls)._replace(unused=unused)
