"""Every engine, with and without tensor parallelism, trains what one process trains, in float64, with clipping on."""

from itertools import product

import pytest

from megatron_lite.dist.spawn import run_ranks
from tests.kit.parity import STEPS, TOLERANCE, Case, Layout, run_cases
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
        cases[f"{engine}: small buckets"] = Case(Layout(dp=4, accumulation=2, parallel={**keys, **SMALL_BUCKETS}))
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
    "deepspeed, zero 0": deepspeed_averages,
    "deepspeed, zero 1": deepspeed_averages,
    "deepspeed, zero 2": deepspeed_averages,
    "deepspeed, zero 3": loss_not_scaled_up,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    data = str(tiny_data(tmp_path_factory.mktemp("engines")))
    planted = {f"bug in {engine}": Case(Layout(dp=4, parallel=ENGINES[engine]), plant=BUGS[engine]) for engine in BUGS}
    return run_ranks(run_cases, 4, data, {**CASES, **planted}, timeout=170)[0]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", CASES)
def test_equal(rows, case):
    assert len(rows[case]) == 5 * STEPS
    worst = max(rows[case], key=lambda row: row.difference)
    assert worst.difference <= TOLERANCE, worst


@pytest.mark.timeout(180)
@pytest.mark.parametrize("engine", BUGS)
def test_wrong_scaling_of_gradients_is_found(rows, engine):
    first = next(row for row in rows[f"bug in {engine}"] if row.first_beyond is not None)
    assert (first.step, first.kind) == (1, "gradients")
