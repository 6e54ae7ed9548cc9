"""Attention over what was seen before: however the tokens come, one by one or several at once, nothing changes."""

import pytest
import torch

from megatron_lite.layers.cache import KeyValueCache
from megatron_lite.layers.context import Context
from megatron_lite.models.head import hidden_states
from tests.kit.adapters import FAMILIES, decoder

TOKENS = torch.tensor([[5, 17, 40, 2, 33, 21, 60, 8, 9, 11], [7, 7, 3, 50, 12, 1, 30, 44, 2, 19]])
PREFIX = {"method": "prefix", "length": 3}


def hidden(model, steps, document_ids=None, positions=None):
    """Hidden states [batch, seq, hidden] of TOKENS, read in steps of so many."""
    cache, found, seen = KeyValueCache(len(TOKENS), TOKENS.shape[1]), [], 0
    for step in steps:
        now = slice(seen, seen + step)
        seen += step
        ids = None if document_ids is None else document_ids[:, :seen]
        there = None if positions is None else positions[:, now]
        context = Context(torch.float64, positions=there, document_ids=ids, cache=cache)
        new = model(TOKENS[:, now], context, hidden_states)
        found.append(new.view(len(TOKENS), step, -1))
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("method", [None, PREFIX], ids=["alone", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_tokens_see_the_cache_and_each_other_causally(family, method):
    model, size = decoder(family, method=method), TOKENS.shape[1]
    want = model(TOKENS, Context(torch.float64), hidden_states).view(len(TOKENS), size, -1)
    for steps in ([1] * size, [4, 6], [1, 4, 1, 4], [size]):
        torch.testing.assert_close(hidden(model, steps), want, rtol=1e-11, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("method", [None, PREFIX], ids=["alone", "prefix"])
def test_and_no_other_document(method):
    model, size = decoder("llama", method=method), TOKENS.shape[1]
    ids = torch.tensor([[0] * 6 + [1] * 4, [0] * 2 + [1] * 5 + [2] * 3])
    positions = torch.tensor([[*range(6), *range(4)], [*range(2), *range(5), *range(3)]])
    whole = Context(torch.float64, positions=positions, document_ids=ids)
    want = model(TOKENS, whole, hidden_states).view(len(TOKENS), size, -1)
    for steps in ([1] * size, [4, 6], [7, 1, 2]):
        torch.testing.assert_close(hidden(model, steps, ids, positions), want, rtol=1e-11, atol=1e-11)
    assert (hidden(model, [4, 6]) - want).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("method", [None, PREFIX], ids=["alone", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_lengths_are_as_each_alone(family, method):
    model, lengths = decoder(family, method=method), [7, 3]
    cache = KeyValueCache(len(TOKENS), TOKENS.shape[1] + 4)
    model(TOKENS[:, :7], Context(torch.float64, cache=cache), hidden_states)
    cache.lengths = [0, 0]
    cache.advance(lengths)  # of the second row only three count: what was read behind them is as if it were not
    new = model(TOKENS[:, 7:], Context(torch.float64, cache=cache), hidden_states).view(2, 3, -1)
    for row, length in enumerate(lengths):
        alone = torch.cat((TOKENS[row, :length], TOKENS[row, 7:])).unsqueeze(0)
        want = model(alone, Context(torch.float64), hidden_states)[length:]
        torch.testing.assert_close(new[row], want, rtol=1e-11, atol=1e-11)
    assert cache.lengths == [10, 6]
