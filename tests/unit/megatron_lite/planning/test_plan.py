"""Degrees are checked before any process group exists, and the error says what would work."""

from pathlib import Path

import pytest

from megatron_lite.config import parse_config
from megatron_lite.errors import ConfigError
from megatron_lite.planning.memory import bytes_per_frozen_parameter
from megatron_lite.planning.picture import picture
from megatron_lite.planning.plan import Plan, make_plan
from tests.kit import plans


def config(model=None, parallel=None, train=None, optim=None, peft=None):
    sizes = {"vocab_size": 300, "hidden_size": 48, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 96}
    return parse_config(
        {
            "model": {**sizes, **(model or {})},
            "data": {"train": [{"path": "x"}], "seq_len": 32},
            "parallel": parallel or {},
            "optim": optim or {},
            "peft": peft,
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
    ("parallel", "world", "told"),
    [
        ({"zero": 3}, 2, "2 ranks = dp 2 (ZeRO 3 over 2) × tp 1;"),
        ({"zero": 3}, 1, "1 rank = dp 1 (only one shard: runs as engine=fsdp, zero=0) × tp 1;"),
        ({"engine": "deepspeed", "zero": 2, "tp": 2}, 2, "2 ranks = dp 1 (only one shard: runs as engine=fsdp"),
        ({"engine": "deepspeed"}, 2, "2 ranks = dp 2 × tp 1;"),
        ({"zero": 3, "dp_replicate": 2}, 2, "2 ranks = dp 2 (only one shard: runs as engine=fsdp"),
    ],
)
def test_what_is_not_divided_is_said(parallel, world, told):
    asked = config(parallel=parallel)
    assert make_plan(asked, world).describe(asked).startswith(told)


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
        (
            {"parallel": {"engine": "deepspeed", "zero": 1}, "optim": {"name": "muon"}},
            2,
            r"optim\.name=muon needs whole matrices.* use engine=fsdp",
        ),
        (
            {"parallel": {"offload_activations": True}, "train": {"compile": True}},
            1,
            r"parallel\.offload_activations has no effect .* use parallel\.recompute",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(changes, world, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(**changes), world)


NF4 = {"method": "lora", "base_dtype": "nf4"}
BLOCKS = {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 6, "ffn_size": 768}


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({}, 1, r"nf4: attention\.qkv has 48 input features, not a multiple of the block size 64; use bfloat16"),
        (
            {"model": BLOCKS, "parallel": {"tp": 2}},
            2,
            r"nf4: attention\.o has 192 input features / parallel\.tp=2, not a multiple of the block size 64; use tp 1",
        ),
        (
            {"model": {**BLOCKS, "hidden_size": 128, "head_dim": 64}, "parallel": {"engine": "deepspeed", "zero": 3}},
            10,
            r"nf4: dp 10 does not divide the 2304 blocks of 64 numbers in attention\.qkv.* use dp 8, zero 2, or engine",
        ),
    ],
)
def test_a_base_that_cannot_be_packed_is_refused(changes, world, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(peft=NF4, **changes), world)


def test_a_packed_base_takes_its_bytes():
    """Gathered whole at zero 2, a part of it at zero 3; what is not packed is in what is computed in."""
    asked = config(model=BLOCKS, peft=NF4, parallel={"zero": 3}, train={"precision": "bfloat16"})
    plan = make_plan(asked, 4)
    assert bytes_per_frozen_parameter(asked, plan, "nf4") == 0.5625 / 4
    assert bytes_per_frozen_parameter(asked, plan) == 2 / 4
    asked = config(model=BLOCKS, peft=NF4, parallel={"zero": 2}, train={"precision": "bfloat16"})
    assert bytes_per_frozen_parameter(asked, plan, "nf4") == 0.5625 * 1.25


def test_fewer_kv_heads_than_ranks_work_when_they_divide():
    assert make_plan(config(model={"num_heads": 8, "head_dim": 8}, parallel={"tp": 4}), 4).tp == 4


def test_the_table_in_the_docs_is_what_is_checked():
    page = Path(__file__).resolve().parents[4] / "docs" / "plans.md"
    assert page.read_text() == plans.table(), "python -m tests.kit.plans > docs/plans.md"


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        ({"zero": 1}, 2, r"parallel\.zero=1: FSDP2 shards gradients .* or parallel\.engine=deepspeed"),
        ({"dp_replicate": 2}, 4, "parallel.dp_replicate=2 requires zero 2 or 3"),
        ({"dp_replicate": 3, "zero": 3}, 4, "parallel.dp_replicate=3 does not divide dp 4"),
        ({"offload": "all", "engine": "deepspeed", "zero": 2}, 2, "parallel.offload=all requires parallel.zero=3"),
        ({"offload": "optimizer", "zero": 2}, 2, "parallel.offload=optimizer requires parallel.engine=deepspeed"),
        ({"offload": "optimizer", "zero": 2, "engine": "deepspeed"}, 1, "a single data-parallel rank nothing"),
        ({"deepspeed": {"a": 1}}, 2, "parallel.deepspeed: these keys require parallel.engine=deepspeed"),
        (
            {"engine": "deepspeed", "deepspeed": {"fp16": {}, "zero_optimization": {"stage": 3}}},
            2,
            "parallel.deepspeed: fp16, zero_optimization.stage follows from this config",
        ),
    ],
)
def test_engines_refuse_what_they_cannot_do(parallel, world, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(parallel=parallel), world)


def test_the_picture_shows_every_rank_or_the_corners():
    plan = make_plan(config(parallel={"tp": 2, "zero": 3, "dp_replicate": 2}), 8)
    assert picture(plan).splitlines() == [
        "                           tp 0   tp 1",
        "dp 0 (part 1/2, copy 1)       0      1",
        "dp 1 (part 2/2, copy 1)       2      3",
        "dp 2 (part 1/2, copy 2)       4      5",
        "dp 3 (part 2/2, copy 2)       6      7",
    ]
    many = picture(Plan(tp=16, dp=64, sp=False, accumulation=1)).splitlines()
    assert many[0].split() == ["tp", "0", "tp", "1", "tp", "2", "tp", "3", "tp", "4", "tp", "5", "…", "tp", "15"]
    assert many[-2:] == ["…", "dp 63                      1008   1009   1010   1011   1012   1013      …   1023"]
