"""A mask says who sees whom as a plain loop over queries and keys would."""

import itertools

import pytest
import torch

from megatron_lite.layers.mask import Mask, Visible

QUERIES, SEEN = 4, 3


def plainly(mask: Mask, row: int, offset: int) -> list[list[bool]]:
    def sees(query: int, key: int) -> bool:
        own = offset + query
        return (
            (key <= own if mask.causal else key < offset + QUERIES)
            and (mask.window is None or abs(own - key) < mask.window)
            and (mask.documents is None or bool(mask.documents[row, key] == mask.documents[row, own]))
        )

    keys = range(mask.documents.shape[1] if mask.documents is not None else SEEN + QUERIES)
    return [[True] * mask.prefix + [sees(query, key) for key in keys] for query in range(QUERIES)]


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])

OFFSETS = [SEEN, torch.tensor([SEEN, 1])]


@pytest.mark.parametrize(
    ("causal", "window", "documents", "prefix", "offset"),
    [
        case
        for case in itertools.product(
            [True, False], [None, 2], [None, DOCUMENTS], [0, 2], [SEEN, torch.tensor([SEEN, 1])]
        )
        if case[:2] != (False, None) or case[2] is not None
    ],
)
def test_as_a_plain_loop(causal, window, documents, prefix, offset):
    mask = Mask(causal, offset, window, documents, prefix)
    found = mask.visible(QUERIES, torch.device("cpu"))
    assert found.keys is not None and not found.causal
    keys = found.keys.expand(2, 1, -1, -1)
    for row, seen in enumerate(torch.as_tensor(offset).expand(2).tolist()):
        assert keys[row, 0].tolist() == plainly(mask, row, seen)


def test_what_needs_no_tensor_gets_none():
    cpu = torch.device("cpu")
    assert Mask().visible(5, cpu) == Visible(causal=True)
    assert Mask(offset=8).visible(1, cpu) == Visible()
    assert Mask(offset=8, prefix=2).visible(1, cpu) == Visible()
    assert Mask(causal=False).visible(5, cpu) == Visible()
    assert Mask(offset=8).visible(4, cpu).keys is not None  # several behind a cache: never torch's own causal mask
