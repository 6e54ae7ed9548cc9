"""What tests with launches share: one dataset and one run without faults for each engine; hosts, and Slurm on them."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_lite.proof.record import Row
from tests.kit.cluster import Cluster
from tests.kit.hosts import Unavailable
from tests.kit.jobs import PYTHON, run_job
from tests.kit.parity import Case, run_case
from tests.kit.slurm import Slurm
from tests.kit.tiny import LAYOUTS, TinyRuns, losses, short_config, tiny_data
from tests.kit.world import World


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyRuns]:
    """The launches under an engine, the same ones for all that ask: a reference run is made once."""

    @cache
    def under(engine: str) -> TinyRuns:
        folder = tmp_path_factory.mktemp("tiny")
        return TinyRuns(tiny_data(folder), folder, LAYOUTS[engine])

    return under


@pytest.fixture(scope="session")
def tiny(tiny_runs: Callable[[str], TinyRuns], request: pytest.FixtureRequest) -> TinyRuns:
    """Launches of a tiny model on two ranks, and the reference run to compare with."""
    return tiny_runs(getattr(request, "param", "tp"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset for the config ``short_config``."""
    return tiny_data(tmp_path_factory.mktemp("data"))


_WORLDS: dict[int, World] = {}


def close_worlds() -> None:
    """End the ranks of all worlds; they start anew when a test wants them."""
    for world in _WORLDS.values():
        world.close()


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """Worlds by their number of ranks, for all tests of a worker."""
    yield lambda size: _WORLDS.setdefault(size, World(size))
    close_worlds()


@pytest.fixture(scope="session")
def world(worlds: Callable[[int], World]) -> World:
    """Four ranks."""
    return worlds(4)


@pytest.fixture(scope="session")
def pair(worlds: Callable[[int], World]) -> World:
    """Two ranks."""
    return worlds(2)


@pytest.fixture(scope="session")
def parity(world: World, data: Path) -> Callable[[Case], list[Row]]:
    """A case of the parity tables, compared."""
    return lambda case: world.run(run_case, str(data), case)[0]


@pytest.fixture(scope="session")
def by_hand(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the short training under a torchrun of one's own on this machine."""
    folder = tmp_path_factory.mktemp("by hand")
    torchrun = [str(Path(PYTHON).parent / "torchrun"), "--standalone", "--nproc-per-node=2"]
    train = ["-m", "megatron_lite", "train", str(short_config(folder, data))]
    run_job([*torchrun, *train], timeout=110, env={"OMP_NUM_THREADS": "1"}).expect(exit_code=0, traceback=True)
    return losses(folder / "run")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three hosts; healthy again after each test, whatever that did to them."""
    try:
        with Cluster(3) as hosts:
            yield hosts
    except Unavailable as error:
        pytest.skip(f"no hosts to launch on: {error}")


@pytest.fixture(scope="session")
def six() -> Iterator[Cluster]:
    """Two hosts on a network that has addresses of IPv6 only; healthy again after each test."""
    try:
        with Cluster(2, "namespaces", ipv6=True) as hosts:
            yield hosts
    except Unavailable as error:
        pytest.skip(f"no hosts with IPv6: {error}")


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
    used = [name for name in ("slurm", "cluster", "six") if name in request.fixturenames]
    owner = request.getfixturevalue(used[0]) if used else None
    yield
    if owner:
        owner.reset()
