"""Validates a tree as a section of the config: all mistakes at once, one line each, with the nearest valid key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_lite.cli import nearest
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.peers import meant, meant_value
from megatron_lite.config.peft import PeftConfig
from megatron_lite.config.tree import Config
from megatron_lite.errors import ConfigError
from megatron_lite.peft import METHODS


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree. Raises ConfigError with one line for every mistake in it."""
    try:
        return Config.model_validate({name: section for name, section in tree.items() if section is not None})
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(e) for e in error.errors(include_url=False))) from None


def parse_model(tree: Any, where: str) -> ModelConfig:
    """Validate the ``model`` section that was found in ``where``. Raises ConfigError."""
    return parse_section(ModelConfig, "model", tree, where)


def parse_peft(tree: Any, where: str) -> PeftConfig | None:
    """Validate the ``peft`` section that was found in ``where``, if there is one. Raises ConfigError."""
    return None if tree is None else parse_section(PeftConfig, "peft", tree, where)


def parse_section(section: Any, name: str, tree: Any, where: str) -> Any:
    """Validate the section ``name`` that was found in ``where``. Raises ConfigError."""
    try:
        return TypeAdapter(section).validate_python(tree)
    except ValidationError as error:
        lines = (_describe({**e, "loc": (name, *e["loc"])}) for e in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def _describe(error: Any) -> str:
    """One line for one pydantic error: key, problem, given value, nearest valid one."""
    location = [str(part) for part in error["loc"]] or ["config"]
    if location[0] == "peft":  # pydantic inserts the method
        location[1:2] = []
    key = ".".join(location)
    given, message = error["input"], error["msg"].removeprefix("Value error, ")
    hint = " (a flag without a value counts as true)" if given is True else ""
    match error["type"]:
        case "union_tag_not_found":
            return f"{key}.method: missing; one of {', '.join(METHODS)}"
        case "union_tag_invalid":
            tag = error["ctx"]["tag"]
            hint = meant_value(tag) or nearest(tag, METHODS)
            return f"{key}.method: expected {', '.join(METHODS)}, not {tag!r}{hint}"
        case "extra_forbidden":
            known = _keys(error["loc"][:-1])
            owners = [name for name in METHODS if location[0] == "peft" and location[-1] in METHODS[name].model_fields]
            elsewhere = f" (belongs to peft.method={' or '.join(owners)})" if owners else meant(location[-1])
            hint = elsewhere or nearest(location[-1], known)
            return f"{key}: unknown key{hint}; known: {', '.join(known)}"
        case "missing":
            return f"{key}: missing"
        case "list_type" | "tuple_type":
            message = f"expected a list such as {_example(error['loc'])}"
        case "model_type" if isinstance(error["loc"][-1], int):
            message = f"expected {_example(error['loc'][:-1]).strip('[]')}"
        case "model_type" | "dict_type":
            message = "expected a section"
        case "literal_error":
            message = f"expected {error['ctx']['expected']}"
            hint = hint or meant_value(str(given)) or nearest(str(given), re.findall(r"'(.*?)'", message))
    message = message[0].lower() + message[1:]
    told = "" if isinstance(given, (dict, BaseModel)) else f", not {given!r:.200}{hint}"
    return f"{key}: {message}{told}"


def _example(location: tuple[str | int, ...]) -> str:
    """How the list at ``location`` may be written."""
    field = _keys(location[:-1])[str(location[-1])]
    return field.examples[0] if field.examples else json.dumps(field.default or ["a", "b"])


def _keys(location: tuple[str | int, ...]) -> Mapping[str, Any]:
    """The keys of the section at ``location``."""
    section: Any = Config
    if location[:1] == ("peft",):
        section, location = METHODS[str(location[1])], location[2:]
    for part in location:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        while not hasattr(section, "model_fields"):  # a list of sections, or an optional one
            section = get_args(section)[0]
    return {field.alias or name: field for name, field in section.model_fields.items()}
