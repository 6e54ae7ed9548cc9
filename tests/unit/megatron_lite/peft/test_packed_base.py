"""A base in 8 or 4 bits is the base of its numbers, and nothing of it is there unpacked between two products."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_lite import peft
from megatron_lite.config import PACKED_BYTES, parse_config
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import initialize, inits_of, pieces_of, spec_of
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.head import cross_entropy

SOLO = Axis("tp")
SIZES = {"vocab_size": 61, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 192, "max_seq_len": 48}
FAMILIES = {"llama": {"num_kv_heads": 2}, "gpt2": {"family": "gpt2"}}
METHODS = {
    "lora": {"method": "lora", "dropout": 0.1},
    "lora on gate": {"method": "lora", "targets": ["up"]},
    "dora": {"method": "lora", "dora": True},
    "adapter": {"method": "adapter", "size": 16},
    "prefix": {"method": "prefix", "length": 6},
}
TOKENS = torch.tensor([[5, 17, 40, 2, 33, 21, 60, 8, 9, 11]])
LINEARS = ("attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight")


def decoder(family, method, base_dtype, dtype=torch.float64):
    tree = {"model": {**SIZES, "init_std": 0.3, **FAMILIES[family]}, "data": {"train": [{"path": "x"}], "seq_len": 32}}
    asked = parse_config({**tree, "peft": {**METHODS[method], "base_dtype": base_dtype}})
    model = Decoder(asked.model, SOLO, sp=False)
    peft.apply(model, asked.peft, dtype)
    pieces = pieces_of(model, SOLO)
    initialize(pieces, inits_of(model), 1)
    for parameter in model.parameters():  # what starts as zeros would hide what it is multiplied by
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.arange(parameter.numel()).sin().view_as(parameter)
    return model, pieces


def gradients(model, dtype=torch.float64):
    model(TOKENS[:, :-1], Context(dtype, seed=3), cross_entropy(TOKENS[:, 1:])).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("packing", PACKED_BYTES)
@pytest.mark.parametrize(("family", "method"), [("llama", method) for method in METHODS] + [("gpt2", "adapter")])
def test_it_computes_what_its_numbers_compute(family, method, packing):
    packed, pieces = decoder(family, method, packing)
    plain, targets = decoder(family, method, None)
    assert pieces.keys() == targets.keys()
    for name, piece in pieces.items():
        for tile, target in zip(piece.tiles, targets[name].tiles, strict=True):
            target.data.copy_(tile.numbers)
    changed = {n for n, p in packed.named_parameters() if spec_of(p).packing}
    assert changed == {f"blocks.{i}.{name}" for i in range(2) for name in LINEARS}
    torch.testing.assert_close(packed(TOKENS, Context(torch.float64)), plain(TOKENS, Context(torch.float64)))
    found, wanted = gradients(packed), gradients(plain)
    assert found.keys() == {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("packing", PACKED_BYTES)
@pytest.mark.parametrize("method", METHODS)
def test_no_unpacked_weight_waits_for_backward(method, packing):
    """Of the numbers of a linear nothing is saved, in no type and no shape, but its bytes themselves."""
    model, _ = decoder("llama", method, packing, torch.bfloat16)
    bytes_of = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters() if spec_of(p).packing}
    sizes = {math.prod(spec_of(p).shape) for p in model.parameters() if spec_of(p).packing}
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = model(TOKENS[:, :-1], Context(torch.bfloat16, seed=3), cross_entropy(TOKENS[:, 1:]))
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved if tensor.dtype == torch.uint8}
    assert kept and kept <= bytes_of.keys()
    whole = {p.untyped_storage().data_ptr() for p in model.parameters()}
    others = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in whole]
    assert others and not [tensor for tensor in others if tensor.numel() in sizes]
    assert sum(bytes_of.values()) == sum(
        math.prod(spec_of(p).shape) * PACKED_BYTES[packing] / 64 for p in model.parameters() if spec_of(p).packing
    )
    loss.backward()
