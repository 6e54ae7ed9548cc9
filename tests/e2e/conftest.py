"""What the end-to-end tests share: one dataset and one run without faults for each engine."""

import pytest

from tests.kit.tiny import ENGINES, TinyRuns, tiny_data


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TinyRuns:
    """Launches of a tiny model on two ranks, and the reference run to compare with."""
    folder = tmp_path_factory.mktemp("tiny")
    return TinyRuns(tiny_data(folder), folder, ENGINES[getattr(request, "param", "tp")])
