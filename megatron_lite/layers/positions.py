"""Token positions: rotary angles, or a learned embedding for each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_lite.config import RopeScaling
from megatron_lite.distributed import comm
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import ShardSpec, attach


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each rotated pair, [head_dim / 2], float64 (Su et al. 2021).

    ``linear`` scaling is position interpolation (Chen et al. 2023); ``llama3`` divides only the long wavelengths and
    blends in between, as the Llama 3.1 models do.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    rotations = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of each head by its position's angles. x: [batch, seq, heads, head_dim]."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class RotaryPositions(nn.Module):
    """Cosines and sines for positions, each [batch or 1, seq, 1, head_dim / 2], float32 or better."""

    def __init__(self, head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.frequencies = rope_frequencies(head_dim, theta, scaling)
        self.max_positions = max_positions
        self.table: tuple[Tensor, Tensor] | None = None

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(dtype, torch.float32)
        if self.table is None or self.table[0].dtype != dtype or self.table[0].device != positions.device:
            angles = torch.outer(torch.arange(self.max_positions, dtype=torch.float64, device="cpu"), self.frequencies)
            self.table = (angles.cos().to(positions.device, dtype), angles.sin().to(positions.device, dtype))
        cos, sin = self.table
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)


class LearnedPositions(nn.Module):
    """One learned vector per position, added to the token embeddings: [tokens (/ tp under ``sp``), hidden] → the same.

    Under ``sp`` each rank adds the positions of its own tokens, and backward all-reduces the table's gradient.
    """

    def __init__(self, max_positions: int, hidden_size: int, tp: Axis, *, sp: bool, std: float) -> None:
        super().__init__()
        self.tp, self.sp = tp, sp
        spec = ShardSpec((max_positions, hidden_size))
        self.weight = attach(nn.Parameter(torch.empty(spec.shape)), spec, std)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if not self.sp:
            return x + nn.functional.embedding(positions.reshape(-1), self.weight).to(x.dtype)
        own = comm.own_slice(positions.reshape(-1), self.tp)
        return x + nn.functional.embedding(own, comm.copy_to(self.weight, self.tp)).to(x.dtype)
