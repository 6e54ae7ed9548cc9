"""Sources: tensors on disk in any format, of which any rectangle can be read, under this project's names.

``model.NAME`` is a weight, ``optimizer.NAME.KIND`` an optimizer tensor. Everything except resuming (conversion,
comparison, averaging, fine-tuning) reads checkpoints through a source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lite.checkpoint.commit import STATE
from megatron_lite.checkpoint.manifest import overlap
from megatron_lite.checkpoint.reading import Checkpoint
from megatron_lite.checkpoint.shards import copy_box
from megatron_lite.checkpoint.tensor_file import DTYPES, TensorFile, row_blocks
from megatron_lite.config import PRECISIONS, ModelConfig, PeftConfig, parse_model, parse_peft, parse_yaml
from megatron_lite.data.ends import named_ends, with_ends
from megatron_lite.distributed.shard import Piece, Tile
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.peft import METHODS


class Info(NamedTuple):
    """Shape and dtype of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def shown(name: str) -> str:
    """An untrusted name, made safe for a terminal."""
    return ascii(name)[1:-1][:100]


def refuse_quantized(dtype: torch.dtype, where: str) -> None:
    """Refuse a weight in a quantized dtype, which needs scales. Raises CheckpointError."""
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise CheckpointError(f"{where} is {dtype}: quantised weights are not read")


class Source(ABC):
    """Global tensors by name. ``model``: the config of the model. ``precision``: the compute dtype. ``step``: the
    optimizer's step. ``notes``: remarks for the user. ``peft``: the config section, if the tensors are an adapter's."""

    path: Path
    tensors: Mapping[str, Info]
    model: ModelConfig
    precision: str = "float32"
    step: int = 0
    notes: Sequence[str] = ()
    peft: PeftConfig | None = None

    @property
    def num_updates(self) -> int:
        """The number of updates of the optimizer; its steps, unless more is known."""
        return self.step

    @abstractmethod
    def read(self, name: str, tile: Tile) -> None:
        """Fill a tile of a tensor, converting between float dtypes. Raises CheckpointError."""

    def extras(self) -> dict[str, bytes]:
        """Small files that belong to the checkpoint, such as the tokenizer."""
        return {}

    def true_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor without the padding of the vocabulary dim."""
        shape = self.tensors[name].shape
        owner = name.partition(".")[2]
        if owner.startswith(_PADDED) and len(shape) == 2:
            return (min(shape[0], self.model.vocab_size or shape[0]), shape[1])
        return shape

    def refuse_unused(self, names: Collection[str]) -> None:
        """Raise CheckpointError if there are tensors that the model does not use. ``names``: their names in the
        files."""
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            first = ", ".join(map(shown, sorted(names)[:3]))
            raise CheckpointError(f"{self.path}: the model has no use for {first}{more}")

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Close its files."""

    @torch.no_grad()
    def load(self, pieces: Mapping[str, Piece], note: Callable[[str, Tile], None] | None = None) -> None:
        """Fill pieces in place; additional padding of the vocabulary is filled with zeros. ``note`` is called with
        everything that was read, before it is packed. Raises CheckpointError if a tensor is missing or has another
        shape."""
        for name, piece in pieces.items():
            if name not in self.tensors:
                only = (
                    f" (it holds a {self.peft.method} adapter, not the model that this belongs to)" if self.peft else ""
                )
                raise CheckpointError(f"{self.path} lacks {name}{only}")
            shape, rows = self.tensors[name].shape, piece.shape[:1]
            if name in _VOCABULARY:
                rows = (self.model.vocab_size or 0,)
            if piece.shape != shape and (name not in _VOCABULARY or piece.shape[1:] != shape[1:]):
                raise CheckpointError(f"{self.path}: {name} has shape {shape}, wanted {piece.shape}")
            for tile in chain.from_iterable(tile.writable() for tile in piece.tiles):
                held = max(0, rows[0] - tile.offset[0]) if rows else 1
                self.read(name, Tile(tile.data[:held], tile.offset))
                tile.data[held:].zero_()
                if note is not None:
                    note(name, tile)


_BLOCK_BYTES = 32 << 20
_PADDED = ("embedding.weight", "head.weight", *(name for method in METHODS.values() for name in method.vocabulary))
_VOCABULARY = tuple(f"model.{name}" for name in _PADDED)


