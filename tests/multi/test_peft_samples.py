"""Text is sampled while every PEFT method trains: what the model says without a cache, and no step differs for it."""

import pytest
import torch

from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.inference.requests import Sampling
from megatron_lite.inference.sampling import generate
from megatron_lite.layers.context import Context
from megatron_lite.planning.plan import make_plan
from megatron_lite.proof.record import batches
from megatron_lite.training.faults import Faults
from megatron_lite.training.step import Trainer
from tests.kit.parity import Layout, ruffle
from tests.kit.tiny import tiny_data
from tests.multi.test_peft import ALL_DIVIDED, METHODS

SPLIT = Layout(tp=2, parallel={"sp": True})
LAYOUTS = {
    "fsdp, zero 3": (Layout(dp=2, parallel={"zero": 3}), METHODS),
    "deepspeed, zero 3": (
        Layout(dp=2, parallel={"engine": "deepspeed", "zero": 3, "deepspeed": ALL_DIVIDED}),
        ("lora", "adapter", "prefix by an mlp"),
    ),
    "recomputed": (
        Layout(tp=2, parallel={"sp": True, "recompute": "full", "offload_activations": True}),
        ("lora", "prefix"),
    ),
}
CASES = {f"{method}: tp 2, sp": (method, SPLIT) for method in METHODS}
CASES |= {f"{method}: {title}": (method, layout) for title, (layout, some) in LAYOUTS.items() for method in some}
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


def samples(rank, size, data):
    """For every case: losses with and without samples between steps, and the samples."""
    found, meshes = {}, {}
    for case, (method, layout) in CASES.items():
        optim = {"lr": 2.0 if method == "prefix" else 0.05}
        model = {"max_seq_len": 48, "num_kv_heads": 2}
        config = layout.config(data, {"peft": METHODS[method], "model": model, "optim": optim})
        degrees = make_plan(config, size).degrees
        if str(degrees) not in meshes:
            meshes[str(degrees)] = build_mesh(degrees, torch.device("cpu"))
        mesh, said = meshes[str(degrees)], []

        def sample(model, said=said):
            cached = generate(model, PROMPT, Sampling(max_new_tokens=NEW), (), torch.float64)
            said.append((cached, uncached(model, PROMPT, NEW)))

        with_samples = losses(config, mesh, size, sample)
        found[case] = with_samples, losses(config, mesh, size, lambda model: None), said
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(samples, 2, str(tiny_data(tmp_path_factory.mktemp("samples"))), timeout=400)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_and_what_is_learned(found, case):
    with_samples, without, said = found[0][case]
    assert with_samples == without
    assert all(cached == uncached for cached, uncached in said)
    assert said == found[1][case][2] == found[0][f"{CASES[case][0]}: tp 2, sp"][2]
    assert len({str(cached) for cached, _ in said}) > 1  # it learns between them
