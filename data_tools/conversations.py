"""Conversations: the forms in which instruction data comes, each turned into messages with roles.

A field that is null is absent: exports write null where another line has the field. Every field that has a value is
heeded, refused by name, or, where it says nothing about what is trained on, returned as unused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from data_tools.documents import decode, kind
from megatron_lite.cli import nearest

Calls = Literal["objects", "text", "none"]


class Conversation(NamedTuple):
    """Messages, and what else the chat template is given.

    ``plain``: no template, a prompt and what completes it. ``untrained``: the messages that the data says not to train
    on. ``prompt``: how many messages lead up to the completion that is trained on. ``unused``: keys that mean nothing
    here.
    """

    messages: list[dict[str, Any]]
    given: Mapping[str, Any] = MappingProxyType({})
    plain: bool = False
    untrained: frozenset[int] = frozenset()
    prompt: int = 0
    unused: tuple[str, ...] = ()


_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **{"system": "system", "developer": "developer"},
}
_PREFERENCES = ("chosen", "rejected", "preferred_output", "non_preferred_output", "kto_tag")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_BESIDE = ("system", "tools", "functions", "chat_template_kwargs")  # the messages of a line, in any form
_TEMPLATE_ARGUMENTS = (  # what a line cannot say to a template in chat_template_kwargs
    *("messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("chat_template", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
)


def present(value: Any) -> Any:
    """Without the fields of objects that are null."""
    if isinstance(value, dict):
        return {key: present(inner) for key, inner in value.items() if inner is not None}
    return [present(inner) for inner in value] if isinstance(value, list) else value


def _field(found: Mapping[str, Any], key: str, default: str | None = None, where: str = "") -> str:
    """A text. Raises ValueError for anything else."""
    value = found.get(key, default)
    if not isinstance(value, str):
        problem = f"is {kind(value)}, expected a string" if key in found else "is missing or null"
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


def _decoded(value: Any, where: str, blank: Any) -> Any:
    """A value that may come as JSON text. Raises ValueError for text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return decode(value) if value.strip() else blank
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _one_of(found: Mapping[str, Any], key: str, other: str, where: str) -> str:
    """The key of two for one thing that is there. Raises ValueError where both are and differ."""
    if key in found and other in found and found[key] != found[other]:
        raise ValueError(f"{where}{json.dumps(key)} and {json.dumps(other)} differ")
    return other if other in found else key


def _arguments(value: Any, where: str, calls: Calls) -> Any:
    """The arguments of a tool call, an object or JSON text, as the template takes them."""
    found = _decoded({} if value is None else value, f'{where}"arguments"', {})
    if not isinstance(found, dict):
        raise ValueError(f'{where}"arguments" are {kind(found)}, expected an object')
    if calls == "text":
        return value if isinstance(value, str) and value.strip() else json.dumps(found, ensure_ascii=False)
    return found


def _function(found: Any, where: str, calls: Calls) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError(f'{where}a tool call is {{"name", "arguments"}}')
    return {**found, "arguments": _arguments(found.get("arguments"), where, calls)}


def _tool_calls(message: dict[str, Any], where: str, calls: Calls) -> list[dict[str, Any]]:
    """The calls in a message: OpenAI's ``tool_calls`` or the older ``function_call``."""
    if "function_call" in message:
        if "tool_calls" in message:
            raise ValueError(f'{where}"tool_calls" and "function_call" are both given')
        return [{"type": "function", "function": _function(message["function_call"], where, calls)}]
    found = _decoded(message.get("tool_calls", []), f'{where}"tool_calls"', [])
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise ValueError(f'{where}"tool_calls" is not a list of objects')
    return [
        {**call, "function": _function(call["function"], where, calls)}
        if "function" in call
        else _function(call, where, calls)
        for call in found
    ]


def _content(message: dict[str, Any], key: str, where: str) -> str:
    """The text of a message, its parts joined."""
    content = message.get(key)
    if not isinstance(content, list):
        return _field(message, key, where=where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(f"{where}a part of its content is not text: {json.dumps(what)}")
    return "".join(_field(part, "text", where=where) for part in content)


def _trained(message: dict[str, Any], role: str, where: str) -> bool:
    """Whether the data lets a message be trained on: OpenAI's ``weight``, axolotl's ``train`` and ``training``."""
    for key in ("training_detail", "train_detail"):
        if key in message:
            raise ValueError(f'{where}"{key}" is not read: a message is trained on as a whole ("train") or not at all')
    said = {key: message[key] for key in ("weight", "train", "training") if key in message}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise ValueError(f"{where}{json.dumps(key)} is {json.dumps(value)}, expected {expected}")
        if value and key != "weight" and role != "assistant":
            raise ValueError(f'{where}"{key}" is true, but only what the assistant says is trained on')
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"{where}{' and '.join(map(json.dumps, said))} differ")
    return all(said.values())


