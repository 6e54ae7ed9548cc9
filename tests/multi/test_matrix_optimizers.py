"""Muon and Adafactor do to sharded matrices what torch's own do to whole ones, in float64, with clipping on."""

from itertools import product

import pytest
import torch

from megatron_lite.config import Config
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import spec_of
from megatron_lite.engines.optim import learning_rate
from megatron_lite.models.decoder import Decoder
from megatron_lite.proof.record import Record
from tests.kit.covering import covering
from tests.kit.parity import Case, Layout, assert_equal, train

LAYOUTS = {
    "ddp": Layout(dp=4),
    "ddp, tp 2": Layout(dp=2, tp=2),
    "fsdp, zero 2": Layout(dp=4, accumulation=2, parallel={"zero": 2}),
    "fsdp, zero 3, tp 2, sp": Layout(dp=2, tp=2, parallel={"zero": 3, "sp": True}),
    "fsdp, hybrid": Layout(dp=4, parallel={"zero": 3, "dp_replicate": 2}),
    "tp 4": Layout(tp=4),
}
# Without a bias of the keys: its gradient is zero but for rounding, which Adafactor scales up to a real update.
MODELS = {"llama": {"num_kv_heads": 2}, "gpt2": {"family": "gpt2", "qkv_bias": False}}
OPTIMIZERS = ("muon", "adafactor")


def changes(optimizer: str, model: str) -> dict:
    return {"optim": {"name": optimizer}, "model": MODELS[model]}


PRODUCT = {
    f"{optimizer}: {model}, {layout}": {"optimizer": optimizer, "model": model, "layout": layout}
    for optimizer, model, layout in product(OPTIMIZERS, MODELS, LAYOUTS)
}
CASES = {name: Case(LAYOUTS[of["layout"]], changes(of["optimizer"], of["model"])) for name, of in PRODUCT.items()}
ALONE = {f"{optimizer}: {model}": changes(optimizer, model) for optimizer, model in product(OPTIMIZERS, MODELS)}


def by_hand(record: list[Record], config: Config) -> float:
    """The largest difference between the weights after each step and what torch's optimizer makes, from the gradients
    of that step, of matrices that were never fused."""
    with torch.device("meta"):
        specs = {name: spec_of(p) for name, p in Decoder(config.model, Axis("tp"), sp=False).named_parameters()}
    optim, leaves, whole, rest = config.optim, {}, {True: [], False: []}, {True: [], False: []}
    for name, spec in specs.items():
        chunks = record[0][f"start/{name}"].split(spec.chunks or spec.shape[0])
        leaves[name] = [torch.nn.Parameter(chunk.clone()) for chunk in chunks]
        muon = name.startswith("blocks.") and len(spec.shape) == 2
        kind = whole if optim.name == "adafactor" or muon else rest
        kind[len(spec.shape) == 2 and not name.startswith(("embedding", "positions"))] += leaves[name]

    def groups(kind):
        return [{"params": kind[decay], "weight_decay": optim.weight_decay * decay} for decay in (True, False)]

    if optim.name == "muon":
        matrices = torch.optim.Muon(groups(whole), momentum=0.95, adjust_lr_fn="match_rms_adamw")
    else:
        matrices = torch.optim.Adafactor(groups(whole))
    optimizers = [matrices, torch.optim.AdamW(groups(rest), betas=optim.betas, eps=optim.eps)]
    worst = 0.0
    for step, noted in enumerate(record):
        for name, parts in leaves.items():
            gradients = noted[f"clipped gradients/{name}"].split([len(part) for part in parts])
            for part, gradient in zip(parts, gradients, strict=True):
                part.grad = gradient
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, step, config.train.steps)
            optimizer.step()
        for name, parts in leaves.items():
            gap = torch.cat([part.detach() for part in parts]) - noted[f"weights/{name}"]
            worst = max(worst, float(gap.abs().max()))
    return worst


def alone(rank: int, size: int, data: str, changed: dict) -> float | None:
    starts: Record = {}

    def note(trainer):
        starts.update({f"start/{n}": p.detach().clone() for n, p in trainer.model.named_parameters()})

    record = train(Layout(), data, changed, note, steps=4, moments=False)
    return by_hand([{**record[0], **starts}, *record[1:]], Layout().config(data, changed)) if rank == 0 else None


@pytest.mark.parametrize("case", covering(CASES, PRODUCT))
def test_sharded_is_whole(parity, case):
    assert_equal(parity(CASES[case]))


@pytest.mark.parametrize("name", ALONE)
def test_whole_is_what_torch_does(world, data, name):
    assert 0 <= world.run(alone, str(data), ALONE[name])[0] <= 1e-12
