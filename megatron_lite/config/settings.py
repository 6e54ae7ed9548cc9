"""Builds a Config from a YAML file, overrides, a preset, the model that ``init.from`` names, and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.cli import nearest, of_the_hub
from megatron_lite.config import yaml_text
from megatron_lite.config.tree import Config
from megatron_lite.config.validation import parse_config
from megatron_lite.config.yaml_text import parse_yaml, read_yaml
from megatron_lite.errors import ConfigError
from megatron_lite.families import huggingface


def find_file(name: str, folder: str = "") -> Path:
    """A config by path, or by name among those that come with the package (``demo`` finds ``configs/demo.yaml``).
    Raises ConfigError."""
    here = Path(__file__).parents[1]
    for root in (Path(), here / "configs" / folder, here.parent / "configs" / folder):
        for suffix in ("", ".yaml"):
            if (path := root / f"{name}{suffix}").is_file():
                return path
    shipped = [p.stem for root in (here, here.parent) for p in sorted((root / "configs" / folder).glob("*.yaml"))]
    raise ConfigError(f"no config {name!r}{nearest(name, shipped)}; shipped with the package: {', '.join(shipped)}")


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
                kind = "a list, and a list can only be given as a whole" if isinstance(node, list) else "not a section"
                mistakes.append(f"{dotted}: {part} is {kind}")
                break
        else:
            try:
                node[parts[-1]] = _typed(text)
            except ConfigError as error:
                mistakes.append(f"{dotted}: {error}")
    return mistakes


def _typed(text: str) -> Any:
    """The value of a text from the command line: a YAML list or mapping, true, false or null, else the text itself
    (validation converts it if the key is a number). Raises ConfigError."""
    if text.startswith(("[", "{")):
        return parse_yaml(f"value: {text}", text)["value"]
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def load_config(name: str, overrides: Mapping[str, str]) -> Config:
    """Read, override, fill in the preset, the model of ``init.from`` and the vocabulary size, validate. Raises
    ConfigError."""
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
        mistakes.append("peft: init.from is missing; it names the model to adapt")
    try:
        config = parse_config(tree)
    except ConfigError as error:
        raise ConfigError("\n".join([*mistakes, str(error)])) from None
    if config.peft is not None and config.init.optimizer:
        mistakes.append("init.optimizer: peft trains new parameters, for which that optimizer has no state")
    if config.peft is None and config.init.adapter is not None:
        mistakes.append("init.adapter: needs a peft section with the adapter's method")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if config.model.vocab_size is None:
        size = _tokenizer_size(config.data.tokenizer)
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    return config


def _with_nul(value: Any, key: str = "") -> Iterator[str]:
    """The keys of strings that contain a NUL, which YAML can express."""
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
        try:
            return huggingface.from_config_json(
                json.loads((path / "config.json").read_text(encoding="utf-8")), f"{path}/config.json"
            )[0]
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}/config.json: {error}") from None
    latest = (path / "latest", path / "checkpoints" / "latest")
    names = (file.parent / file.read_text(encoding="utf-8").strip()[:100] for file in latest if file.is_file())
    for folder in (*names, path):  # checkpoints first: the run folder's config.yaml is that of the last start
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
