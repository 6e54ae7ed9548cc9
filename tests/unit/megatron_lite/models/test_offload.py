"""What backward needs waits elsewhere: everything but weights and what all blocks share."""

import pytest
import torch

from megatron_lite.config import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers.context import Context
from megatron_lite.models import offload
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.head import cross_entropy
from megatron_lite.models.recompute import apply_recompute

LAYERS, TOKENS, HIDDEN = 2, 32, 32


@pytest.fixture
def moved(monkeypatch):
    """Every tensor that is offloaded."""
    found, out = [], offload._Mover.out
    monkeypatch.setattr(offload._Mover, "out", lambda mover, tensor: found.append(tensor) or out(mover, tensor))
    return found


def train(recompute: str, *, offloaded: bool) -> tuple[Decoder, list[torch.Tensor]]:
    """A small model after one backward, and its gradients."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=4, max_seq_len=16)
    model = Decoder(config, Axis("tp"), sp=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    apply_recompute(model.blocks, recompute)
    if offloaded:
        offload.apply_offload(model.blocks)
    tokens = torch.arange(TOKENS).view(2, 16)
    documents = (tokens > 5).long()
    model(tokens, Context(document_ids=documents), cross_entropy(tokens)).backward()
    return model, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_are_the_same(moved, recompute):
    plain = train(recompute, offloaded=False)[1]
    assert not moved
    assert all(map(torch.equal, train(recompute, offloaded=True)[1], plain))
    if recompute == "full":
        assert [tuple(tensor.shape) for tensor in moved] == [(TOKENS, HIDDEN)] * LAYERS
    else:
        assert len(moved) > 5 * LAYERS


def test_weights_and_what_blocks_share_stay(moved):
    model, _ = train("none", offloaded=True)
    weights = {offload.storage(parameter) for parameter in model.parameters()}
    assert not {offload.storage(tensor) for tensor in moved} & weights
    assert all(tensor.is_floating_point() for tensor in moved)  # the mask is not
    assert (1, 4) not in {tuple(tensor.shape[-2:]) for tensor in moved}  # the angles
