"""Every dropout in a model draws masks of its own."""

from unittest.mock import patch

import torch

from megatron_lite import peft
from megatron_lite.config import parse_config
from megatron_lite.distributed import random
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import initialize, inits_of, pieces_of
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.head import cross_entropy


def test_no_two_share_a_seed():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_seq_len": 16}
    sections = {
        "model": {**sizes, "dropout": 0.1, "attention_dropout": 0.1},
        "peft": {"method": "lora", "targets": ["*", "embedding", "head"], "dropout": 0.1},
        "data": {"train": [{"path": "x"}], "seq_len": 16},
    }
    config = parse_config(sections)
    model = Decoder(config.model, Axis("tp"), sp=False)
    peft.apply(model, config.peft, torch.float32)
    initialize(pieces_of(model, Axis("tp")), inits_of(model), 1)
    mixed = []

    def mix(*numbers):
        mixed.append(numbers)
        return random_mix(*numbers)

    random_mix = random.mix
    tokens = torch.arange(16).unsqueeze(0)
    with patch.object(random, "mix", mix):
        model(tokens, Context(seed=7), cross_entropy(tokens))
    # Embedded tokens; in each block attention, two residuals and four adapted linears; the adapted head.
    assert len(mixed) == 1 + 3 * (1 + 2 + 4) + 1
    assert len(set(mixed)) == len(mixed)
    assert all(seed == 7 for seed, *_ in mixed)
