"""What the end-to-end tests share: one dataset and one run without faults for each engine."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.kit.tiny import ENGINES, TinyRuns, tiny_data


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyRuns]:
    """The launches under an engine, the same ones for all that ask: a reference run is made once."""

    @cache
    def under(engine: str) -> TinyRuns:
        folder = tmp_path_factory.mktemp("tiny")
        return TinyRuns(tiny_data(folder), folder, ENGINES[engine])

    return under


@pytest.fixture(scope="session")
def tiny(tiny_runs: Callable[[str], TinyRuns], request: pytest.FixtureRequest) -> TinyRuns:
    """Launches of a tiny model on two ranks, and the reference run to compare with."""
    return tiny_runs(getattr(request, "param", "tp"))
