"""Prefix-Tuning (Li and Liang 2021): trained keys and values that come before the tokens in every layer.

The prefix takes the first positions: tokens have the positions that they would have after a prompt of that length, as
in the peft library. Every query sees the whole prefix, whatever else is masked. Prefix keys are not rotated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from megatron_lite.peft.method import PeftMethod
from megatron_lite.section import Width

if TYPE_CHECKING:
    import torch

    from megatron_lite.checkpoint.adapters.peft_folder import PeftSource
    from megatron_lite.config import Config, ModelConfig


class PrefixConfig(PeftMethod):
    """``length`` trained keys and values before the tokens in every layer (Li and Liang 2021), which take the first
    ``length`` positions. ``reparameterize``: train them as the output of an MLP with this many hidden units; only its
    output is exported.
    """

    method: Literal["prefix"]
    length: Width = 16
    reparameterize: Width | None = None

    @property
    def num_positions(self) -> int:
        return self.length

    def matched(self, model: ModelConfig) -> list[str]:
        return [f"blocks.{i}.attention" for i in range(model.num_layers)]

    def mistakes(self, config: Config) -> list[str]:
        return self.unfit(config.model, config.data.seq_len, "data.seq_len")

    def unfit(self, model: ModelConfig, tokens: int = 1, called: str = "a token") -> list[str]:
        """A line if the prefix and this many tokens do not fit a model's positions."""
        needed, limit = self.length + tokens, model.max_seq_len
        if needed <= limit:
            return []
        return [
            f"peft.length={self.length} + {called}={tokens} = {needed} positions exceed model.max_seq_len={limit}; "
            "the prefix takes the first"
        ]

    def insert(self, model: Any) -> None:
        from megatron_lite.peft.prefix_modules import Prefix, Stem

        model.prefix = Stem(model, self)
        for block in model.blocks:
            block.attention.prefix = Prefix(block.attention, self)

    def fold(self, model: Any, dtype: torch.dtype) -> None:
        """Replace the MLP that computes the prefix by its output, in ``dtype``."""
        import torch

        with torch.no_grad():
            stem = model.prefix(dtype)
            made = [block.attention.prefix.made(stem, dtype) for block in model.blocks]
        self.model_copy(update={"reparameterize": None}).insert(model)
        for block, (keys, values) in zip(model.blocks, made, strict=True):
            prefix = block.attention.prefix.to(dtype)
            prefix.keys.data, prefix.values.data = keys.contiguous(), values.contiguous()

    @classmethod
    def peft_folder(cls) -> type[PeftSource] | None:
        from megatron_lite.peft.prefix_folder import PrefixSource

        return PrefixSource
