"""What all tests share: the same examples in every run, and which tests may run beside each other."""

import gc
import os

# For every process that tests start, and before torch is imported here: some tests run at a time, and threads that wait
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


HOSTS = {"cluster", "slurm", "two", "six"}


def group(item: pytest.Item) -> tuple[int, str]:
    """Tests that one worker runs, and when: hosts and ranks are heavy, so only one makes them, and begins with them.
    Launches come next, each test by itself; then files, whose tests share what they set up."""
    fixtures = set(getattr(item, "fixturenames", ()))
    if fixtures & HOSTS:
        return 0, "hosts"
    if "worlds" in fixtures:
        return 1, "world"
    shared = any(defs[-1].scope in ("class", "module") for defs in item._fixtureinfo.name2fixturedefs.values())
    if item.path.parent.name not in ("e2e", "faults"):
        return 3, str(item.path)
    return 2, str(item.path) if shared else f"{item.path}:{item.name}".replace("@", "_")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ranks that nobody needs any more end: what gloo has started in them wakes up a hundred times a second."""
    if group(item)[1] == "world" and (nextitem is None or group(nextitem)[1] != "world"):
        from tests.kit.fixtures import close_worlds  # after what is set here

        close_worlds()


@pytest.hookimpl(wrapper=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    groups = {item: group(item) for item in items}
    for item, (_, name) in groups.items():
        item.add_marker(pytest.mark.xdist_group(name))
    loadgroup = getattr(config.option, "loadgroup", False)
    if loadgroup:
        items.sort(key=lambda item: groups[item][0])
    yield
    if loadgroup and items and "@" not in items[0].nodeid:
        raise pytest.UsageError("this pytest ignores the groups of this pytest-xdist; constraints.txt has two that fit")
