"""Which keys a query may see: said once for a forward pass, and made a tensor in this one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """A mask as attention takes it. ``keys``: bool [batch or 1, 1, queries, keys], True where a query may look; None:
    all of them, or with ``causal`` those up to the query's own (as many keys as queries)."""

    keys: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Mask:
    """What hides keys from queries.

    ``offset``: how many keys stand before the queries' own, for every row of the batch or int64 [batch]: the length of
    a key-value cache. ``causal``: no key after the query's own. ``window``: no key further away than ``window`` - 1.
    ``documents``: int64 [batch, keys], no key of another document. ``prefix``: so many keys stand ahead of all others,
    and every query sees them.
    """

    causal: bool = True
    offset: int | Tensor = 0
    window: int | None = None
    documents: Tensor | None = None
    prefix: int = 0

    def visible(self, queries: int, device: torch.device) -> Visible:
        """The mask of so many new tokens a row, over the keys of the longest row."""
        alike = isinstance(self.offset, int) and self.window is None and self.documents is None
        if alike and (queries == 1 or not self.causal):
            return Visible()
        if alike and self.offset == 0 and self.prefix == 0:
            return Visible(causal=True)
        before = torch.as_tensor(self.offset, device=device).view(-1, 1, 1)
        # Each query's own key, [batch or 1, queries, 1], against all keys.
        own = before + torch.arange(queries, device=device).view(-1, 1)
        key = torch.arange(int(before.max()) + queries, device=device)
        keys = key <= own if self.causal else torch.ones_like(key <= own)
        if self.window is not None:
            keys = keys & ((key - own).abs() < self.window)
        if self.documents is not None:
            assert self.documents.shape[1] == len(key)
            mine = self.documents.gather(1, own.squeeze(2).expand(len(self.documents), queries))
            keys = keys & (self.documents.unsqueeze(1) == mine.unsqueeze(2))
        return Visible(torch.nn.functional.pad(keys.unsqueeze(1), (self.prefix, 0), value=True))
