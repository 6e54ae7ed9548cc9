"""A PEFT method as a newcomer adds it, one file and one line: a trained scale on what each half of a block adds, after
(IA)³ (Liu et al. 2022). Import it before the config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from megatron_lite.peft import METHODS
from megatron_lite.peft.method import PeftMethod

if TYPE_CHECKING:
    from megatron_lite.config import ModelConfig

HALVES = ("attention", "mlp")


class IA3Config(PeftMethod):
    """Each half of each block has a scale; ``only`` one kind of half, or both."""

    method: Literal["ia3"]
    only: Literal["attention", "mlp"] | None = None

    def matched(self, model: ModelConfig) -> list[str]:
        return [f"blocks.{i}.{half}" for i in range(model.num_layers) for half in HALVES if self.only in (None, half)]

    def insert(self, model: Any) -> None:
        from tests.kit.ia3_modules import Scale

        matched = self.matched(model.config)
        for block in model.blocks:
            for half in HALVES:
                if f"blocks.{block.layer}.{half}" in matched:
                    setattr(block, f"{half}_adapter", Scale(model))


METHODS["ia3"] = IA3Config
