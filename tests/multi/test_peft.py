"""Every PEFT method under every engine and layout trains what one process trains, in float64 with clipping on."""

from dataclasses import replace
from functools import cache
from itertools import cycle, product

import pytest
import torch

from megatron_lite.distributed.comm import gather_objects
from megatron_lite.planning.plan import make_plan
from megatron_lite.proof.record import record
from tests.kit.covering import covering
from tests.kit.engines import ENGINES
from tests.kit.methods import MAIN, METHODS, OTHERS, ROOM
from tests.kit.optional import optional
from tests.kit.parity import Case, Layout, assert_equal, mesh_of, train

optional("deepspeed", "deepspeed")

SP = {"sp": True}


WIDTHS = {
    "dp 2 × tp 2, sp": Layout(dp=2, tp=2, parallel=SP),
    "dp 4, accumulation 2": Layout(dp=4, accumulation=2),
}
PRODUCT = {
    f"{method}: {engine}, {width}": {"method": method, "engine": engine, "width": width}
    for method, engine, width in product(METHODS, MAIN, WIDTHS)
}


def table() -> dict[str, Case]:
    cases = {}

    def add(method: str, title: str, layout: Layout, **changes: dict) -> None:
        model = {**ROOM, **changes.pop("model", {})}
        cases[f"{method}: {title}"] = Case(layout, {"peft": METHODS[method], "model": model, **changes})

    for of in PRODUCT.values():
        layout, keys = WIDTHS[of["width"]], MAIN[of["engine"]]
        add(of["method"], f"{of['engine']}, {of['width']}", replace(layout, parallel={**keys, **layout.parallel}))
    for method in METHODS:
        add(method, "tp 2", Layout(tp=2))
    for method, (engine, keys) in zip(METHODS, OTHERS.items(), strict=False):
        add(method, engine, Layout(dp=4, parallel=keys))
    for method in ("dora", "adapter", "prefix"):
        recomputed = Layout(tp=2, parallel={**SP, "recompute": "full"})
        add(method, "gpt2, tp 2, sp, recomputed", recomputed, model={"family": "gpt2"})
    for method in ("lora", "prefix", "prefix by an mlp"):
        add(method, "a kv head for two ranks", Layout(tp=4, parallel=SP))
    add("prefix", "documents masked", Layout(tp=2, parallel=SP), data={"document_mask": True})
    selective = {"recompute": "selective", "offload_activations": True, "zero": 3}
    add("prefix by an mlp", "selective recomputation, offload", Layout(dp=2, tp=2, parallel=selective))
    compiled = Layout(dp=2, tp=2, parallel={**SP, "zero": 3}, compile=True)
    add("dora", "compiled, fsdp, zero 3, dp 2 × tp 2, sp", compiled)
    dropped, halves = {**METHODS["lora"], "dropout": 0.2}, Layout(accumulation=2)  # masks belong to micro batches
    again = Layout(accumulation=2, parallel={"recompute": "full"})
    for title, layout in {"dp 2": Layout(dp=2), "recomputed": again}.items():
        cases[f"lora with dropout: {title}"] = Case(layout, {"peft": dropped, "model": ROOM}, halves)
    return cases


CASES = table()


def forgets_the_sum_of_a(trainer):
    """The replicated factor of a column-parallel linear keeps the gradient of this rank's tokens."""
    linear = trainer.model.blocks[1].attention.qkv
    linear.low = lambda x, seed: torch.nn.functional.linear(x, linear.a(x.dtype))


def forgets_the_sum_of_b(trainer):
    """So does that of a row-parallel one."""
    trainer.model.blocks[1].mlp.down.replicated = lambda parameter: parameter


def forgets_the_sum_of_a_bias(trainer):
    """So does the bias of a bottleneck."""
    trainer.model.blocks[0].mlp_adapter.up.replicated = lambda parameter: parameter


def forgets_the_sum_of_a_prefix(trainer):
    """A kv head that two ranks share gets the gradient of one."""
    trainer.model.blocks[0].attention.prefix._whole = lambda parameter: parameter


BUGS = {
    forgets_the_sum_of_a: ("lora", Layout(tp=2, parallel=SP), "blocks.1.attention.qkv.lora_v_a"),
    forgets_the_sum_of_b: ("lora", Layout(tp=2, parallel=SP), "blocks.1.mlp.down.lora_down_b"),
    forgets_the_sum_of_a_bias: ("adapter", Layout(tp=2, parallel=SP), "blocks.0.mlp_adapter.up.bias"),
    forgets_the_sum_of_a_prefix: ("prefix", Layout(tp=4), "blocks.0.attention.prefix.values"),
}


