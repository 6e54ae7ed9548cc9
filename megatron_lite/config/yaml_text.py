"""The YAML of configs: JSON's types only. ``1e-4`` is a number (PyYAML reads a string); there are no dates, as names of
runs may look like them, no numbers in base 60 or 8 (``4:00:00``, ``010``), and no duplicate keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_lite.errors import ConfigError

_DEEPEST = 100  # far deeper than any config; the parser recurses in C, where too deep a tree crashes the process
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_INT = re.compile(r"-?(0|[1-9][0-9]*)$")
_CONSTRUCTORS = {
    tag: how
    for tag, how in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
}
_RESOLVERS = {  # by the first character of a plain scalar: the types that it may have
    first: [(tag, how) for tag, how in pairs if tag.removeprefix(_TAG) in ("null", "bool")]
    + [(_TAG + "int", _INT), (_TAG + "float", _FLOAT)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_constructors = _CONSTRUCTORS
    yaml_implicit_resolvers = _RESOLVERS

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuses duplicate keys; called for every mapping before its values are constructed."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    where, what = "while constructing a mapping", f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError(where, node.start_mark, what, key.start_mark)
                seen.add(key.value)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    yaml_implicit_resolvers = {  # quotes strings that this or another parser would read as another type
        first: [*pairs, (_TAG + "float", _FLOAT)] for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def load(text: str) -> Any:
    """Parse YAML. Raises YAMLError, usually with a ``problem_mark``, and RecursionError for too many levels."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise RecursionError
    return yaml.load(text, Loader=_Loader)


def dump(tree: Any) -> str:
    """YAML that ``load`` reads back as ``tree``."""
    return str(yaml.dump(tree, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping as plain dictionaries. Raises ConfigError with file and line for anything else."""
    try:
        if path.stat().st_size > 1_000_000:
            raise ConfigError(f"{path} is over 1 MB: not a config")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML text; ``name``: where it is from, for errors. Raises ConfigError."""
    if re.search(r"[\s\[{,:-][&*]\w", text):  # no config needs aliases, and nested ones can fill the memory
        raise ConfigError(f"{name}: YAML anchors and aliases (& and *) are not allowed in a config")
    if "${" in text:
        raise ConfigError(f"{name}: ${{…}} is not substituted; write the value, or give it as --section.key=value")
    try:
        tree = load(text)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except Exception as error:  # of many types, all about the text
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = [getattr(error, "context", None), getattr(error, "problem", None)] if mark else [str(error)]
        problem = " ".join(" ".join(filter(None, said)).split()).replace(' in "<unicode string>",', " at")
        raise ConfigError(f"{place}: {problem or _NO_SECTIONS}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{name}: {_NO_SECTIONS}")
    return tree or {}


_NO_SECTIONS = "expected sections such as 'model:' and 'train:'"
