"""What the layers of one forward pass share beside the activations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.layers.cache import KeyValueCache
from megatron_lite.layers.mask import Visible

# What is computed in, by ``train.precision``.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Context:
    """Given by the caller: ``dtype``, what is computed in; ``seed`` of this micro batch's dropout masks, None in
    evaluation; ``positions`` and ``document_ids``, int64 [batch, seq], where documents are masked from each other (the
    ids with those of the tokens in ``cache``); ``cache`` of the tokens before these.

    Set by the model when a pass begins: ``batch``, the rows; ``visible``, who sees whom; ``angles``, rotary cosines and
    sines; ``prefix``, what all layers' prefixes are made from (``peft/prefix.py``).
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
