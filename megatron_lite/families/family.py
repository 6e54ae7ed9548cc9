"""A model family: the switches of its block, and the names that others have for its parts. No torch.

Everything that depends on the shape of a model derives from ``linears``: FLOPs, memory, what tensor parallelism can
divide, the modules that PEFT adapts, merging, and conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig


class Linear(NamedTuple):
    """A linear of a block with a weight [rows, columns], in which several ``parts`` may be fused by rows.

    ``name``: its name in our blocks. ``parts``: the rows of each part, by its short name for users. ``split``: the dim
    that tensor parallelism splits, separately for each part.
    """

    name: str
    parts: Mapping[str, int]
    columns: int
    split: int
    bias: bool

    @property
    def rows(self) -> int:
        """Output features."""
        return sum(self.parts.values())

    @property
    def half(self) -> str:
        """``attention`` or ``mlp``."""
        return self.name.partition(".")[0]

    @property
    def starts(self) -> dict[str, int]:
        """The first row of each part."""
        return dict(zip(self.parts, accumulate(self.parts.values(), initial=0), strict=False))


@dataclass(frozen=True)
class ModelType:
    """How a ``model_type`` of Hugging Face maps to our config.

    ``fields``: their key → ours, for keys that are honoured. ``defaults``: the values of their config class, for keys
    that a folder leaves out; a key's type is that of its default. ``fixed``: keys with their only supported values, the
    first being the default. ``section``: further keys of our ``model`` section. ``aliases``: alternative name → key, as
    in their class. ``harmless``: keys that this family's code never reads. ``contradictions``: returns a message for
    each combination of values that is not supported. ``tokenizer``: the class that AutoTokenizer uses for it, if any;
    ``tokenizer_wins``: even if the folder names another one.
    """

    architecture: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    section: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    contradictions: Callable[[Mapping[str, Any]], list[str]] = lambda _: []
    tokenizer: str = ""
    tokenizer_wins: bool = False


@dataclass(frozen=True)
class TensorNames:
    """Hugging Face's names of tensors. ``top``: the prefix of all but the head's; ``layers``: that of the blocks below
    it. ``norms``, ``linears``: our module → theirs below these prefixes, where a linear of several parts has one name
    for each or one for all. ``transposed``: weights are stored as [in, out]."""

    top: str
    layers: str
    embedding: str
    positions: str
    norms: Mapping[str, str]
    linears: Mapping[str, tuple[str, ...]]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """Switches and names of a family. A new family is a file with one of these and a line in ``FAMILIES``.

    ``norm``, ``gated``, ``rotary``: switches of the block. ``bias``, ``tied``, ``ffn_size``: defaults of the config.
    ``model_types``: those of Hugging Face that it can compute; ``model_type``: the one that export writes for a config,
    raising CheckpointError if none fits; ``written``: keys of its ``config.json`` besides those in ``fields``.
    ``buffers``: a pattern for tensors in their files that are not weights.
    """

    norm: Literal["rms", "layer"]
    gated: bool
    rotary: bool
    bias: bool
    tied: bool
    ffn_size: Callable[[int], int]
    names: TensorNames
    model_types: Mapping[str, ModelType]
    model_type: Callable[[ModelConfig], str]
    written: Callable[[ModelConfig], dict[str, Any]]
    buffers: str

    @property
    def norm_parameters(self) -> tuple[str, ...]:
        """The names of a norm's parameters."""
        return ("weight", "bias") if self.norm == "layer" else ("weight",)


def linears(model: ModelConfig) -> tuple[Linear, ...]:
    """The linears of every block."""
    hidden, ffn, gated = model.hidden_size, model.ffn_size, model.traits.gated
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return (
        Linear("attention.qkv", {"q": q, "k": kv, "v": kv}, hidden, 0, model.qkv_bias),
        Linear("attention.out", {"o": hidden}, q, 1, model.bias),
        Linear("mlp.up", {"gate": ffn, "up": ffn} if gated else {"up": ffn}, hidden, 0, model.bias),
        Linear("mlp.down", {"down": hidden}, ffn, 1, model.bias),
    )


def block_weights(model: ModelConfig) -> int:
    """Elements of a block's matrices; its norms and biases are left out."""
    return sum(linear.rows * linear.columns for linear in linears(model))
