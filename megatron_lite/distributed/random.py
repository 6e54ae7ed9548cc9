"""Random numbers that depend on where they are used, not on what ran before.

Every dropout mask comes from a seed mixed from (run seed, first sample of the micro batch, site in the model, and
the tensor-parallel rank where ranks hold different slices). There is no generator state to save, to fork or to
restore: resuming and recomputing draw the same masks by construction.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A 63-bit seed from integers; each step is the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def dropout(tensor: Tensor, probability: float, seed: int | None) -> Tensor:
    """Zero each element with ``probability`` and scale the rest; the identity without a seed (evaluation)."""
    return tensor if probability == 0.0 or seed is None else _drop(tensor, probability, seed)


@torch._disable_dynamo
def _drop(tensor: Tensor, probability: float, seed: int) -> Tensor:
    generator = torch.Generator(tensor.device).manual_seed(seed)
    keep = torch.empty_like(tensor).bernoulli_(1.0 - probability, generator=generator)
    return tensor * keep.div_(1.0 - probability)


@torch._disable_dynamo
def seed_default(seed: int, device: torch.device) -> None:
    """Seed the device's default generator, for kernels that draw from nothing else (attention dropout)."""
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(seed)