COMPILED = [name for name, case in CASES.items() if case.layout.compile]


@pytest.mark.parametrize("case", covering(CASES, PRODUCT, slow=COMPILED))
def test_equal(parity, case):
    assert_equal(parity(CASES[case]))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_missing_reduction_is_found_where_it_is(parity, bug):
    method, layout, tensor = BUGS[bug]
    rows = parity(Case(layout, {"peft": METHODS[method], "model": ROOM}, plant=bug))
    first = next(row for row in rows if row.first_beyond is not None)
    assert (first.step, first.kind) == (1, "gradients")
    assert first.first_beyond[0] == tensor


def starts(rank: int, size: int, data: str, method: str, engine: str) -> tuple[float, set[str], set[str], set[str]]:
    """By how much its first block outputs and loss are others than those of the base alone, what the base alone trains,
    what this one should train, and what moved in two steps."""
    alone, base, _ = two_steps(data, engine)
    first, trained, moved = two_steps(data, engine, method)
    forward = [name for name in alone if name.startswith(("block outputs/", "loss/"))]
    gap = max(float((first[name] - alone[name]).abs().max() / alone[name].abs().max()) for name in forward)
    return gap, base, trained, moved


@cache
def two_steps(data: str, engine: str, method: str | None = None):
    """The record of the first step, what is trained, and what moved on any rank of four."""
    changes = {"model": ROOM, **({"peft": METHODS[method]} if method else {})}
    config = Layout(dp=2, tp=2, parallel={**MAIN[engine], **SP}).config(data, changes)
    mesh, seen = mesh_of(make_plan(config, 4).degrees, 4), []

    def prepare(trainer):
        before = {n: [t.data.clone() for t in p.tiles] for n, p in trainer.engine.weights().items()}
        seen.extend((trainer, before))

    first, _ = [dict(step) for step in record(config, mesh, 2, prepare)]
    trainer, before = seen
    after = {n: [t.data for t in p.tiles] for n, p in trainer.engine.weights().items()}
    moved = {n for n in before if not all(map(torch.equal, before[n], after[n]))}
    return first, trainer.engine.trained, set().union(*gather_objects(moved, mesh.world))


STARTS = {f"{method}: {engine}": (method, engine) for engine, method in product(MAIN, METHODS)}
SOME = [f"{method}: {engine}" for method, engine in zip(METHODS, cycle(MAIN), strict=False)]


@pytest.mark.parametrize("start", covering(STARTS, {}, slow=STARTS.keys() - SOME))
def test_it_starts_as_the_base_and_only_what_it_adds_moves(world, data, start):
    method, engine = STARTS[start]
    gap, base, trained, moved = world.run(starts, str(data), method, engine)[0]
    if "prefix" not in method:  # which attention sees from the start
        assert gap <= 1e-12
    assert moved == trained
    assert trained and not trained & base


def bfloat16(rank: int, size: int, data: str) -> dict[str, list[float]]:
    """Losses of a few steps in bfloat16 under every engine, and proof that the base never moved."""
    found = {}
    for engine, keys in ENGINES.items():
        changes = {"peft": METHODS["lora"], "model": ROOM, "train": {"precision": "bfloat16"}}
        steps = train(Layout(dp=2, parallel=keys), data, changes, None, steps=4)
        found[engine] = [float(step["loss/loss"]) for step in steps]
        frozen = [name for name in steps[0] if name.startswith("weights/") and "lora" not in name]
        assert frozen and all(steps[0][name].dtype == torch.bfloat16 for name in frozen)
        assert all(torch.equal(steps[0][name], steps[-1][name]) for name in frozen)
        trained = [name for name in steps[0] if name.startswith("weights/") and "lora" in name]
        assert all(steps[0][name].dtype == torch.float32 for name in trained)
        assert not any(torch.equal(steps[0][name], steps[-1][name]) for name in trained)
        assert {name.partition("/")[2] for name in steps[0] if name.startswith("gradients/")} == {
            name.partition("/")[2] for name in trained
        }
    return found


def test_in_bfloat16_the_base_is_stored_in_it_and_never_moves(pair, data):
    found = pair.run(bfloat16, str(data))[0]
    assert found["ddp"][-1] < found["ddp"][0]
    for losses in found.values():
        assert losses == pytest.approx(found["ddp"], rel=4e-3)
