"""A base in 8 or 4 bits: every engine and layout trains on it what one process trains on it, and holds its bytes."""

import math

import pytest
import torch

from megatron_lite.config import PACKED_BLOCK, PACKED_BYTES
from tests.kit.engines import ENGINES
from tests.kit.methods import MAIN, METHODS, OTHERS, ROOM
from tests.kit.parity import Case, Layout, assert_equal, train

SP = {"sp": True}
SIZES = {**ROOM, "hidden_size": 128, "ffn_size": 128}  # half of a row is a whole block
PACKED = {
    "lora on nf4": {**METHODS["lora"], "base_dtype": "nf4"},
    "dora on int8": {**METHODS["dora"], "base_dtype": "int8"},
    "adapter on nf4": {**METHODS["adapter"], "base_dtype": "nf4"},
    "prefix on int8": {**METHODS["prefix"], "base_dtype": "int8"},
}


def table() -> dict[str, Case]:
    cases = {}
    for name, method in PACKED.items():
        changes = {"peft": method, "model": SIZES}
        for engine, keys in MAIN.items():
            cases[f"{name}: {engine}, dp 2 × tp 2, sp"] = Case(Layout(dp=2, tp=2, parallel={**keys, **SP}), changes)
        cases[f"{name}: tp 2"] = Case(Layout(tp=2), changes)
        cases[f"{name}: recomputed"] = Case(Layout(parallel={"recompute": "full"}), changes)
    for name, (engine, keys) in zip(PACKED, OTHERS.items(), strict=True):
        cases[f"{name}: {engine}, dp 4"] = Case(Layout(dp=4, parallel=keys), {"peft": PACKED[name], "model": SIZES})
    kept = {"recompute": "selective", "offload_activations": True, "zero": 3}
    gpt2 = {"peft": PACKED["adapter on nf4"], "model": {**SIZES, "family": "gpt2"}}
    cases["adapter on nf4: gpt2, selective recomputation, offload"] = Case(Layout(dp=2, tp=2, parallel=kept), gpt2)
    return cases


CASES = table()


@pytest.mark.parametrize("case", CASES)
def test_equal(parity, case):
    assert_equal(parity(CASES[case]))


def held(rank: int, size: int, data: str) -> dict[str, float]:
    """Under every engine, in bfloat16: bytes that a rank has for each number of a packed matrix. The base never
    moves."""
    found = {}
    for engine, keys in ENGINES.items():
        trainers: list = []
        changes = {"peft": PACKED["lora on nf4"], "model": SIZES, "train": {"precision": "bfloat16"}}
        steps = train(Layout(dp=2, parallel=keys), data, changes, trainers.append)
        engine_of = trainers[0].engine
        packed = {name: spec for name, spec in engine_of.specs.items() if spec.packing}
        assert len(packed) == 2 * 4
        frozen = {f"weights/{name}" for name in engine_of.specs.keys() - engine_of.trained}
        assert all(torch.equal(steps[0][name], steps[-1][name]) for name in frozen)
        moved = {f"weights/{name}" for name in engine_of.trained}
        assert not any(torch.equal(steps[0][name], steps[-1][name]) for name in moved)
        memory = engine_of.local_weights()
        found[engine] = sum(memory[name].nbytes for name in packed) / sum(
            math.prod(spec.shape) for spec in packed.values()
        )
    return found


def test_a_rank_holds_the_packed_bytes_or_its_part_of_them(pair, data):
    whole = PACKED_BYTES["nf4"] / PACKED_BLOCK
    for found in pair.run(held, str(data)):
        divided = {"fsdp, zero 2", "fsdp, zero 3", "deepspeed, zero 3"}
        assert found == {engine: whole / (2 if engine in divided else 1) for engine in found}
