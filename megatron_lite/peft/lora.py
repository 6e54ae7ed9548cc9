"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024): low-rank updates of linears and of the embedding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from megatron_lite.families import targets
from megatron_lite.peft.method import PeftMethod, unlike
from megatron_lite.section import PositiveFloat, Probability, Width

if TYPE_CHECKING:
    from megatron_lite.checkpoint.adapters.peft_folder import PeftSource
    from megatron_lite.checkpoint.source import CheckpointSource, Source
    from megatron_lite.config import Config, ModelConfig


class LoRAConfig(PeftMethod):
    """Low-rank updates of linears (Hu et al. 2021): W + alpha / r · B A, and with ``rslora`` alpha / √r (Kalajdzievski
    2023).

    ``targets``: q, k, v, o, gate, up, down, embedding, head, or globs over whole names (``blocks.[0-3].mlp.*``).
    ``ranks``, ``alphas``: another r or alpha for linears that a pattern matches; the first match counts. ``dropout``:
    on the input of A. ``dora``: train direction and magnitude separately (Liu et al. 2024).
    """

    vocabulary: ClassVar[tuple[str, ...]] = ("embedding.lora_embedding_a", "head.lora_head_b")

    method: Literal["lora"]
    targets: Annotated[list[str], Field(min_length=1)] = ["q", "k", "v", "o", "gate", "up", "down"]
    r: Width = 8
    alpha: PositiveFloat = 16.0
    ranks: dict[str, Width] = {}
    alphas: dict[str, PositiveFloat] = {}
    dropout: Probability = 0.0
    rslora: bool = False
    dora: bool = False

    def rank_of(self, name: str) -> int:
        """r of one linear."""
        return next((r for pattern, r in self.ranks.items() if targets.matches(pattern, name)), self.r)

    def alpha_of(self, name: str) -> float:
        """alpha of one linear."""
        return next((a for pattern, a in self.alphas.items() if targets.matches(pattern, name)), self.alpha)

    def scale_of(self, name: str) -> float:
        """The factor of B A in one linear."""
        r = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.rslora else r)

    def matched(self, model: ModelConfig) -> list[str]:
        names = targets.linear_names(model)
        return [name for name in names if any(targets.matches(pattern, name) for pattern in self.targets)]

    def differences(self, there: PeftMethod, model: ModelConfig) -> list[str]:
        """Compares what the patterns match, not how they are written; ignores dropout, which only training uses."""
        if not isinstance(there, LoRAConfig):
            return super().differences(there, model)
        found = unlike(("dora", "rslora"), there, self)
        here, other = self.matched(model), there.matched(model)
        for where, some, rest in (("there", other, here), ("here", here, other)):
            if only := [name for name in some if name not in rest]:
                found.append(f"peft.targets: {', '.join(targets.summary(only))} only {where}")
        both = [name for name in here if name in other]
        for key, ours, theirs in (("r", self.rank_of, there.rank_of), ("alpha", self.alpha_of, there.alpha_of)):
            if odd := [name for name in both if not math.isclose(ours(name), theirs(name))]:
                told = ", ".join(targets.summary(odd))
                found.append(f"peft.{key} of {told} {theirs(odd[0])} there, {ours(odd[0])} here")
        return found

    def mistakes(self, config: Config) -> list[str]:
        return self.unfit(config.model)

    def unfit(self, model: ModelConfig) -> list[str]:
        """A line for each thing that does not fit a model."""
        names = targets.linear_names(model)
        listed = self.targets
        if "targets" not in self.model_fields_set:
            listed = [name for name in listed if any(targets.matches(name, one) for one in names)]
        found, matched = targets.mistakes("peft.targets", listed, names), self.matched(model)
        if matched:
            for key in ("ranks", "alphas"):
                found += targets.mistakes(f"peft.{key}", getattr(self, key), matched)
        ends = [name for name in targets.ENDS if name in matched]
        if ends and model.tie_embeddings:
            found.append(
                f"peft.targets: {' and '.join(ends)}: with model.tie_embeddings embedding and head share one "
                "tensor, so that an update of one alone cannot be merged"
            )
        elif ends and self.dora:
            found.append(f"peft.dora: {' and '.join(ends)}: only linears inside the blocks have magnitudes")
        return found

    def insert(self, model: Any) -> None:
        from megatron_lite.peft.lora_modules import add_lora

        add_lora(model, self)

    def merged(self, base: Source, adapter: CheckpointSource, *, sign: int) -> Source:
        from megatron_lite.checkpoint.adapters.merge import Merged

        return Merged(base, adapter, sign=sign)

    @classmethod
    def peft_folder(cls) -> type[PeftSource] | None:
        from megatron_lite.peft.lora_folder import LoRASource

        return LoRASource
