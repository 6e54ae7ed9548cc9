"""Which ranks talk to which, and which device a rank takes, of those that it sees."""

import pytest
import torch

from megatron_lite.distributed import comm
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import build_mesh, gpu_index
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.errors import ConfigError


@pytest.mark.parametrize(
    ("visible", "local_rank", "local_size", "index"),
    [
        (8, 3, 8, 3),
        (8, 1, 2, 1),
        (1, 0, 1, 0),
        (1, 3, 4, 0),  # each task sees its own alone: --gpus-per-task=1, --gpu-bind, a part of a GPU, a wrapper
    ],
)
def test_a_rank_takes_the_gpu_of_its_local_rank_or_the_only_one(
    visible: int, local_rank: int, local_size: int, index: int
) -> None:
    assert gpu_index(visible, Rank(local_rank=local_rank, local_size=local_size)) == index


def test_fewer_gpus_than_ranks_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^4 ranks were started on node7, where this one sees 2 GPUs; start at most 2"
    ):
        gpu_index(2, Rank(local_rank=1, local_size=4, host="node7"))


def ranks_that_share_a_batch(rank: int, size: int) -> tuple[int, int, int, float]:
    mesh = build_mesh({"dp_replicate": 2, "cp": 2, "tp": 2}, torch.device("cpu"))
    assert mesh is not None
    total = comm.all_reduce(torch.tensor(float(rank)), mesh.data)
    return mesh.dp.rank, mesh.data.rank, mesh.copies, float(total)


def test_the_loader_divides_over_dp_and_sums_go_over_dp_and_cp() -> None:
    found = run_ranks(ranks_that_share_a_batch, 8)
    assert [dp for dp, *_ in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [data for _, data, *_ in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [told for *_, told in found] == [0 + 2 + 4 + 6, 1 + 3 + 5 + 7] * 4
    assert {copies for *_, copies, _ in found} == {2}
