"""What a PEFT method is: a section of the config, with what it does to models and to checkpoints.

Nothing here or in a method's own file imports torch at its top: the config's union is made of these classes, and a
mistake in a config is told before torch could be imported. What computes is imported where it is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_lite.errors import CheckpointError
from megatron_lite.section import Section

if TYPE_CHECKING:
    import torch

    from megatron_lite.checkpoint.adapters.peft_folder import PeftSource
    from megatron_lite.checkpoint.source import CheckpointSource, Source
    from megatron_lite.config import Config, ModelConfig


# Frozen weights in 8 or 4 bits (``distributed/quantization.py``): this many numbers of a row share a float32 scale, and
# take this many bytes, the scale included.
PACKED_BLOCK = 64
PACKED_BYTES = {"int8": 64 + 4, "nf4": 32 + 4}


class PeftMethod(Section, ABC):
    """Parameter-efficient fine-tuning of the model that ``init.from`` names, whose own weights stay frozen.

    ``base_dtype``: what the base is stored in; None: what is computed in (``train.precision``). ``int8``, ``nf4``: the
    linears inside the blocks in 8 or 4 bits (QLoRA, Dettmers et al. 2023), the rest in what is computed in.

    A method defines ``insert`` and ``matched``; the other hooks have defaults that do nothing. ``vocabulary``: names of
    its parameters with a row for each entry of the vocabulary, padded as the embedding is.
    """

    vocabulary: ClassVar[tuple[str, ...]] = ()

    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    method: str

    @property
    def packing(self) -> str | None:
        """How the base's linears are packed, if they are."""
        return self.base_dtype if self.base_dtype in PACKED_BYTES else None

    @property
    def num_positions(self) -> int:
        """How many positions it takes ahead of the first token."""
        return 0

    @abstractmethod
    def matched(self, model: ModelConfig) -> list[str]:
        """The parts of a model that it adapts, by name."""

    def mistakes(self, config: Config) -> list[str]:
        """What does not fit the rest of the config."""
        return []

    def differences(self, there: PeftMethod, model: ModelConfig) -> list[str]:
        """By key, why an adapter trained with the section ``there`` cannot continue as this one."""
        keys = ["method"] if type(there) is not type(self) else type(self).model_fields.keys() - {"base_dtype"}
        return unlike(sorted(keys), there, self)

    @abstractmethod
    def insert(self, model: Any) -> None:
        """Put its modules into a frozen model on the meta device; every parameter has a ``ShardSpec``."""

    def fold(self, model: Any, dtype: torch.dtype) -> None:
        """Replace what only training needs, before ``model`` generates."""

    def merged(self, base: Source, adapter: CheckpointSource, *, sign: int) -> Source:
        """``base`` with ``adapter`` added to its weights, or taken out again (``sign`` -1). Raises CheckpointError."""
        raise CheckpointError(f"{adapter.path}: peft.method={self.method} changes no weights: nothing to merge")

    @classmethod
    def peft_folder(cls) -> type[PeftSource] | None:
        """What reads and writes its folders of Hugging Face's peft library; None if that lacks the method."""
        return None


def unlike(keys: Iterable[str], there: PeftMethod, here: PeftMethod) -> list[str]:
    """A line for each key whose value differs."""
    values = {key: (getattr(there, key), getattr(here, key)) for key in keys}
    return [f"peft.{key} {a} there, {b} here" for key, (a, b) in values.items() if a != b]
