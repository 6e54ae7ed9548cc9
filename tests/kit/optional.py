"""Libraries that not everybody has: what needs them is skipped without them, and nothing is imported at collection."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest


class Optional:
    """A library that is imported when something of it is used for the first time."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


def optional(name: str, extra: str = "dev") -> Any:
    """The library ``name``; without it the module that asks is skipped, whose reason says which ``extra`` has it."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install '.[{extra}]')", allow_module_level=True)
    return Optional(name)
