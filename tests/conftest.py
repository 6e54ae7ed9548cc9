"""What all tests share: the same examples in every run, and which tests may run beside each other."""

import gc
import os

# For every process that tests start, and before torch is imported here: two tests run at a time, and threads that wait
# for each other's core take more of it than they give; and nobody should compile our sources once for each process.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from collections.abc import Generator

import pytest
from hypothesis import settings

pytest_plugins = ["tests.kit.fixtures"]
gc.set_threshold(50_000, 20, 20)  # what tests import is large, and no garbage

# What passes once passes again; raise ``max_examples`` to search.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """A file's tests share what they set up, so one worker runs them; hosts are heavy, and made by one worker alone."""
    for item in items:
        hosts = {"cluster", "slurm", "two", "six"} & set(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("hosts" if hosts else str(item.path)))
    yield
    if getattr(config.option, "loadgroup", False) and items and "@" not in items[0].nodeid:
        raise pytest.UsageError("this pytest ignores the groups of this pytest-xdist; constraints.txt has two that fit")