class CheckpointSource(Source):
    """A checkpoint of ours. ``config``: its whole config, of which only ``model`` and ``peft`` are validated. ``base``:
    the path of its adapter's base."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.tensors = {n: Info(DTYPES[t.dtype], tuple(t.shape)) for n, t in checkpoint.manifest.tensors.items()}
        self.step, where = checkpoint.step, f"{self.path}/config.yaml"
        try:
            self.config = saved = parse_yaml(checkpoint.extra("config.yaml").decode("utf-8", "replace"), where)
            self.model = parse_model(saved.get("model"), where)
            self.peft = parse_peft(saved.get("peft"), where)
        except ConfigError as error:
            raise CheckpointError("; ".join(str(error).splitlines()[:3])) from None
        self.base = _text(saved, "init", "from", where)
        self.precision = _text(saved, "train", "precision", where) or "float32"
        if self.precision not in PRECISIONS:
            raise CheckpointError(
                f"{where}: train.precision: expected {', '.join(PRECISIONS)}, not {self.precision!a:.200}"
            )
        self._files: dict[str, TensorFile] = {}

    @property
    def num_updates(self) -> int:
        """The number of updates; fewer than steps if batches were skipped."""
        train = self.checkpoint.state().get("train")
        found = train.get("updates") if isinstance(train, dict) else None
        return found if type(found) is int and found >= 0 else self.step

    def read(self, name: str, tile: Tile) -> None:
        tensor = self.checkpoint.manifest.tensors[name]
        for entry in tensor.boxes:
            if overlap(entry, tile) is not None:
                if entry.file not in self._files:
                    self._files[entry.file] = TensorFile(self.path / entry.file)
                copy_box(self._files[entry.file], tensor, name, entry, tile)

    def check_adapter(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse an adapter whose tensors differ from these (before memory is allocated) or hold NaN or infinity.
        Raises CheckpointError."""
        weights = {name: info for name, info in self.tensors.items() if name.startswith("model.")}
        if odd := sorted(weights.keys() ^ shapes.keys()):
            complaint = "lacks" if odd[0] in shapes else "has no use for"
            raise CheckpointError(f"{self.path} {complaint} {odd[0]}: not the adapter that its config.yaml describes")
        for name, (dtype, shape) in weights.items():
            if shape != shapes[name] or not dtype.is_floating_point:
                raise CheckpointError(f"{self.path}: {name} is {dtype} {shape}, its config.yaml implies {shapes[name]}")
        for name, (dtype, shape) in weights.items():
            for place in row_blocks(shape, dtype.itemsize, _BLOCK_BYTES):
                block = torch.empty([s.stop - s.start for s in place], dtype=dtype)
                self.read(name, Tile(block, tuple(s.start for s in place)))
                if not block.float().isfinite().all():
                    raise CheckpointError(f"{self.path}: {name} holds numbers that are not finite")

    def extras(self) -> dict[str, bytes]:
        shards = {box.file for tensor in self.checkpoint.manifest.tensors.values() for box in tensor.boxes}
        small = self.checkpoint.manifest.files.keys() - shards - {STATE}
        return {name: self.checkpoint.extra(name) for name in sorted(small)}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _text(saved: Mapping[str, Any], section: str, key: str, where: str) -> str | None:
    """A string in an unvalidated config."""
    part = saved.get(section) or {}
    value = part.get(key) if isinstance(part, dict) else part
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{where}: {section}.{key}: expected a string, found {type(value).__name__}")
    return value


class Average(Source):
    """The mean of several sources' weights (Izmailov et al. 2018), computed in float64."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources, first = sources, sources[0]
        self.path, self.model, self.precision, self.step = first.path, first.model, first.precision, first.step
        self.tensors = {name: info for name, info in first.tensors.items() if name.startswith("model.")}
        for other in sources[1:]:
            for name, info in self.tensors.items():
                if other.tensors.get(name, Info(info.dtype, ())).shape != info.shape:
                    raise CheckpointError(f"{other.path}: {name} is missing or has another shape than in {first.path}")

    def read(self, name: str, tile: Tile) -> None:
        total = torch.zeros(tile.shape, dtype=torch.float64)
        for source in self.sources:
            part = torch.empty(tile.shape, dtype=torch.float64)
            source.read(name, Tile(part, tile.offset))
            total += part
        tile.data.copy_(total / len(self.sources))

    def extras(self) -> dict[str, bytes]:
        first, *others = (source.extras() for source in self.sources)
        return with_ends(first, chain.from_iterable(map(named_ends, others)))
