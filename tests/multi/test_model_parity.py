"""One forward and backward at tp 1, 2 and 4, sequence parallel on and off: the same loss and gradients in float64."""

import math

import pytest
import torch

from megatron_lite.config import ModelConfig
from megatron_lite.dist import shard
from megatron_lite.dist.mesh import build_mesh, solo_mesh
from megatron_lite.dist.spawn import run_ranks
from megatron_lite.models.decoder import Decoder

VOCAB = 101  # not a multiple of anything: the padded rows must not matter

MODELS = {
    "llama": {"family": "llama", "num_kv_heads": 4},
    "llama, tied, grouped": {"family": "llama", "num_kv_heads": 2, "tie_embeddings": True},
    "llama, kv heads < tp": {"family": "llama", "num_kv_heads": 1, "qkv_bias": True},
    "gpt2, tied": {"family": "gpt2"},
    "gpt2, untied": {"family": "gpt2", "num_kv_heads": 2, "tie_embeddings": False},
}


def model_config(overrides):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 64, "max_seq_len": 32}
    return ModelConfig(vocab_size=VOCAB, vocab_multiple=8, init_std=0.2, **sizes, **overrides)


def loss_and_gradients(config, mesh, sp):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2, 17), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3] = -100
    model = Decoder(config, mesh.tp, sp=sp).double()
    shard.check_model(model, mesh.tp.size)
    shard.initialize(model, 1, mesh.tp)
    with torch.no_grad():  # zeros and ones would hide a missing or doubled term
        for _, parameter, spec in shard.named_shards(model):
            wave = 0.01 * torch.arange(math.prod(spec.shape)).sin()
            parameter += spec.take(wave.double().view(spec.shape), mesh.tp.rank, mesh.tp.size)
    loss = model(inputs, targets, dtype=torch.float64) / 31
    loss.backward()
    return loss.item(), {name: (p.grad, spec) for name, p, spec in shard.named_shards(model)}


def compare_layouts(rank, size):
    rows = []
    for name, overrides in MODELS.items():
        config = model_config(overrides)
        want_loss, want = loss_and_gradients(config, solo_mesh(), False)
        for tp in (2, 4):
            mesh = build_mesh({"tp": tp}, torch.device("cpu"), ranks=list(range(tp)))
            for sp in (False, True):
                if mesh is None:
                    continue
                loss, gradients = loss_and_gradients(config, mesh, sp)
                rows.append((f"{name} tp={tp} sp={sp}", "loss", abs(loss - want_loss) / want_loss))
                for parameter, (gradient, spec) in gradients.items():
                    whole = want[parameter][0]
                    difference = (gradient - spec.take(whole, mesh.tp.rank, tp)).abs().max() / whole.abs().max()
                    rows.append((f"{name} tp={tp} sp={sp}", parameter, difference.item()))
    return rows


@pytest.fixture(scope="module")
def rows():
    return [row for rank_rows in run_ranks(compare_layouts, 4) for row in rank_rows]


@pytest.mark.parametrize("model", MODELS)
def test_loss_and_every_gradient_agree_at_every_degree(rows, model):
    mine = [row for row in rows if row[0].startswith(f"{model} tp=")]
    assert len({case for case, _, _ in mine}) == 4
    worst = max(mine, key=lambda row: row[2])
    assert worst[2] <= 1e-10, worst
