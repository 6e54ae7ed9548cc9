"""Every engine, with and without tensor parallelism, trains what one process trains, in float64, with clipping on."""

from itertools import product

import pytest

from tests.kit.covering import covering
from tests.kit.engines import ENGINES, HYBRID
from tests.kit.optional import optional
from tests.kit.parity import Case, Layout, assert_equal, run_case, train

optional("deepspeed", "deepspeed")

MODELS = {"llama tied": {"tie_embeddings": True}, "gpt2": {"family": "gpt2"}}
WIDTHS = {"dp 4": {"dp": 4}, "dp 2 × tp 2, sp": {"dp": 2, "tp": 2}}
WITH_HYBRID = {**ENGINES, "fsdp, hybrid": HYBRID}
SMALL_BUCKETS = {"bucket_mb": 0.01}


PRODUCT = {
    f"{engine}: {model}, {width}, accumulation {accumulation}": {
        **{"engine": engine, "model": model, "width": width, "accumulation": accumulation},
    }
    for engine, model, width, accumulation in product(WITH_HYBRID, MODELS, WIDTHS, (1, 4))
    if not (engine == "fsdp, hybrid" and "tp" in WIDTHS[width])
}


def table() -> dict[str, Case]:
    cases = {}
    for name, of in PRODUCT.items():
        sp = {"sp": True} if "tp" in WIDTHS[of["width"]] else {}
        keys = {**WITH_HYBRID[of["engine"]], **sp}
        layout = Layout(**WIDTHS[of["width"]], accumulation=of["accumulation"], parallel=keys)
        cases[name] = Case(layout, {"model": MODELS[of["model"]]})
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
    kept = {"engine": "deepspeed", "zero": 3}  # its default
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


@pytest.mark.parametrize("case", covering(CASES, PRODUCT))
def test_equal(parity, case):
    assert_equal(parity(CASES[case]))


@pytest.mark.parametrize("engine", BUGS)
def test_wrong_scaling_of_gradients_is_found(parity, engine):
    rows = parity(Case(Layout(dp=4, parallel=WITH_HYBRID[engine]), plant=BUGS[engine]))
    first = next(row for row in rows if row.first_beyond is not None)
    assert (first.step, first.kind) == (1, "gradients")


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("model", MODELS)
def test_hybrid_sharding_with_tensor_parallelism_is_equal(worlds, data, model, accumulation):
    """The one layout of the table that takes eight ranks."""
    layout = Layout(dp=4, tp=2, accumulation=accumulation, parallel={**HYBRID, "sp": True})
    assert_equal(worlds(8).run(run_case, str(data), Case(layout, {"model": MODELS[model]}))[0])


def curves(rank: int, size: int, data: str, precision: str) -> dict[str, list[float]]:
    """The losses of a few steps under every engine."""
    changes = {"train": {"precision": precision}}
    layouts = {engine: Layout(dp=2, accumulation=2, parallel=keys) for engine, keys in ENGINES.items()}
    records = {engine: train(layout, data, changes, None, steps=8) for engine, layout in layouts.items()}
    return {engine: [float(step["loss/loss"]) for step in steps] for engine, steps in records.items()}


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-6), ("bfloat16", 2e-3)])
def test_nobody_can_tell_from_the_losses_which_engine_ran(pair, data, precision, tolerance):
    """In bfloat16 DeepSpeed's stages 1 to 3 hold the embedding in it, too, which the others keep in float32."""
    found = pair.run(curves, str(data), precision)[0]
    assert len(found["ddp"]) == 8 and found["ddp"][-1] < found["ddp"][0]
    for losses in found.values():
        assert losses == pytest.approx(found["ddp"], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in ("ddp", "deepspeed, zero 3")])
def test_compiled_blocks_are_equal(pair, data, engine):
    case = Case(Layout(dp=2, compile=True, parallel=ENGINES[engine]))
    assert_equal(pair.run(run_case, str(data), case, timeout=280)[0])
