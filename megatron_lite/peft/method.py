"""The base class of PEFT methods: a section of the config, with hooks for models and checkpoints.

Neither this file nor a method's own file imports torch at its top: the config is built from these classes, and mistakes
in a config are reported in less time than torch takes to import. Code that computes is imported where it is called.
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

    ``base_dtype``: the dtype that the base is stored in; None: the compute dtype (``train.precision``). ``int8``,
    ``nf4``: the linears inside the blocks in 8 or 4 bits (QLoRA, Dettmers et al. 2023), the rest in the compute dtype.

    A method defines ``insert`` and ``matched``; the other hooks have defaults that do nothing. ``vocabulary``: names of
    its parameters with a row for each entry of the vocabulary, padded like the embedding.
    """

    vocabulary: ClassVar[tuple[str, ...]] = ()

    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    method: str

    @property
    def packing(self) -> str | None:
        """The format in which the base's linears are packed, or None."""
        return self.base_dtype if self.base_dtype in PACKED_BYTES else None

    @property
    def num_positions(self) -> int:
        """The number of positions that it occupies before the first token."""
        return 0

    @abstractmethod
    def matched(self, model: ModelConfig) -> list[str]:
        """The parts of a model that it adapts, by name."""

    def mistakes(self, config: Config) -> list[str]:
        """A line for each thing that does not fit the rest of the config."""
        return []

    def differences(self, there: PeftMethod, model: ModelConfig) -> list[str]:
        """A line for each key that keeps an adapter trained with the section ``there`` from continuing as this one."""
        keys = ["method"] if type(there) is not type(self) else type(self).model_fields.keys() - {"base_dtype"}
        return unlike(sorted(keys), there, self)

    @abstractmethod
    def insert(self, model: Any) -> None:
        """Put its modules into a frozen model on the meta device, every parameter with a ``ShardSpec``."""

    def fold(self, model: Any, dtype: torch.dtype) -> None:
        """Replace modules that only training needs, before ``model`` generates."""

    def merged(self, base: Source, adapter: CheckpointSource, *, sign: int) -> Source:
        """``base`` with ``adapter`` added to its weights, or taken out again (``sign`` -1). Raises CheckpointError."""
        raise CheckpointError(f"{adapter.path}: peft.method={self.method} changes no weights: nothing to merge")

    @classmethod
    def peft_folder(cls) -> type[PeftSource] | None:
        """The class that reads and writes folders of Hugging Face's peft library; None if that lacks the method."""
        return None


def unlike(keys: Iterable[str], there: PeftMethod, here: PeftMethod) -> list[str]:
    """A line for each key whose value differs."""
    values = {key: (getattr(there, key), getattr(here, key)) for key in keys}
    return [f"peft.{key} {a} there, {b} here" for key, (a, b) in values.items() if a != b]
