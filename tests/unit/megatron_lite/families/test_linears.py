"""What a family's table says of its linears is what its blocks hold."""

import pytest
import torch

from megatron_lite.config import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import spec_of
from megatron_lite.families import FAMILIES
from megatron_lite.families.family import block_weights, linears
from megatron_lite.models.decoder import Decoder

SIZES = {"vocab_size": 61, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "head_dim": 8, "ffn_size": 40}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_columns_parts_and_how_they_are_split(family, bias):
    config = ModelConfig(family=family, num_kv_heads=2, bias=bias, **SIZES)
    with torch.device("meta"):
        block = Decoder(config, Axis("tp"), sp=False).blocks[1]
    matrices = {
        name.removesuffix(".weight"): spec_of(weight) for name, weight in block.named_parameters() if weight.dim() == 2
    }
    assert list(matrices) == [linear.name for linear in linears(config)]
    for linear in linears(config):
        spec = matrices[linear.name]
        assert (spec.shape, spec.dim) == ((linear.rows, linear.columns), linear.split)
        assert linear.split == 1 or (spec.chunks or (linear.rows,)) == tuple(linear.parts.values())
        assert (f"{linear.name}.bias" in dict(block.named_parameters())) == linear.bias
        assert len(FAMILIES[family].names.linears[linear.name]) in (1, len(linear.parts))
    assert block_weights(config) == sum(spec.shape[0] * spec.shape[1] for spec in matrices.values())
