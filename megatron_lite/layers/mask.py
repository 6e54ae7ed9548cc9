"""The attention mask: described once per forward pass, and turned into a tensor only here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """A mask in the form that attention takes. ``keys``: bool [batch or 1, 1, queries, keys], True where a query may
    attend; None: to all keys or, if ``causal``, to those up to its own (there are as many keys as queries)."""

    keys: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Mask:
    """The rules that mask keys.

    ``causal``: mask keys after the query's own. ``offset``: the number of keys before the first query's own, the length
    of a key-value cache: one for all rows, or int64 [batch]. ``window``: mask keys at a distance of ``window`` or more.
    ``documents``: document ids of the keys, int64 [batch, keys]; mask keys of other documents. ``prefix``: the number
    of extra keys at the beginning, visible to every query.
    """

    causal: bool = True
    offset: int | Tensor = 0
    window: int | None = None
    documents: Tensor | None = None
    prefix: int = 0

    def visible(self, queries: int, device: torch.device) -> Visible:
        """The mask of ``queries`` new tokens in each row; keys: the prefix, then as many as the longest row has."""
        alike = isinstance(self.offset, int) and self.window is None and self.documents is None
        if alike and (queries == 1 or not self.causal):
            return Visible()
        if alike and self.offset == 0 and self.prefix == 0:
            return Visible(causal=True)
        before = torch.as_tensor(self.offset, device=device).view(-1, 1, 1)
        # The index of each query's own key, [batch or 1, queries, 1], and of all keys, [keys].
        own = before + torch.arange(queries, device=device).view(-1, 1)
        key = torch.arange(int(before.max()) + queries, device=device)
        keys = key <= own if self.causal else (key < before + queries).expand(-1, queries, -1)
        if self.window is not None:
            keys = keys & ((key - own).abs() < self.window)
        if self.documents is not None:
            assert self.documents.shape[1] == len(key)
            mine = self.documents.gather(1, own.squeeze(2).expand(len(self.documents), queries))
            keys = keys & (self.documents.unsqueeze(1) == mine.unsqueeze(2))
        return Visible(torch.nn.functional.pad(keys.unsqueeze(1), (self.prefix, 0), value=True))
