"""Messages of a conversation: reads the formats in which they come, and returns them as chat templates expect them.

A null field counts as absent, because exports write null where another message has the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from megatron_lite.cli import nearest

Calls = Literal["objects", "text", "none"]

_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **{"system": "system", "developer": "developer"},
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
LOSS_MARKS = ("loss", "loss_weight", "loss_scale", "masked", "mask", "trainable", "is_trainable", "ignore")
WEIGHTS = ("weight", "train", "training")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {json.dumps(next(key for key in found if keys.count(key) > 1))}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def decode(text: str) -> Any:
    """Parse a JSON text. Raises ValueError with the reason if it is invalid."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at column {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None


def kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    return _TYPES.get(type(value), "null")


def present(value: Any) -> Any:
    """The value without null fields of its objects."""
    if isinstance(value, dict):
        return {key: present(inner) for key, inner in value.items() if inner is not None}
    return [present(inner) for inner in value] if isinstance(value, list) else value


def text_field(found: Mapping[str, Any], key: str, default: str | None = None, where: str = "") -> str:
    """Read a string. Raises ValueError for anything else."""
    value = found.get(key, default)
    if not isinstance(value, str):
        problem = f"is {kind(value)}, expected a string" if key in found else "is missing or null"
        raise ValueError(f"{where}{json.dumps(key)} {problem}")
    return value


def decoded(value: Any, where: str, blank: Any) -> Any:
    """Decode a value that may be given as JSON text. Raises ValueError for text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return decode(value) if value.strip() else blank
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _one_of(found: Mapping[str, Any], key: str, other: str, where: str) -> str:
    """Of two names for the same field, the one that is present. Raises ValueError if both are and differ."""
    if key in found and other in found and found[key] != found[other]:
        raise ValueError(f"{where}{json.dumps(key)} and {json.dumps(other)} differ")
    return other if other in found else key


def _arguments(value: Any, where: str, calls: Calls) -> Any:
    """The arguments of a tool call, an object or JSON text, as the template takes them."""
    found = decoded({} if value is None else value, f'{where}"arguments"', {})
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
    found = decoded(message.get("tool_calls", []), f'{where}"tool_calls"', [])
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise ValueError(f'{where}"tool_calls" is not a list of objects')
    return [
        {**call, "function": _function(call["function"], where, calls)}
        if "function" in call
        else _function(call, where, calls)
        for call in found
    ]


def _content(message: dict[str, Any], key: str, where: str) -> str:
    """The text of a message, with its parts joined."""
    content = message.get(key)
    if not isinstance(content, list):
        return text_field(message, key, where=where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(f"{where}a part of its content is not text: {json.dumps(what)}")
    return "".join(text_field(part, "text", where=where) for part in content)


def _trained(message: dict[str, Any], role: str, where: str) -> bool:
    """Whether a message is to be trained on: OpenAI's ``weight``, axolotl's ``train`` and ``training``."""
    for key in ("training_detail", "train_detail"):
        if key in message:
            raise ValueError(f'{where}"{key}" is not read: a message is trained on as a whole ("train") or not at all')
    for key in LOSS_MARKS:
        if key in message:
            raise ValueError(f'{where}"{key}" is not read; "weight" 0 or "train" false holds a message back')
    said = {key: message[key] for key in WEIGHTS if key in message}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise ValueError(f"{where}{json.dumps(key)} is {json.dumps(value)}, expected {expected}")
        if value and key != "weight" and role != "assistant":
            raise ValueError(f'{where}"{key}" is true, but only what the assistant says is trained on')
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"{where}{' and '.join(map(json.dumps, said))} differ")
    return all(said.values())


def read_message(message: dict[str, Any], where: str, calls: Calls) -> tuple[dict[str, Any], bool]:
    """A message as templates expect it, its unused keys, and whether it may be trained on."""
    if message.get("refusal"):
        raise ValueError(f'{where}"refusal" is not read; what the assistant says is its "content"')
    for key in MEDIA:
        if message.get(key):
            raise ValueError(f"{where}{json.dumps(key)} is not read: only text is trained on")
    role_key, text_key = _one_of(message, "role", "from", where), _one_of(message, "content", "value", where)
    speaker = text_field(message, role_key, where=where)
    if not speaker:
        raise ValueError(f"{where}{json.dumps(role_key)} is empty")
    if role_key == "from" and speaker not in _ROLES:
        raise ValueError(f'{where}"from" is {speaker!a}{nearest(speaker, _ROLES)}; known are {", ".join(_ROLES)}')
    if speaker not in _ROLES and speaker.lower() in _ROLES:  # wrong case; other roles are up to the template
        raise ValueError(f"{where}{json.dumps(role_key)} is {speaker!a}{nearest(speaker.lower(), _ROLES)}")
    role = "tool" if speaker == "function" else _ROLES.get(speaker, speaker)
    called = _tool_calls(message, where, calls)
    if called and role != "assistant":
        raise ValueError(f"{where}tool calls in a message of role {role!a}, which are the assistant's")
    if called and calls == "none":
        raise ValueError(f"{where}the chat template leaves out its tool calls")
    content = "" if called and text_key not in message else _content(message, text_key, where)
    if speaker == "function_call" and calls != "none" and not called:
        found = decoded(content, f'{where}"{text_key}" of a function_call', [])
        listed = found if isinstance(found, list) else [found]
        called = [{"type": "function", "function": _function(each, where, calls)} for each in listed]
        content = ""
    read = {"role", "from", "content", "value", "tool_calls", "function_call", *WEIGHTS}
    rest = {key: value for key, value in message.items() if key not in read}
    as_read = {"role": role, "content": content, **rest, **({"tool_calls": called} if called else {})}
    return as_read, _trained(message, role, where)
