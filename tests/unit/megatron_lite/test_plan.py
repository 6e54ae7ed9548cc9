"""Degrees are checked before any process group exists, and the error says what would work."""

import pytest

from megatron_lite.config import parse_config
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.plan import make_plan


def config(model=None, parallel=None, train=None):
    sizes = {"vocab_size": 300, "hidden_size": 48, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 96}
    return parse_config(
        {
            "model": {**sizes, **(model or {})},
            "data": {"train": [{"path": "x"}], "seq_len": 32},
            "parallel": parallel or {},
            "train": {"global_batch_size": 24, "micro_batch_size": 2, **(train or {})},
        }
    )


def test_accumulation_follows_from_the_batch_and_the_ranks():
    plan = make_plan(config(parallel={"tp": 2, "sp": True}), world_size=6)
    assert (plan.dp, plan.accumulation) == (3, 4)
    assert plan.describe(config()) == (
        "6 ranks = dp 3 × tp 2 with sequence parallelism; global batch 24 = dp 3 × 4 × micro 2 (768 tokens)"
    )


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"parallel": {"tp": 4}},
            8,
            "parallel.tp=4 does not divide model.num_heads=6; this model can use tp 1, 2",
        ),
        ({"parallel": {"tp": 2}}, 3, "parallel.tp=2 does not divide the 3 ranks of this job"),
        ({"train": {"global_batch_size": 20}}, 8, "must be a multiple of dp 8 × train.micro_batch_size 2 = 16"),
        ({"parallel": {"tp": 6}}, 6, r"padded to 384|num_kv_heads=2"),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(changes, world, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(**changes), world)


def test_fewer_kv_heads_than_ranks_work_when_they_divide():
    assert make_plan(config(model={"num_heads": 8, "head_dim": 8}, parallel={"tp": 4}), 4).tp == 4
