"""Text generation: the cache changes nothing, sampling draws from the set it should, and so on every rank."""

import pytest
import torch

from megatron_lite.config import ModelConfig
from megatron_lite.dist.mesh import Axis, build_mesh, solo_mesh
from megatron_lite.dist.shard import initialize, inits_of, pieces_of
from megatron_lite.dist.spawn import run_ranks
from megatron_lite.errors import ConfigError
from megatron_lite.generate import Sampling, choose, generate
from megatron_lite.models.decoder import Decoder

VOCAB, LENGTH, PROMPT = 61, 32, [5, 17, 40, 2]
FAMILIES = {"llama": {"num_kv_heads": 1}, "gpt2": {"family": "gpt2"}}


def decoder(family, tp=None, sp=False):
    sizes = {"vocab_size": VOCAB, "vocab_multiple": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    config = ModelConfig(**sizes, max_seq_len=LENGTH, init_std=0.3, **FAMILIES[family])
    axis = tp or Axis("tp")
    model = Decoder(config, axis, sp=sp).double()
    initialize(pieces_of(model, axis), inits_of(model), 1)
    return model


def produce(model, **sampling):
    return generate(model, PROMPT, Sampling(**sampling), (), torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_cache_as_without(family):
    model = decoder(family)
    tokens = list(PROMPT)
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens]), dtype=torch.float64).argmax()))
    assert produce(model, max_new_tokens=20) == tokens[len(PROMPT) :]
    assert len(set(tokens)) > 5


def on_two_ranks(rank, size):
    mesh = build_mesh({"tp": size}, torch.device("cpu"))
    return [
        produce(decoder(family, mesh.tp, sp), max_new_tokens=16, temperature=temperature, top_k=20)
        for family in FAMILIES
        for sp in (False, True)
        for temperature in (0.0, 1.0)
    ]


def test_the_same_tokens_on_one_rank_and_on_two():
    solo = solo_mesh()
    want = [
        produce(decoder(family, solo.tp), max_new_tokens=16, temperature=temperature, top_k=20)
        for family in FAMILIES
        for _ in range(2)
        for temperature in (0.0, 1.0)
    ]
    assert run_ranks(on_two_ranks, 2, timeout=60) == [want, want]


def test_it_ends_at_the_stop_token_and_at_the_models_length():
    model = decoder("llama")
    whole = produce(model, max_new_tokens=1000)
    assert len(whole) == LENGTH - len(PROMPT)
    stop = whole[6]
    assert generate(model, PROMPT, Sampling(), {stop}, torch.float64) == whole[: whole.index(stop)]


def drawn(sampling, logits, count=400):
    return {int(choose(logits.log().unsqueeze(0), sampling, position)) for position in range(count)}


def test_top_k_and_top_p_keep_what_they_should():
    probabilities = torch.tensor([0.05, 0.5, 0.05, 0.3, 0.1])
    assert drawn(Sampling(temperature=1.0), probabilities) == {0, 1, 2, 3, 4}
    assert drawn(Sampling(temperature=1.0, top_k=2), probabilities) == {1, 3}
    assert drawn(Sampling(temperature=1.0, top_p=0.4), probabilities) == {1}
    assert drawn(Sampling(temperature=1.0, top_p=0.6), probabilities) == {1, 3}
    assert drawn(Sampling(temperature=1.0, top_p=0.85), probabilities) == {1, 3, 4}
    assert drawn(Sampling(temperature=1.0, top_k=3, top_p=0.6), probabilities) == {1, 3}
    assert drawn(Sampling(temperature=1e-4), probabilities) == drawn(Sampling(), probabilities) == {1}


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.2, 0.8])
    ones = sum(int(choose(probabilities.log().unsqueeze(0), Sampling(temperature=1.0), i)) for i in range(4000))
    assert abs(ones / 4000 - 0.8) < 0.03
    hot = sum(int(choose(probabilities.log().unsqueeze(0), Sampling(temperature=2.0), i)) for i in range(4000))
    assert abs(hot / 4000 - 2 / 3) < 0.03


def test_numbers_that_make_no_sense_are_all_named():
    with pytest.raises(ConfigError) as caught:
        Sampling(max_new_tokens=0, temperature=float("nan"), top_k=-1, top_p=0).check()
    told = str(caught.value)
    assert told.count("\n") == 3
    for flag in ("--max_new_tokens=0", "--temperature=nan", "--top_k=-1", "--top_p=0"):
        assert flag in told
