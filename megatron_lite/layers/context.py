"""What the layers of one forward pass share besides the activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.layers.cache import KeyValueCache
from megatron_lite.layers.mask import Visible

# The compute dtype by ``train.precision``.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Context:
    """Set by the caller: ``dtype``, the compute dtype; ``seed`` of this micro batch's dropout masks, None in
    evaluation; ``positions``, int64 [batch, seq], and ``document_ids``, int64 [batch, cached + seq], if documents are
    masked from each other; ``cache``, the keys and values of earlier tokens.

    Set by the model when a pass begins: ``batch``, the number of rows; ``visible``, the attention mask; ``angles``,
    rotary cosines and sines; ``prefix``, the hidden states from which layers compute their prefixes
    (``peft/prefix_modules.py``).
    """

    dtype: torch.dtype = torch.float32
    seed: int | None = None
    positions: Tensor | None = None
    document_ids: Tensor | None = None
    cache: KeyValueCache | None = None
    batch: int = 1
    visible: Visible = field(default_factory=Visible)
    angles: tuple[Tensor, Tensor] | None = None
    prefix: Tensor | None = None
