"""YAML as configs are written in it: what JSON knows, ``1e-4`` as the number that it is (PyYAML takes it for a string),
no date that a run's name may look like, no number to base 60 or 8 (``4:00:00``, ``010``), and no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

_DEEPEST = 100  # far deeper than any config; the parser recurses in C, where that ends the process
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
_RESOLVERS = {  # by a plain word's first character, what it may be read as
    first: [(tag, how) for tag, how in pairs if tag.removeprefix(_TAG) in ("null", "bool")]
    + [(_TAG + "int", _INT), (_TAG + "float", _FLOAT)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_constructors = _CONSTRUCTORS
    yaml_implicit_resolvers = _RESOLVERS

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for every mapping before its values are made."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    where, what = "while constructing a mapping", f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError(where, node.start_mark, what, key.start_mark)
                seen.add(key.value)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    yaml_implicit_resolvers = {  # a text that would be read as something else, here or elsewhere, is quoted
        first: [*pairs, (_TAG + "float", _FLOAT)] for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def load(text: str) -> Any:
    """What ``text`` says. Raises YAMLError, most with a ``problem_mark``, and RecursionError for too many levels."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise RecursionError
    return yaml.load(text, Loader=_Loader)


def dump(tree: Any) -> str:
    """YAML that ``load`` reads back as ``tree``."""
    return str(yaml.dump(tree, Dumper=_Dumper, allow_unicode=True, sort_keys=False))
