"""Text is sampled while every PEFT method trains: what the model says without a cache, and no step differs for it."""

from functools import cache

import pytest
import torch

from megatron_lite.inference.requests import Sampling
from megatron_lite.inference.sampling import generate
from megatron_lite.layers.context import Context
from megatron_lite.planning.plan import make_plan
from megatron_lite.proof.record import batches
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer
from tests.kit.engines import ENGINES
from tests.kit.methods import METHODS
from tests.kit.parity import Layout, mesh_of, ruffle

LAYOUTS = {
    "tp 2, sp": (Layout(tp=2, parallel={"sp": True}), METHODS),
    "fsdp, zero 3": (Layout(dp=2, parallel={"zero": 3}), METHODS),
    "deepspeed, zero 3": (
        Layout(dp=2, parallel=ENGINES["deepspeed, zero 3"]),
        ("lora", "adapter", "prefix by an mlp"),
    ),
    "recomputed": (
        Layout(tp=2, parallel={"sp": True, "recompute": "full", "offload_activations": True}),
        ("lora", "prefix"),
    ),
}
PROMPT, NEW = [5, 17, 40, 2, 33], 10


def uncached(model, prompt, count):
    """The same by reading everything again for each token."""
    tokens = list(prompt)
    with torch.no_grad(), model.whole_tokens():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), Context(torch.float64)).argmax()))
    return tokens[len(prompt) :]


def losses(config, mesh, size, sample):
    """Of two steps; ``sample`` is shown the model after each."""
    trainer = Trainer(config, mesh, make_plan(config, size), Faults.none())
    ruffle(trainer)
    loader = batches(trainer)
    found = []
    for _ in range(2):
        found.append(trainer.train_step(next(loader)).loss)
        sample(trainer.model)
    return found


def samples(rank, size, data, method, layout):
    """Losses with and without samples between steps, and the samples."""
    optim = {"lr": 2.0 if method == "prefix" else 0.05}
    model = {"max_seq_len": 48, "num_kv_heads": 2}
    config = layout.config(data, {"peft": METHODS[method], "model": model, "optim": optim})
    mesh, said = mesh_of(make_plan(config, size).degrees, size), []

    def sample(model):
        cached = generate(model, PROMPT, Sampling(max_new_tokens=NEW), (), torch.float64)
        said.append((cached, uncached(model, PROMPT, NEW)))

    with_samples = losses(config, mesh, size, sample)
    return with_samples, losses(config, mesh, size, lambda model: None), said


@pytest.fixture(scope="module")
def sampled(pair, data):
    return cache(lambda method, title: pair.run(samples, str(data), method, LAYOUTS[title][0]))


@pytest.mark.parametrize(
    ("title", "method"), [(title, method) for title, (_, some) in LAYOUTS.items() for method in some]
)
def test_what_is_said_and_what_is_learned(sampled, title, method):
    (with_samples, without, said), (_, _, by_the_other) = sampled(method, title)
    assert with_samples == without
    assert all(cached == uncached for cached, uncached in said)
    assert said == by_the_other == sampled(method, "tp 2, sp")[0][2]
    assert len({str(cached) for cached, _ in said}) > 1  # it learns between them
