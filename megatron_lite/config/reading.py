"""From a YAML file and ``--section.key=value`` overrides to a Config: every mistake at once, a line each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_lite.cli import nearest, of_the_hub
from megatron_lite.config import yaml_text
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.peers import meant, meant_value
from megatron_lite.config.peft import PeftConfig
from megatron_lite.config.tree import Config
from megatron_lite.errors import ConfigError
from megatron_lite.peft import METHODS


def find_file(name: str, folder: str = "") -> Path:
    """A config by path, or by name among those that come with the package (``demo`` finds ``configs/demo.yaml``)."""
    here = Path(__file__).parents[1]
    for root in (Path(), here / "configs" / folder, here.parent / "configs" / folder):
        for suffix in ("", ".yaml"):
            if (path := root / f"{name}{suffix}").is_file():
                return path
    shipped = [p.stem for root in (here, here.parent) for p in sorted((root / "configs" / folder).glob("*.yaml"))]
    raise ConfigError(f"no config {name!r}{nearest(name, shipped)}; shipped with the package: {', '.join(shipped)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping as plain dictionaries. Raises ConfigError with file and line for anything else."""
    try:
        if path.stat().st_size > 1_000_000:
            raise ConfigError(f"{path} is over 1 MB: not a config")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML text that comes from ``name``. Raises ConfigError."""
    if re.search(r"[\s\[{,:-][&*]\w", text):  # no config needs aliases, and nested ones can fill the memory
        raise ConfigError(f"{name}: YAML anchors and aliases (& and *) are not allowed in a config")
    if "${" in text:
        raise ConfigError(f"{name}: ${{…}} is not filled in; write the value, or give it as --section.key=value")
    try:
        tree = yaml_text.load(text)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except Exception as error:  # the YAML reader raises many kinds; each means the text is wrong
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = [getattr(error, "context", None), getattr(error, "problem", None)] if mark else [str(error)]
        problem = " ".join(" ".join(filter(None, said)).split()).replace(' in "<unicode string>",', " at")
        raise ConfigError(f"{place}: {problem or _NO_SECTIONS}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{name}: {_NO_SECTIONS}")
    return tree or {}


_NO_SECTIONS = "expected sections such as 'model:' and 'train:'"


def apply_overrides(tree: dict[str, Any], overrides: Mapping[str, str]) -> list[str]:
    """Set dotted keys in ``tree``. Returns the mistakes found."""
    mistakes = []
    for dotted, text in overrides.items():
        node, parts = tree, dotted.split(".")
        for part in parts[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                kind = "a list, which is given as a whole" if isinstance(node, list) else "not a section"
                mistakes.append(f"{dotted}: {part} is {kind}")
                break
        else:
            try:
                node[parts[-1]] = _typed(text)
            except ConfigError as error:
                mistakes.append(f"{dotted}: {error}")
    return mistakes


def _typed(text: str) -> Any:
    """What was typed for a key: a YAML list or mapping, true, false or null, and otherwise the text as it stands (which
    a key that wants a number reads as one)."""
    if text.startswith(("[", "{")):
        return parse_yaml(f"value: {text}", text)["value"]
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


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


def load_config(name: str, overrides: Mapping[str, str]) -> Config:
    """Read, override, fill in the preset and the vocabulary, validate."""
    tree = read_yaml(find_file(name))
    mistakes = apply_overrides(tree, overrides)
    mistakes += [f"{key}: no path, argument or variable can hold a NUL character" for key in _with_nul(tree)]
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("preset"), str):
        tree["model"] = model = {**read_yaml(find_file(model["preset"], "models")), **model}
    init = tree.get("init")
    source = init.get("from") if isinstance(init, dict) else None
    if isinstance(source, str) and isinstance(model, (dict, type(None))):
        try:
            tree["model"] = {**model_section(source), **(model or {})}
        except ConfigError as error:
            raise ConfigError(f"init.from: {error}") from None
    if tree.get("peft") is not None and source is None:
        mistakes.append("peft: init.from is missing: the model that is to be adapted")
    try:
        config = parse_config(tree)
    except ConfigError as error:
        raise ConfigError("\n".join([*mistakes, str(error)])) from None
    if config.peft is not None and config.init.optimizer:
        mistakes.append("init.optimizer: what peft trains is new, and that optimizer knows nothing of it")
    if config.peft is None and config.init.adapter is not None:
        mistakes.append("init.adapter: peft is missing: the method that it is of")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if config.model.vocab_size is None:
        size = _tokenizer_size(config.data.tokenizer)
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    return config


def _with_nul(value: Any, key: str = "") -> Iterator[str]:
    """The keys of texts with a NUL, which YAML can write."""
    if isinstance(value, str) and "\0" in value:
        yield key
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _with_nul(item, f"{key}.{name}".removeprefix("."))


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that ``load_config`` reads back to the same config."""
    return yaml_text.dump(config.model_dump(mode="json"))


def model_section(source: str) -> dict[str, Any]:
    """The ``model`` section of a checkpoint of ours, a run, or a Hugging Face folder. Raises ConfigError."""
    path = Path(source)
    if (path / "config.json").is_file():
        from megatron_lite.families import huggingface

        try:
            return huggingface.model_section(
                json.loads((path / "config.json").read_text(encoding="utf-8")), f"{path}/config.json"
            )[0]
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}/config.json: {error}") from None
    latest = (path / "latest", path / "checkpoints" / "latest")
    names = (file.parent / file.read_text(encoding="utf-8").strip()[:100] for file in latest if file.is_file())
    for folder in (*names, path):  # a run's own config.yaml is that of its last start
        if (folder / "config.yaml").is_file() and isinstance(
            found := read_yaml(folder / "config.yaml").get("model"), dict
        ):
            return found
    raise ConfigError(f"{source}: no checkpoint and no Hugging Face folder{of_the_hub(source)}")


def _tokenizer_size(path: str | None) -> int:
    if path is None:
        raise ConfigError("model.vocab_size is unknown: set data.tokenizer (its size is used) or model.vocab_size")
    from megatron_lite.data.tokenizer import load_tokenizer

    return load_tokenizer(path).vocab_size


def _describe(error: Any) -> str:
    """One line for one pydantic error: key, problem, what was given, nearest valid."""
    location = [str(part) for part in error["loc"]] or ["config"]
    if location[0] == "peft":  # the method is named in between
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
        while not hasattr(section, "model_fields"):  # a list of sections, or one that may be missing
            section = get_args(section)[0]
    return {field.alias or name: field for name, field in section.model_fields.items()}
