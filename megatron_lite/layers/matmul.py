"""The matrix product of a linear layer, by the fastest kernel there is for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prefers_onednn(x: Tensor) -> bool:
    """Whether ``linear`` leaves torch's choice: for float32 on an x86 CPU that is MKL, which oneDNN outruns on AMD's by
    a tenth to a fifth (docs/benchmarks.md). Not where a block is compiled: there the compiler chooses."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [rows, in], weight [out, in], either in any strides. No gradient."""
    if prefers_onednn(x):
        # What torch's compiler calls for a linear layer.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)
