"""Every engine, with and without tensor parallelism, trains what one process trains, in float64, with clipping on."""

from itertools import product

import pytest

from megatron_lite.distributed.spawn import run_ranks
from tests.kit.parity import STEPS, TOLERANCE, Case, Layout, run_cases, train
from tests.kit.tiny import tiny_data

pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install '.[deepspeed]')")

ALL_DIVIDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # else no tensor is large enough here
ENGINES = {
    "ddp": {},
    "fsdp, zero 2": {"zero": 2},
    "fsdp, zero 3": {"zero": 3},
    **{f"deepspeed, zero {stage}": {"engine": "deepspeed", "zero": stage} for stage in range(3)},
    "deepspeed, zero 3": {"engine": "deepspeed", "zero": 3, "deepspeed": ALL_DIVIDED},
}
HYBRID = {"zero": 3, "dp_replicate": 2}
MODELS = {"llama tied": {"tie_embeddings": True}, "gpt2": {"family": "gpt2"}}
WIDTHS = {"dp 4": {"dp": 4}, "dp 2 × tp 2, sp": {"dp": 2, "tp": 2}}
SMALL_BUCKETS = {"bucket_mb": 0.01}


def table() -> dict[str, Case]:
    cases = {}
    for (model, changes), (width, degrees), accumulation in product(MODELS.items(), WIDTHS.items(), (1, 4)):
        sp = {"sp": True} if "tp" in degrees else {}
        engines = ENGINES if sp else {**ENGINES, "fsdp, hybrid": HYBRID}
        for engine, keys in engines.items():
            layout = Layout(**degrees, accumulation=accumulation, parallel={**keys, **sp})
            cases[f"{engine}: {model}, {width}, accumulation {accumulation}"] = Case(layout, {"model": changes})
    for engine, keys in ENGINES.items():
        cases[f"{engine}: full recomputation"] = Case(Layout(dp=4, parallel={**keys, "recompute": "full"}))
        cases[f"{engine}: selective recomputation"] = Case(
            Layout(dp=2, tp=2, parallel={**keys, "recompute": "selective"})
        )
        offloaded = {**keys, "offload_activations": True, "recompute": "full" if "2" in engine else "none"}
        cases[f"{engine}: activation offload"] = Case(Layout(dp=2, tp=2, parallel=offloaded))
        cases[f"{engine}: small buckets"] = Case(Layout(dp=4, accumulation=2, parallel={**keys, **SMALL_BUCKETS}))
    for keys in ({"prefetch": 0}, {"prefetch": 5}, {"reduce_once": True}):
        layout = Layout(dp=4, accumulation=4, parallel={"zero": 3, **keys})
        cases[f"fsdp, zero 3: {next(iter(keys.items()))}"] = Case(layout)
    cases["fsdp, hybrid: reduce_once"] = Case(Layout(dp=4, accumulation=4, parallel={**HYBRID, "reduce_once": True}))
    kept = {"engine": "deepspeed", "zero": 3}  # DeepSpeed keeps tensors as small as these whole on every rank
    cases["deepspeed, zero 3: small tensors kept"] = Case(Layout(dp=4, parallel=kept))
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")):
        keys = ENGINES[f"deepspeed, zero {stage}"]
        cases[f"deepspeed, zero {stage}: offload {offload}"] = Case(Layout(dp=4, parallel={**keys, "offload": offload}))
    return cases


CASES = table()


def fsdp_averages(trainer):
    """FSDP2's default."""
    for module in trainer.model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(float(trainer.mesh.dp.size))


def deepspeed_averages(trainer):
    """DeepSpeed's default."""
    trainer.engine.engine.gradient_average = trainer.engine.zero.gradient_average = True


def loss_not_scaled_up(trainer):
    """ZeRO 3 divides by dp, and nobody multiplies."""
    engine = trainer.engine
    backward = engine.backward
    engine.backward = lambda loss, last: backward(loss / trainer.mesh.dp.size, last=last)


BUGS = {
    "fsdp, zero 2": fsdp_averages,
    "fsdp, zero 3": fsdp_averages,
    "fsdp, hybrid": fsdp_averages,
    "deepspeed, zero 0": deepspeed_averages,
    "deepspeed, zero 1": deepspeed_averages,
    "deepspeed, zero 2": deepspeed_averages,
    "deepspeed, zero 3": loss_not_scaled_up,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    data = str(tiny_data(tmp_path_factory.mktemp("engines")))
    keys = {**ENGINES, "fsdp, hybrid": HYBRID}
    planted = {f"bug in {engine}": Case(Layout(dp=4, parallel=keys[engine]), plant=BUGS[engine]) for engine in BUGS}
    return run_ranks(run_cases, 4, data, {**CASES, **planted}, timeout=280)[0]


@pytest.mark.timeout(290)
@pytest.mark.parametrize("case", CASES)
def test_equal(rows, case):
    assert len(rows[case]) == 5 * STEPS
    worst = max(rows[case], key=lambda row: row.difference)
    assert worst.difference <= TOLERANCE, worst


@pytest.mark.timeout(290)
@pytest.mark.parametrize("engine", BUGS)
def test_wrong_scaling_of_gradients_is_found(rows, engine):
    first = next(row for row in rows[f"bug in {engine}"] if row.first_beyond is not None)
    assert (first.step, first.kind) == (1, "gradients")


@pytest.mark.slow
def test_hybrid_sharding_with_tensor_parallelism_is_equal(tmp_path):
    """The one layout of the table that takes eight ranks."""
    cases = {
        f"{model}, accumulation {accumulation}": Case(
            Layout(dp=4, tp=2, accumulation=accumulation, parallel={**HYBRID, "sp": True}), {"model": changes}
        )
        for (model, changes), accumulation in product(MODELS.items(), (1, 4))
    }
    rows = run_ranks(run_cases, 8, str(tiny_data(tmp_path)), cases, timeout=280)[0]
    assert all(len(rows[case]) == 5 * STEPS for case in cases)
    assert max(row.difference for case in cases for row in rows[case]) <= TOLERANCE


def curves(rank: int, size: int, data: str, precision: str) -> dict[str, list[float]]:
    """The losses of a few steps under every engine."""
    changes = {"train": {"precision": precision}}
    layouts = {engine: Layout(dp=2, accumulation=2, parallel=keys) for engine, keys in ENGINES.items()}
    records = {engine: train(layout, data, changes, None, steps=8) for engine, layout in layouts.items()}
    return {engine: [float(step["loss/loss"]) for step in steps] for engine, steps in records.items()}


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-6), ("bfloat16", 2e-3)])
def test_nobody_can_tell_from_the_losses_which_engine_ran(tmp_path, precision, tolerance):
    """In bfloat16 DeepSpeed's stages 1 to 3 hold the embedding in it, too, which the others keep in float32."""
    found = run_ranks(curves, 2, str(tiny_data(tmp_path)), precision, timeout=280)[0]
    assert len(found["ddp"]) == 8 and found["ddp"][-1] < found["ddp"][0]
    for losses in found.values():
        assert losses == pytest.approx(found["ddp"], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in ("ddp", "deepspeed, zero 3")])
def test_compiled_blocks_are_equal(tmp_path, engine):
    case = Case(Layout(dp=2, compile=True, parallel=ENGINES[engine]))
    rows = run_ranks(run_cases, 2, str(tiny_data(tmp_path)), {"compiled": case}, timeout=280)[0]["compiled"]
    assert len(rows) == 5 * STEPS
    assert max(row.difference for row in rows) <= TOLERANCE
