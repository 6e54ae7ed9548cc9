"""The shape of a model."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import model_validator

from megatron_lite.families import FAMILIES
from megatron_lite.families.family import Family
from megatron_lite.section import Positive, PositiveFloat, Probability, Section, number

_FOLLOWS: Any = None  # filled in from the family and the other sizes where it is not given


class RopeScaling(Section):
    """Rotary frequency scaling: ``linear`` divides positions; ``llama3`` rescales only long wavelengths."""

    type: Literal["linear", "llama3"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_seq_len: Positive = 8192


# The keys that determine the tensors and their shapes; with learned positions, max_seq_len does, too.
_SHAPES = (
    *("family", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size"),
    *("bias", "qkv_bias", "qk_norm", "tie_embeddings"),
)
# The keys that do not change what trained weights compute.
_WITHOUT_EFFECT = ("preset", "init_std", "vocab_multiple", "max_seq_len")
_ROTARY = ("rope_theta", "rope_scaling")


class ModelConfig(Section):
    """The shape of a decoder. ``preset`` names a file of ``configs/models`` whose keys the others override.

    ``vocab_size`` comes from ``data.tokenizer`` when it is not given; it is padded to a multiple of
    ``vocab_multiple``, so that tp can split it, and the true size is kept. ``qk_norm``: an RMS norm of each head's
    queries and keys before they are rotated (Qwen3).
    """

    preset: str | None = None
    family: Literal[tuple(FAMILIES)] = "llama"  # type: ignore[valid-type]
    vocab_size: Positive | None = None
    vocab_multiple: Positive = 128
    hidden_size: Positive = 256
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive = _FOLLOWS
    head_dim: Positive = _FOLLOWS
    ffn_size: Positive = _FOLLOWS
    max_seq_len: Positive = 2048
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    bias: bool = _FOLLOWS
    qkv_bias: bool = _FOLLOWS
    qk_norm: bool = False
    tie_embeddings: bool = _FOLLOWS
    dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    init_std: PositiveFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        """Fill in what follows from the family and the other sizes."""
        if not isinstance(values, dict):
            return values
        filled = {key: value for key, value in values.items() if value is not None}
        name = filled.get("family")
        family = FAMILIES.get(name if isinstance(name, str) else "", FAMILIES["llama"])  # another one is refused below
        filled = {"bias": family.bias, "tie_embeddings": family.tied, **filled}
        filled.setdefault("qkv_bias", filled["bias"])
        hidden, heads = number(filled.get("hidden_size", 256)), number(filled.get("num_heads", 4))
        if isinstance(heads, int) and heads > 0:
            filled.setdefault("num_kv_heads", heads)
            if isinstance(hidden, int) and "head_dim" not in filled:
                if hidden % heads:
                    fits = sorted((n for n in range(1, 257) if hidden % n == 0), key=lambda n: abs(n - heads))[:3]
                    nearby = ", ".join(map(str, sorted(fits)))
                    raise ValueError(
                        f"num_heads={heads} must divide hidden_size={hidden}, for example {nearby}; or set head_dim"
                    )
                filled["head_dim"] = hidden // heads
        if isinstance(hidden, int):
            filled.setdefault("ffn_size", family.ffn_size(hidden))
        return filled

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.traits.rotary and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")
        return self

    def differences(self, there: ModelConfig) -> tuple[list[str], list[str]]:
        """The keys that give another model other tensors, and those that make it compute something else with the same
        tensors: all other keys that differ, unless they are known to have no effect."""
        rotary = self.traits.rotary
        shapes = _SHAPES if rotary else (*_SHAPES, "max_seq_len")
        without = _WITHOUT_EFFECT if rotary else (*_WITHOUT_EFFECT, *_ROTARY)
        unlike = [key for key in type(self).model_fields if getattr(self, key) != getattr(there, key)]
        return [k for k in unlike if k in shapes], [k for k in unlike if k not in shapes and k not in without]

    def computing_as(self, there: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """A copy of this model that computes what another does with the same tensors, dropout apart, and the keys that
        changed. With rotary positions, ``max_seq_len`` is the larger of both."""
        keys = [key for key in self.differences(there)[1] if "dropout" not in key]
        longest = max(self.max_seq_len, there.max_seq_len) if self.traits.rotary else self.max_seq_len
        return self.model_copy(update={**{key: getattr(there, key) for key in keys}, "max_seq_len": longest}), keys

    @property
    def traits(self) -> Family:
        """The table of its family."""
        return FAMILIES[self.family]

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of ``vocab_multiple``."""
        assert self.vocab_size is not None
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


CHANGEABLE = tuple(f"model.{key}" for key in ModelConfig.model_fields if key not in (*_SHAPES, *_WITHOUT_EFFECT))
