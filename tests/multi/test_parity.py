"""The parity table: every layout trains what one process trains, in float64, with clipping on.

Compared at each step: block outputs, loss, every gradient before and after clipping, every weight after the update.
"""

import pytest
import torch

from megatron_lite.distributed.mesh import Axis
from tests.kit.covering import covering
from tests.kit.parity import STEPS, Case, Layout, assert_equal

MODELS = {
    "llama": {},
    "llama tied, grouped kv": {"num_kv_heads": 2, "tie_embeddings": True},
    "llama 1 kv head, qkv bias": {"num_kv_heads": 1, "qkv_bias": True},
    "llama, normed queries and keys": {"num_kv_heads": 2, "qk_norm": True},
    "gpt2": {"family": "gpt2"},
    "gpt2 untied, grouped kv": {"family": "gpt2", "num_kv_heads": 2, "tie_embeddings": False},
}
SP = {"sp": True}
LAYOUTS = {
    "tp 2": Layout(tp=2),
    "tp 4": Layout(tp=4),
    "tp 2, sp": Layout(tp=2, parallel=SP),
    "tp 4, sp": Layout(tp=4, parallel=SP),
    "dp 2": Layout(dp=2),
    "dp 4": Layout(dp=4),
    "dp 2 × tp 2": Layout(dp=2, tp=2),
    "dp 2 × tp 2, sp, accumulation 2": Layout(dp=2, tp=2, accumulation=2, parallel=SP),
    "accumulation 4": Layout(accumulation=4),
    "dp 2, accumulation 4, small buckets": Layout(dp=2, accumulation=4, parallel={"bucket_mb": 0.01}),
    "selective recomputation": Layout(parallel={"recompute": "selective"}),
    "full recomputation": Layout(parallel={"recompute": "full"}),
    "tp 2, sp, selective recomputation": Layout(tp=2, parallel={**SP, "recompute": "selective"}),
    "dp 2 × tp 2, sp, full recomputation": Layout(dp=2, tp=2, parallel={**SP, "recompute": "full"}),
}
DROPOUT = {"model": {"dropout": 0.1, "attention_dropout": 0.1}}
ACCUMULATED = Layout(accumulation=2)  # dropout masks belong to micro batches, so these must be the same


def table() -> dict[str, Case]:
    cases = {
        f"{model}: {layout}": Case(LAYOUTS[layout], {"model": MODELS[model]}) for model in MODELS for layout in LAYOUTS
    }
    for layout in ("dp 2 × tp 2", "tp 4, sp"):
        cases[f"document mask: {layout}"] = Case(LAYOUTS[layout], {"data": {"document_mask": True}})
        cases[f"gpt2, document mask: {layout}"] = Case(
            LAYOUTS[layout], {"data": {"document_mask": True}, "model": {"family": "gpt2"}}
        )
    for recompute in ("none", "selective", "full"):
        parallel = {"recompute": recompute}
        cases[f"dropout, {recompute} recomputation: dp 2"] = Case(Layout(dp=2, parallel=parallel), DROPOUT, ACCUMULATED)
        cases[f"dropout, {recompute} recomputation: accumulation"] = Case(
            Layout(accumulation=2, parallel=parallel), DROPOUT, ACCUMULATED
        )
    residual = {"model": {"dropout": 0.1}}  # the mask is that of whole tokens, which tp does not split
    cases["dropout of residuals: tp 2"] = Case(Layout(tp=2), residual)
    scaling = {"type": "llama3", "factor": 4.0, "original_max_seq_len": 8}
    cases["scaled rotation: tp 2, sp"] = Case(LAYOUTS["tp 2, sp"], {"model": {"rope_scaling": scaling}})
    cases["compiled"] = Case(Layout(compile=True))
    cases["compiled: tp 2, sp"] = Case(Layout(tp=2, parallel=SP, compile=True))
    return cases


def aspects(model: str, layout: Layout) -> dict[str, object]:
    """What may matter to each other."""
    parallel = {"recompute": "none", "sp": False, "bucket_mb": None, **layout.parallel}
    return {"model": model, "dp": layout.dp, "tp": layout.tp, "accumulation": layout.accumulation, **parallel}


