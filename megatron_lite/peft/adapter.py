"""Bottleneck adapters after frozen layers (Houlsby et al. 2019, Pfeiffer et al. 2021) or parallel to them (He et al.
2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from megatron_lite.peft.method import PeftMethod
from megatron_lite.section import PositiveFloat, Width

if TYPE_CHECKING:
    from megatron_lite.config import Config, ModelConfig


class AdapterConfig(PeftMethod):
    """Bottlenecks of ``size`` units between the frozen layers, initialised as the identity.

    ``placement``: ``houlsby`` after attention and after the MLP (Houlsby et al. 2019), ``pfeiffer`` only after the MLP
    (Pfeiffer et al. 2021), ``parallel`` to the MLP (He et al. 2022). ``scale``: the factor of their output.
    """

    method: Literal["adapter"]
    size: Width = 64
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    scale: PositiveFloat = 1.0

    @property
    def halves(self) -> tuple[str, ...]:
        """The halves of a block that have a bottleneck."""
        return ("attention", "mlp") if self.placement == "houlsby" else ("mlp",)

    def matched(self, model: ModelConfig) -> list[str]:
        return [f"blocks.{i}.{half}" for i in range(model.num_layers) for half in self.halves]

    def mistakes(self, config: Config) -> list[str]:
        tp = config.parallel.tp
        return [f"peft.size={self.size} is not a multiple of parallel.tp={tp}"] if self.size % tp else []

    def insert(self, model: Any) -> None:
        from megatron_lite.peft.adapter_modules import Bottleneck

        for block in model.blocks:
            for half in self.halves:
                setattr(block, f"{half}_adapter", Bottleneck(model, self))
