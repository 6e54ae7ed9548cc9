"""A model cut into stages computes what it computes in one, with parameters of the same names."""

import pytest
import torch

from megatron_lite.config import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import initialize, inits_of, pieces_of
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.head import cross_entropy
from megatron_lite.models.stage import Stage
from tests.kit.adapters import FAMILIES

TOKENS = torch.tensor([[5, 17, 40, 2, 33, 21, 60, 8], [7, 7, 3, 50, 12, 1, 30, 44]])


def build(family, tied, stage=None):
    keys = {"vocab_size": 61, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_seq_len": 16, "init_std": 0.3}
    config = ModelConfig(**keys, **FAMILIES[family], tie_embeddings=tied, dropout=0.1)
    model = Decoder(config, Axis("tp"), sp=False, stage=stage).double()
    initialize(pieces_of(model, Axis("tp")), inits_of(model), 1)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_in_turn_are_the_model(family, tied):
    whole = build(family, tied)
    first = build(family, tied, Stage(range(0, 2), last=False))
    last = build(family, tied, Stage(range(2, 3), first=False))
    names = [{name for name, _ in model.named_parameters()} for model in (whole, first, last)]
    assert names[0] == names[1] | names[2]
    assert names[1] & names[2] == ({"embedding.weight"} if tied else set())
    context = Context(torch.float64, seed=3)
    want = whole(TOKENS, context, cross_entropy(TOKENS))
    found = last(TOKENS, context, cross_entropy(TOKENS), first(TOKENS, context))
    assert torch.equal(found, want)
    found.backward()
    want.backward()
    gradients = dict(whole.named_parameters())
    for name, parameter in last.named_parameters():
        if name != "embedding.weight":  # whose gradient is the sum of both stages'
            assert torch.equal(parameter.grad, gradients[name].grad), name
    both = first.embedding.weight.grad + (last.embedding.weight.grad if tied else 0)
    torch.testing.assert_close(both, gradients["embedding.weight"].grad, rtol=1e-12, atol=1e-14)
