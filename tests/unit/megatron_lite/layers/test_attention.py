"""Attention over what was seen before: however the tokens come, one by one or several at once, nothing changes."""

import pytest
import torch

from megatron_lite.layers.attention import KeyValueCache
from tests.kit.adapters import FAMILIES, decoder

TOKENS = torch.tensor([[5, 17, 40, 2, 33, 21, 60, 8, 9, 11], [7, 7, 3, 50, 12, 1, 30, 44, 2, 19]])
PREFIX = {"method": "prefix", "length": 3}


def hidden(model, steps, document_ids=None, positions=None):
    """Hidden states [batch, seq, hidden] of TOKENS, read in steps of so many."""
    caches, found, seen = [KeyValueCache() for _ in model.blocks], [], 0
    for step in steps:
        now = slice(seen, seen + step)
        seen += step
        ids = None if document_ids is None else document_ids[:, :seen]
        there = None if positions is None else positions[:, now]
        new = model.hidden_states(TOKENS[:, now], there, ids, None, caches, torch.float64)
        found.append(new.view(len(TOKENS), step, -1))
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("method", [None, PREFIX], ids=["alone", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_tokens_see_the_cache_and_each_other_causally(family, method):
    model, size = decoder(family, method=method), TOKENS.shape[1]
    want = model.hidden_states(TOKENS, None, None, None, None, torch.float64).view(len(TOKENS), size, -1)
    for steps in ([1] * size, [4, 6], [1, 4, 1, 4], [size]):
        torch.testing.assert_close(hidden(model, steps), want, rtol=1e-11, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("method", [None, PREFIX], ids=["alone", "prefix"])
def test_and_no_other_document(method):
    model, size = decoder("llama", method=method), TOKENS.shape[1]
    ids = torch.tensor([[0] * 6 + [1] * 4, [0] * 2 + [1] * 5 + [2] * 3])
    positions = torch.tensor([[*range(6), *range(4)], [*range(2), *range(5), *range(3)]])
    want = model.hidden_states(TOKENS, positions, ids, None, None, torch.float64).view(len(TOKENS), size, -1)
    for steps in ([1] * size, [4, 6], [7, 1, 2]):
        torch.testing.assert_close(hidden(model, steps, ids, positions), want, rtol=1e-11, atol=1e-11)
    assert (hidden(model, [4, 6]) - want).abs().max() > 1e-3
