"""What the end-to-end tests share: one dataset and one run without faults for each engine; hosts, and Slurm on them."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.kit.cluster import Cluster
from tests.kit.hosts import Unavailable
from tests.kit.slurm import Slurm
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


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three hosts; healthy again after each test, whatever that did to them."""
    try:
        with Cluster(3) as hosts:
            yield hosts
    except Unavailable as error:
        pytest.skip(f"no hosts to launch on: {error}")


@pytest.fixture(scope="session")
def slurm(cluster: Cluster) -> Iterator[Slurm]:
    """Slurm on all hosts of the cluster; without jobs and all nodes idle after each test."""
    try:
        with Slurm(cluster) as servers:
            yield servers
    except Unavailable as error:
        pytest.skip(f"no Slurm: {error}")


@pytest.fixture(autouse=True)
def _healthy_again(request: pytest.FixtureRequest) -> Iterator[None]:
    used = [name for name in ("slurm", "cluster") if name in request.fixturenames]
    owner = request.getfixturevalue(used[0]) if used else None
    yield
    if owner:
        owner.reset()
