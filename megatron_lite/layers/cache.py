"""The key-value cache of generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of all layers, allocated once for ``capacity`` tokens per row, with a length for each row.

    ``lengths``: tokens seen in each row. Layers append new tokens there; ``advance`` adds them to the lengths
    afterwards, so all layers of a pass write to the same place. After nanochat's engine (Karpathy 2025).
    """

    def __init__(self, batch: int, capacity: int) -> None:
        self.capacity, self.lengths = capacity, [0] * batch
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def offset(self) -> int | Tensor:
        """How many tokens were seen: one number if all rows have equally many, else int64 [batch]."""
        same = len(set(self.lengths)) == 1
        return self.lengths[0] if same else torch.tensor(self.lengths)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, [batch, kv heads, tokens, head_dim], to each row.

        Returns views of all keys and values, as long as the longest row. Beyond the end of a shorter row are zeros or
        old contents, which a causal mask with the rows' ``offset`` hides.
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
        """Add the new tokens to the lengths, after every layer has appended them: one count for all rows, or a list."""
        counts = [tokens] * len(self.lengths) if isinstance(tokens, int) else tokens
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
