"""Parameter-efficient fine-tuning: a section for each method."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.section import PositiveFloat, Probability, Section, Width
from megatron_lite.families import targets

if TYPE_CHECKING:
    from megatron_lite.config.tree import Config


# Frozen weights in 8 or 4 bits (``distributed/quantization.py``): so many numbers of a row share a float32 scale, and
# take so many bytes with it.
PACKED_BLOCK = 64
PACKED_BYTES = {"int8": 64 + 4, "nf4": 32 + 4}


class PeftSection(Section):
    """Parameter-efficient fine-tuning of the model that ``init.from`` names, which stays as it is.

    ``base_dtype``: what the base is stored in; None: what is computed in (``train.precision``). ``int8``, ``nf4``: the
    linears inside the blocks in 8 or 4 bits (QLoRA, Dettmers et al. 2023), the rest in what is computed in.
    """

    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None

    @property
    def packing(self) -> str | None:
        """How the base's linears are packed, if they are."""
        return self.base_dtype if self.base_dtype in PACKED_BYTES else None

    def differences(self, there: PeftSection, model: ModelConfig) -> list[str]:
        """By key, why the adapter of another section could not be this one's."""
        keys = ["method"] if type(there) is not type(self) else type(self).model_fields.keys() - {"base_dtype"}
        return _unlike(sorted(keys), there, self)


def _unlike(keys: Iterable[str], there: PeftSection, here: PeftSection) -> list[str]:
    values = {key: (getattr(there, key), getattr(here, key)) for key in keys}
    return [f"peft.{key} {a} there, {b} here" for key, (a, b) in values.items() if a != b]


class LoRAConfig(PeftSection):
    """Low-rank updates of linears (Hu et al. 2021): W + alpha / r · B A, and with ``rslora`` alpha / √r (Kalajdzievski
    2023).

    ``targets``: q, k, v, o, gate, up, down, embedding, head, or globs over whole names (``blocks.[0-3].mlp.*``).
    ``ranks``, ``alphas``: another r or alpha for what a pattern matches; the first that matches counts. ``dropout``: of
    what A sees. ``dora``: direction and magnitude apart (Liu et al. 2024).
    """

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
        """What B A is multiplied by there."""
        r = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.rslora else r)

    def matched(self, model: ModelConfig) -> list[str]:
        """The linears of this model that are adapted."""
        names = targets.linear_names(model)
        return [name for name in names if any(targets.matches(pattern, name) for pattern in self.targets)]

    def differences(self, there: PeftSection, model: ModelConfig) -> list[str]:
        """Of two that name their modules otherwise, in what they come to; dropout is training's."""
        if not isinstance(there, LoRAConfig):
            return super().differences(there, model)
        found = _unlike(("dora", "rslora"), there, self)
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
        """What does not fit the rest of the config."""
        return self.unfit(config.model)

    def unfit(self, model: ModelConfig) -> list[str]:
        """What does not fit a model."""
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
                f"peft.targets: {' and '.join(ends)}: model.tie_embeddings makes one tensor of both, and an update of "
                "one could never be merged into it"
            )
        elif ends and self.dora:
            found.append(f"peft.dora: {' and '.join(ends)}: only linears inside the blocks have magnitudes")
        return found


class AdapterConfig(PeftSection):
    """Bottlenecks of ``size`` units between the frozen layers, which start as the identity.

    ``placement``: ``houlsby`` after attention and after the MLP (Houlsby et al. 2019), ``pfeiffer`` after the MLP alone
    (Pfeiffer et al. 2021), ``parallel`` beside the MLP (He et al. 2022). ``scale``: of what they add.
    """

    method: Literal["adapter"]
    size: Width = 64
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    scale: PositiveFloat = 1.0

    def matched(self, model: ModelConfig) -> list[str]:
        """What is followed, or accompanied, by a bottleneck."""
        halves = ("attention", "mlp") if self.placement == "houlsby" else ("mlp",)
        return [f"blocks.{i}.{half}" for i in range(model.num_layers) for half in halves]

    def mistakes(self, config: Config) -> list[str]:
        """What does not fit the rest of the config."""
        tp = config.parallel.tp
        return [f"peft.size={self.size} is not a multiple of parallel.tp={tp}"] if self.size % tp else []


class PrefixConfig(PeftSection):
    """``length`` trained keys and values ahead of the tokens in every layer (Li and Liang 2021), which take the first
    ``length`` positions. ``reparameterize``: train them as an MLP's output, of so many hidden units, which is left out
    of what is exported.
    """

    method: Literal["prefix"]
    length: Width = 16
    reparameterize: Width | None = None

    def matched(self, model: ModelConfig) -> list[str]:
        """What has a prefix."""
        return [f"blocks.{i}.attention" for i in range(model.num_layers)]

    def mistakes(self, config: Config) -> list[str]:
        """What does not fit the rest of the config."""
        return self.unfit(config.model, config.data.seq_len, "data.seq_len")

    def unfit(self, model: ModelConfig, tokens: int = 1, called: str = "a token") -> list[str]:
        """What does not fit a model that reads so many tokens."""
        needed, limit = self.length + tokens, model.max_seq_len
        if needed <= limit:
            return []
        return [
            f"peft.length={self.length} + {called}={tokens} = {needed} positions exceed model.max_seq_len={limit}; "
            "the prefix takes the first"
        ]


METHODS: dict[str, type[PeftSection]] = {"lora": LoRAConfig, "adapter": AdapterConfig, "prefix": PrefixConfig}
PeftConfig = Annotated[LoRAConfig | AdapterConfig | PrefixConfig, Field(discriminator="method")]
