"""The key-value cache of generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of all layers, allocated once for ``capacity`` tokens a row, with a length for each row.

    ``lengths``: tokens seen, a row each. Layers append what belongs behind them; ``advance`` counts it afterwards, so
    that all layers of a pass write to the same place. After nanochat's engine (Karpathy 2025).
    """

    def __init__(self, batch: int, capacity: int) -> None:
        self.capacity, self.lengths = capacity, [0] * batch
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def offset(self) -> int | Tensor:
        """How many tokens were seen: one number where every row has as many, else int64 [batch]."""
        same = len(set(self.lengths)) == 1
        return self.lengths[0] if same else torch.tensor(self.lengths)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of new tokens, [batch, kv heads, tokens, head_dim], behind each row's others.

        Returns those of all tokens up to the longest row's last, views. Behind the end of a shorter row stand zeros or
        what was written there before, which a causal mask with the rows' ``offset`` hides.
        """
        if layer not in self._held:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._held[layer] = keys.new_zeros(shape), values.new_zeros(shape)
        stop = max(self.lengths) + keys.shape[2]
        assert stop <= self.capacity, f"{stop} tokens in a cache for {self.capacity}"
        held = self._held[layer]
        for row, start in enumerate(self.lengths):
            for memory, new in zip(held, (keys, values), strict=True):
                memory[row, :, start : start + new.shape[2]] = new[row]
        return held[0][:, :, :stop], held[1][:, :, :stop]

    def advance(self, tokens: int | list[int]) -> None:
        """The new tokens were read by every layer: so many more in each row."""
        counts = [tokens] * len(self.lengths) if isinstance(tokens, int) else tokens
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
