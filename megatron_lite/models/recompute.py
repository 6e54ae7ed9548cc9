"""Activation recomputation (Chen et al. 2016; selective after Korthikanti et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    # Dropout masks depend only on seeds (distributed/random.py), so no generator state has to be restored.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def apply_recompute(blocks: Iterable[Any], mode: str) -> None:
    """``full``: save only each block's input. ``selective``: save the outputs of linears, but not what is between them
    (rotation, attention scores, activation). ``none``: save everything."""
    for block in blocks:
        if mode == "full":
            block.forward = _recomputed(block.forward)
        elif mode == "selective":
            block.attention.core = _recomputed(block.attention.core)
            block.mlp.activation = _recomputed(block.mlp.activation)
