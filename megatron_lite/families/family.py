"""What a family of models is: which switches its block has, and what others call its parts. No torch.

Whatever depends on the shape of a model derives from ``linears``: FLOPs, memory, what tensor parallelism can divide,
the modules that PEFT adapts, merging, and conversions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig


class Linear(NamedTuple):
    """A linear of a block: its weight [rows, columns], which may hold several ``parts``, in order of their rows.

    ``name``: in our blocks. ``parts``: the rows of each by the short name that users know it by. ``split``: the dim
    that tensor parallelism divides, each part by itself.
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
    """What a ``model_type`` of Hugging Face's is here.

    ``fields``: the keys that are honoured, by ours. ``defaults``: what their config class says where a folder says
    nothing; its type is the key's. ``fixed``: keys that have to have one of these values, as the model knows nothing
    else, the first where a folder says nothing. ``section``: what it is beside that, of our section. ``aliases``:
    second names that their class has for a key. ``harmless``: keys that this family's code never reads.
    ``contradictions``: what of the values cannot be honoured together. ``tokenizer``: the class that AutoTokenizer uses
    for it, if any; ``tokenizer_wins``: whatever the folder names.
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
    """Hugging Face's names of tensors: ``top`` of all but the head's, ``layers`` under it; the modules under these by
    ours, for a linear of several parts one name for each or one for all. ``transposed``: weights lie as [in, out]."""

    top: str
    layers: str
    embedding: str
    positions: str
    norms: Mapping[str, str]
    linears: Mapping[str, tuple[str, ...]]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """A row of switches, and names. A new family is a file with one of these and a line in ``FAMILIES``.

    ``norm``, ``gated``, ``rotary``: the block's. ``bias``, ``tied``, ``ffn_size``: where a config does not say.
    ``model_types``: Hugging Face's that it computes; ``model_type``: which of them a config is, as export writes it,
    raising CheckpointError for none; ``written``: keys of its ``config.json`` beside those in ``fields``. ``buffers``:
    a pattern of what their files hold that is no weight.
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
        """What a norm has."""
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