def _message(message: dict[str, Any], where: str, calls: Calls) -> tuple[dict[str, Any], bool]:
    """A message as templates know it, with what else it carries, and whether it may be trained on."""
    if message.get("refusal"):
        raise ValueError(f'{where}"refusal" is not read; what the assistant says is its "content"')
    for key in _MEDIA:
        if message.get(key):
            raise ValueError(f"{where}{json.dumps(key)} is not read: only text is trained on")
    role_key, text_key = _one_of(message, "role", "from", where), _one_of(message, "content", "value", where)
    speaker = _field(message, role_key, where=where)
    if not speaker:
        raise ValueError(f"{where}{json.dumps(role_key)} is empty")
    if role_key == "from" and speaker not in _ROLES:
        raise ValueError(f'{where}"from" is {speaker!a}{nearest(speaker, _ROLES)}; known are {", ".join(_ROLES)}')
    if speaker not in _ROLES and speaker.lower() in _ROLES:  # a template's own roles are its matter, a slip is not
        raise ValueError(f"{where}{json.dumps(role_key)} is {speaker!a}{nearest(speaker.lower(), _ROLES)}")
    role = "tool" if speaker == "function" else _ROLES.get(speaker, speaker)
    called = _tool_calls(message, where, calls)
    if called and role != "assistant":
        raise ValueError(f"{where}tool calls in a message of role {role!a}, which are the assistant's")
    if called and calls == "none":
        raise ValueError(f"{where}the chat template leaves out its tool calls")
    content = "" if called and text_key not in message else _content(message, text_key, where)
    if speaker == "function_call" and calls != "none" and not called:
        found = _decoded(content, f'{where}"{text_key}" of a function_call', [])
        listed = found if isinstance(found, list) else [found]
        called = [{"type": "function", "function": _function(each, where, calls)} for each in listed]
        content = ""
    read = {"role", "from", "content", "value", "tool_calls", "function_call", "weight", "train", "training"}
    rest = {key: value for key, value in message.items() if key not in read}
    as_read = {"role": role, "content": content, **rest, **({"tool_calls": called} if called else {})}
    return as_read, _trained(message, role, where)


def _tools(found: dict[str, Any], wrap: bool) -> list[dict[str, Any]]:
    """The tools of a line, a list or its JSON text. ``wrap``: those that are bare functions as OpenAI has them."""
    if found.get("tools") and found.get("functions"):
        raise ValueError('"tools" and "functions" are both given')
    key = "functions" if found.get("functions") else "tools"
    listed = _decoded(found.get(key, []), json.dumps(key), [])
    if not isinstance(listed, list):
        raise ValueError(f"{json.dumps(key)} is {kind(listed)}, expected a list")
    tools = [_decoded(tool, json.dumps(key), None) for tool in listed]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{json.dumps(key)}: a tool is not an object")
    wrap = wrap or key == "functions"
    return [{"type": "function", "function": tool} if wrap and "name" in tool else tool for tool in tools]


def _given(found: dict[str, Any], wrap: bool = False) -> dict[str, Any]:
    """What a line gives the template beside its messages."""
    more = _decoded(found.get("chat_template_kwargs", {}), '"chat_template_kwargs"', {})
    if not isinstance(more, dict):
        raise ValueError(f'"chat_template_kwargs" is {kind(more)}, expected an object')
    for key in _TEMPLATE_ARGUMENTS:
        if key in more:
            raise ValueError(f'"chat_template_kwargs": {json.dumps(key)} cannot be given by a line')
    tools = _tools(found, wrap)
    return {**more, **({"tools": tools} if tools else {})}


def _turns(key: str, wrap: bool) -> Callable[[dict[str, Any], Calls], Conversation]:
    """A form that lists its messages under ``key``."""

    def read(found: dict[str, Any], calls: Calls) -> Conversation:
        read = [_message(message, f"message {i}: ", calls) for i, message in enumerate(_list(found, key), 1)]
        system, first = _field(found, "system", ""), read[0][0]
        if system and first["role"] != "system":
            read.insert(0, ({"role": "system", "content": system}, True))
        elif system and first["content"] != system:
            raise ValueError('"system" is not what the first message, of role system, says')
        untrained = frozenset(i for i, (_, trained) in enumerate(read) if not trained)
        return Conversation([message for message, _ in read], _given(found, wrap), untrained=untrained)

    return read


def _alpaca(found: dict[str, Any], _: Calls) -> Conversation:
    system, more = _field(found, "system", ""), _field(found, "input", "")
    question = "\n\n".join(filter(None, (_field(found, "instruction"), more)))
    messages = [{"role": "system", "content": system}] if system else []
    history = found.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError('"history": expected pairs of texts, a question and its answer')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = {"role": "assistant", "content": _field(found, "output")}
    return Conversation([*messages, {"role": "user", "content": question}, answer], _given(found, wrap=True))


def _completion(found: dict[str, Any], calls: Calls) -> Conversation:
    if isinstance(found["prompt"], list):
        whole = _turns("both", wrap=False)(
            {**found, "both": [*_list(found, "prompt"), *_list(found, "completion")]}, calls
        )
        return whole._replace(prompt=len(whole.messages) - len(found["completion"]))
    if found.get("system"):
        raise ValueError('"system" has no place beside a prompt and completion that are texts')
    texts = _field(found, "prompt"), _field(found, "completion")
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    return Conversation(messages, _given(found), plain=True)


class Format(NamedTuple):
    """A form by the keys that tell it; ``more`` are others that it has."""

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
    """The conversation in one object, in the form named, or told by its keys. Raises ValueError with what is wrong.

    ``calls``: how the chat template takes tool calls (``ChatTemplate.calls``); where not at all, what the assistant
    says to a function in ShareGPT's form stays text.
    """
    found = present(found)
    preferences = [key for key in _PREFERENCES if key in found]
    if isinstance(found.get("label"), bool):
        preferences.append("label")
    if preferences:
        names = ", ".join(map(json.dumps, preferences))
        raise ValueError(f"{names}: preference data, which is not trained on; keep only conversations to imitate")
    for key in _MEDIA:
        if found.get(key):
            raise ValueError(f"{json.dumps(key)} is not read: only text is trained on")
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
