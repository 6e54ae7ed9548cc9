"""What the end-to-end tests share: one dataset and one run without faults for each engine; hosts, and Slurm on them."""

from collections.abc import Iterator

import pytest

from tests.kit.cluster import Cluster
from tests.kit.hosts import Unavailable
from tests.kit.slurm import Slurm
from tests.kit.tiny import ENGINES, TinyRuns, tiny_data


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TinyRuns:
    """Launches of a tiny model on two ranks, and the reference run to compare with."""
    folder = tmp_path_factory.mktemp("tiny")
    return TinyRuns(tiny_data(folder), folder, ENGINES[getattr(request, "param", "tp")])


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