CASES = table()
PRODUCT = {f"{m}: {name}": aspects(m, layout) for m in MODELS for name, layout in LAYOUTS.items()}
NARROW = {  # where updates as large as the weights would be of the sign of a rounding
    f"{model}, {optimizer}, {precision}": Case(
        Layout(dp=2, tp=2, parallel=SP),
        {
            "model": MODELS[model],
            "optim": {"name": optimizer, "lr": 0.1, "clip": 0.1},
            "train": {"precision": precision},
        },
    )
    for precision in ("bfloat16", "float32")
    for model, optimizer in (("llama", "adamw"), ("gpt2", "adamw"), ("gpt2", "adafactor"))
}


def no_sum(trainer):
    """One attention layer passes on its partial sum."""
    out = trainer.model.blocks[1].attention.out
    out.forward = lambda x, seed: x @ out.weight.to(x.dtype).t()


def no_norm_reduction(trainer):
    """Under sequence parallelism a norm's gradient stays that of this rank's tokens."""
    trainer.model.blocks[0].mlp_norm.partial = Axis("tp")


def norm_of_the_shard(trainer):
    """Clipping goes by the norm of this rank's shard."""
    engine = trainer.engine
    engine.finish_gradients = lambda: (
        torch.stack([gradient.square().sum() for gradient in engine.local_gradients().values()]).sum().sqrt()
    )


def averaged_over_dp(trainer):
    """Gradients are averaged, as DDP does, and clipping would hide it."""
    engine, finish = trainer.engine, trainer.engine.finish_gradients

    def halved():
        norm = finish()
        for gradient in engine.local_gradients().values():
            gradient.div_(2)
        return norm / 2

    engine.finish_gradients = halved


def no_dp_reduction(trainer):
    """Every data-parallel rank goes by its own gradient; the last bucket is forgotten."""
    engine, finish = trainer.engine, trainer.engine.finish_gradients

    def own():
        norm = finish()
        if trainer.mesh.dp.rank:
            engine.local_gradients()["embedding.weight"].mul_(1.001)
        return norm

    engine.finish_gradients = own


def every_weight_decays(trainer):
    """Weight decay reaches the norms, too."""
    for group in trainer.engine.optimizer.param_groups:
        group["weight_decay"] = 0.1


BUGS = {  # what is planted in which layout, and where it shows first
    no_sum: (Layout(tp=2), "block outputs", "blocks.1"),
    no_norm_reduction: (Layout(tp=2, parallel=SP), "gradients", "blocks.0.mlp_norm.weight"),
    norm_of_the_shard: (Layout(tp=2), "clipped gradients", "head.weight"),
    averaged_over_dp: (Layout(dp=2), "gradients", "head.weight"),
    no_dp_reduction: (Layout(dp=2), "gradients", "embedding.weight"),
    every_weight_decays: (Layout(), "weights", "embedding.weight"),
}
FORMATS = ("float64", "float32", "bfloat16")
FOUND_IN = {  # the others are larger than the roundings of any format
    no_dp_reduction: ("float64",),
    every_weight_decays: ("float64",),
}


@pytest.mark.parametrize("case", covering(CASES, PRODUCT, slow=["compiled: tp 2, sp"]))
def test_equal(parity, case):
    assert_equal(parity(CASES[case]))


@pytest.mark.parametrize("case", NARROW)
def test_equal_as_far_as_a_narrow_format_goes(parity, case):
    assert [row for row in parity(NARROW[case]) if row.first_beyond is not None] == []


@pytest.mark.parametrize("layout", ["tp 2, sp", "dp 2", "full recomputation"])
def test_a_vanishing_gradient_is_not_enlarged(parity, layout):
    """gpt2's key bias, whose gradient is zero but for rounding."""
    found = {(row.step, row.kind): row.difference for row in parity(CASES[f"gpt2: {layout}"])}
    for step in range(1, STEPS + 1):
        assert found[step, "weights"] <= found[step, "clipped gradients"] + 1e-14


@pytest.mark.parametrize(
    ("bug", "precision"),
    [(bug, precision) for bug in BUGS for precision in FOUND_IN.get(bug, FORMATS)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_planted_bug_is_found_where_it_is(parity, bug, precision):
    layout, kind, tensor = BUGS[bug]
    rows = parity(Case(layout, {"train": {"precision": precision}}, plant=bug))
    first = next(row for row in rows if row.first_beyond is not None)
    assert (first.step, first.kind, first.first_beyond[0]) == (1, kind, tensor)
