"""What each method is: nothing at the start, a prompt's keys and values."""

import pytest
import torch

from megatron_lite import peft
from megatron_lite.config import parse_config
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import initialize, inits_of, pieces_of
from megatron_lite.inference.requests import Sampling
from megatron_lite.inference.sampling import generate
from megatron_lite.layers.cache import KeyValueCache
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder
from tests.kit.tiny import SEQ_LEN, VOCAB

SOLO = Axis("tp")
SIZES = {"vocab_size": VOCAB, "vocab_multiple": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
FAMILIES = {"llama": {"num_kv_heads": 2}, "gpt2": {"family": "gpt2", "tie_embeddings": False}}
IDENTICAL = {
    "lora": {"method": "lora", "targets": ["*"]},
    "dora": {"method": "lora", "targets": ["blocks.*"], "dora": True},
    "houlsby": {"method": "adapter", "size": 16},
    "pfeiffer": {"method": "adapter", "size": 16, "placement": "pfeiffer"},
    "parallel": {"method": "adapter", "size": 16, "placement": "parallel", "scale": 4.0},
}
PREFIXES = {
    "prefix": {"method": "prefix", "length": 6},
    "by an mlp": {"method": "prefix", "length": 6, "reparameterize": 8},
}
TOKENS = torch.tensor([[5, 17, 40, 2, 33, 21, 60, 8, 9, 11]])


def config(family="llama", method=None, **changes):
    sections = {
        "model": {**SIZES, "max_seq_len": 48, "init_std": 0.3, **FAMILIES[family]},
        "data": {"train": [{"path": "x"}], "seq_len": SEQ_LEN},
        "peft": method,
    }
    return parse_config({**sections, **changes})


def decoder(family, method=None):
    asked = config(family, method)
    model = Decoder(asked.model, SOLO, sp=False)
    peft.apply(model, asked.peft, torch.float64)
    initialize(pieces_of(model, SOLO), inits_of(model), 1)  # by name: the base is the same with a method and without
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", IDENTICAL)
def test_at_the_start_it_is_the_base_to_the_last_bit(family, method):
    base, model = decoder(family), decoder(family, IDENTICAL[method])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == dict(base.named_parameters()).keys()
    assert len(frozen) < len(dict(model.named_parameters()))
    assert torch.equal(model(TOKENS, Context(torch.float64)), base(TOKENS, Context(torch.float64)))


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_an_adapter_adds_its_bottleneck_by_the_scale(placement):
    model = decoder("llama", {"method": "adapter", "size": 16, "placement": placement, "scale": 4.0})
    module = model.blocks[0].mlp_adapter
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    start, added = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64)
    x = start if placement == "parallel" else added
    inner = torch.nn.functional.gelu(x @ module.down.weight.t() + module.down.bias, approximate="tanh")
    want = added + 4 * (inner @ module.up.weight.t() + module.up.bias)
    torch.testing.assert_close(module(start, added), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_a_prompts_keys_and_values_is_that_prompt(family):
    """Positions and masks are right when nobody can tell whether the prompt was read or trained."""
    base, model, length = decoder(family), decoder(family, PREFIXES["prefix"]), PREFIXES["prefix"]["length"]
    cache = KeyValueCache(len(TOKENS), length)
    with torch.no_grad():
        base(TOKENS[:, :length], Context(torch.float64, cache=cache))
        for block in model.blocks:
            keys, values = cache._held[block.layer]
            block.attention.prefix.keys.copy_(keys[0])
            block.attention.prefix.values.copy_(values[0])
    want = base(TOKENS, Context(torch.float64))
    torch.testing.assert_close(model(TOKENS[:, length:], Context(torch.float64)), want, rtol=1e-12, atol=1e-12)
    prompt = TOKENS[0].tolist()
    read = generate(base, prompt, Sampling(max_new_tokens=20), (), torch.float64)
    trained = generate(model, prompt[length:], Sampling(max_new_tokens=20), (), torch.float64)
    assert read == trained and len(set(read)) > 3


def test_a_folded_prefix_computes_the_same_without_its_mlp():
    model = decoder("llama", PREFIXES["by an mlp"])
    want = model(TOKENS, Context(torch.float64))
    config("llama", PREFIXES["by an mlp"]).peft.fold(model, torch.float64)
    assert not [name for name, _ in model.named_parameters() if name.startswith("prefix.")]
    torch.testing.assert_close(model(TOKENS, Context(torch.float64)), want, rtol=1e-12, atol=1e-12)
