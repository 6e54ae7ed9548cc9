"""Frozen weights in 8 or 4 bits, a block at a time.

Every 64 numbers of a row form a block: their codes, followed by the largest magnitude among them as float32. A weight
[rows, in] becomes bytes [rows, in / 64, bytes of a block], which can be cut at every block boundary: parts are packed,
sent and unpacked independently, and every layout holds the same numbers. All in plain tensor operations.

``int8``: 127 steps on either side of zero. ``nf4``: the 16 levels of the normal float (QLoRA, Dettmers et al. 2023),
two codes in a byte, the first in the upper half. Both give the same numbers as bitsandbytes.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config import PACKED_BLOCK

# Quantiles of a normal distribution truncated at 1, including zero (appendix E of the paper).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_TINY = 1e-30  # divisor for a block of zeros


def pack(numbers: Tensor, packing: str) -> Tensor:
    """[rows, columns] → [rows, columns / 64, bytes]."""
    blocks = numbers.float().unflatten(1, (-1, PACKED_BLOCK))
    scales = blocks.abs().amax(dim=2, keepdim=True)
    if packing == "int8":
        codes = (blocks * (127 / scales.clamp(min=_TINY))).round_().to(torch.int8).view(torch.uint8)
    else:
        levels = _levels(numbers.device)
        middles = (levels[:-1] + levels[1:]) / 2
        nearest = torch.bucketize(blocks * (1 / scales.clamp(min=_TINY)), middles, out_int32=True).to(torch.uint8)
        codes = nearest[..., ::2] << 4 | nearest[..., 1::2]
    return torch.cat((codes, scales.view(torch.uint8)), dim=2)


def unpack(packed: Tensor, packing: str, dtype: torch.dtype) -> Tensor:
    """[rows, blocks, bytes] → [rows, 64 blocks], computed in float32."""
    codes, scales = packed[..., :-4], packed[..., -4:].contiguous().view(torch.float32)
    if packing == "int8":
        numbers = codes.view(torch.int8) * (scales / 127)
    else:
        numbers = F.embedding(codes.int(), _pairs(packed.device)).flatten(2).mul_(scales)
    return numbers.flatten(1).to(dtype)


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels that each of the 256 byte values encodes, [256, 2]."""
    levels = _levels(device)
    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)
