"""Which device a rank takes, of those that it sees."""

import pytest

from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import gpu_index
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
