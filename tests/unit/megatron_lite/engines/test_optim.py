"""Schedules, what decays, and the norm of the global gradient."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_lite.config import ModelConfig, OptimConfig
from megatron_lite.distributed.mesh import Axis, solo_mesh
from megatron_lite.distributed.shard import ShardSpec, spec_of
from megatron_lite.engines.engine import Engine
from megatron_lite.engines.optim import build_adamw, gradient_norm, learning_rate, scale_gradients
from megatron_lite.models.decoder import Decoder

STEPS = 100


def rates(**settings):
    config = OptimConfig(lr=2.0, warmup_steps=10, min_lr_ratio=0.1, **settings)
    return [learning_rate(config, step, STEPS) for step in range(STEPS + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_linearly_and_never_rises_again(schedule):
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert found[10] == pytest.approx(2.0)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(found[10:]))
    assert found[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)


def test_the_shapes():
    halfway = 10 + (STEPS - 10) // 2
    assert rates(schedule="linear")[halfway] == pytest.approx(1.1)
    assert rates(schedule="cosine")[halfway] == pytest.approx(1.1)
    quarter = rates(schedule="cosine")[10 + 30]
    assert quarter == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 3)) / 2)
    stable = rates(schedule="wsd", decay_steps=20)
    assert stable[80] == pytest.approx(2.0)
    assert stable[90] == pytest.approx(1.1)
    assert rates(schedule="wsd")[90] == pytest.approx(2.0)  # the last tenth, unless told otherwise


def test_a_decay_that_nobody_gave_begins_after_the_warm_up():
    config = OptimConfig(lr=2.0, warmup_steps=97, schedule="wsd", min_lr_ratio=0.0)
    assert [learning_rate(config, step, STEPS) for step in (96, 97, 98, 99)] == pytest.approx([2, 2, 4 / 3, 2 / 3])


def test_norms_biases_and_embeddings_do_not_decay():
    config = ModelConfig(family="gpt2", vocab_size=64, hidden_size=16, num_heads=2, num_layers=1, max_seq_len=8)
    model = Decoder(config, Axis("tp"), sp=False)
    specs = {name: spec_of(parameter) for name, parameter in model.named_parameters()}
    optimizer = build_adamw(model, specs, OptimConfig(weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    by_decay = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    matrices = {f"blocks.0.{part}.weight" for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}
    assert by_decay == {0.3: matrices, 0.0: set(names.values()) - matrices}


@pytest.mark.parametrize(
    ("spec", "copies"),
    [
        (ShardSpec((8, 8), dim=0), 5),  # split over tp: the same on all of cp
        (ShardSpec((8, 8), dim=0, axis="cp"), 3),
        (ShardSpec((8, 8)), 15),
    ],
)
def test_so_many_ranks_hold_the_same_gradient(spec, copies):
    sizes = {"pp": 2, "dp_shard": 7, "tp": 3, "cp": 5}
    axes = {name: Axis(name, size=size) for name, size in sizes.items()}
    mesh = replace(solo_mesh(), **axes, world=Axis("world", size=math.prod(sizes.values())))
    engine = SimpleNamespace(specs={"weight": spec}, mesh=mesh)
    assert Engine.copies(engine, "weight") == copies


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_torchs(limit):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,), (2, 2, 2))]
    theirs = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient.clone()
    want = torch.nn.utils.clip_grad_norm_(theirs, limit)
    norm = gradient_norm(((gradient, 1) for gradient in gradients), Axis("world"))
    scale_gradients(gradients, norm, limit)
    torch.testing.assert_close(norm.float(), want)
    for gradient, parameter in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
