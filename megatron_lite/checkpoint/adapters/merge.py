"""A LoRA or DoRA adapter merged into its base, as a source: any rectangle of W + s · B A, computed when it is read.

So a merged model can be used wherever a source can: rewriting, export, comparison, ``init.from``. Only the rectangle
and the matching parts of the factors are in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.checkpoint.adapters.fingerprint import check_base, fingerprint_of
from megatron_lite.checkpoint.source import CheckpointSource, Info, Source
from megatron_lite.config import ModelConfig
from megatron_lite.data.ends import named_ends, with_ends
from megatron_lite.distributed.shard import Tile
from megatron_lite.errors import CheckpointError
from megatron_lite.families.family import linears
from megatron_lite.peft.lora import LoRAConfig


class Update(NamedTuple):
    """The update of linear ``name``: it is added to ``length`` rows of a global tensor, beginning with row ``start``.
    ``factors``: the prefix of its factors' names."""

    name: str
    factors: str
    start: int
    length: int
    scale: float


def updates(config: LoRAConfig, model: ModelConfig) -> dict[str, list[Update]]:
    """The updates of each weight, by the weight's name."""
    places = {  # part: (the linear that holds it, its first row there, its number of rows)
        f"{linear.half}.{short}": (linear.name, linear.starts[short], rows)
        for linear in linears(model)
        for short, rows in linear.parts.items()
    }
    found: dict[str, list[Update]] = {}
    for name in config.matched(model):
        block, _, place = name.partition(".")[2].partition(".")
        linear, start, length = places.get(place, (name, 0, model.padded_vocab_size))  # embedding and head
        owner = f"model.blocks.{block}.{linear}" if place else f"model.{name}"
        update = Update(name, f"{owner}.lora_{name.rpartition('.')[2]}", start, length, config.scale_of(name))
        found.setdefault(f"{owner}.weight", []).append(update)
    return found


class Merged(Source):
    """``base`` with ``adapter`` merged into it, in float32; ``sign`` -1 removes it again. Raises CheckpointError for a
    base that the adapter was not trained on."""

    def __init__(self, base: Source, adapter: CheckpointSource, *, sign: int = 1) -> None:
        config = adapter.peft
        assert isinstance(config, LoRAConfig)
        if config.dora and sign < 0:
            raise CheckpointError(f"{adapter.path}: a DoRA adapter cannot be unmerged: its scale is lost in merging")
        if sign > 0:
            check_base(adapter.checkpoint, fingerprint_of(base), base.path)
        self.base, self.adapter, self.config, self.sign = base, adapter, config, sign
        self.path, self.model, self.precision, self.notes = adapter.path, base.model, base.precision, base.notes
        self.updates = updates(config, base.model)
        self.tensors = {
            name: Info(torch.promote_types(info.dtype, torch.float32), info.shape)
            for name, info in base.tensors.items()
            if name.startswith("model.")
        }

    def read(self, name: str, tile: Tile) -> None:
        if name not in self.updates:
            self.base.read(name, tile)
            return
        rows, columns = tile.place
        whole = slice(0, self.tensors[name].shape[1]) if self.config.dora else columns  # DoRA needs whole rows
        weight = _part(self.base, name, rows, whole)
        before = torch.linalg.vector_norm(weight, dim=1) if self.config.dora else None
        trained = torch.ones(len(weight))
        for _, factors, start, length, scale in self.updates[name]:
            first, last = max(rows.start, start), min(rows.stop, start + length)
            if first >= last:
                continue
            here, there = slice(first - rows.start, last - rows.start), slice(first - start, last - start)
            if name == "model.embedding.weight":  # a lookup table: A belongs to its rows, B to its columns
                a = _part(self.adapter, f"{factors}_a", there)
                weight[here] += self.sign * scale * a @ _part(self.adapter, f"{factors}_b", whole).t()
            else:
                b = _part(self.adapter, f"{factors}_b", there)
                weight[here] += self.sign * scale * b @ _part(self.adapter, f"{factors}_a", None, whole)
            if before is not None:
                trained[here] = _part(self.adapter, f"{factors}_m", there)
        if before is not None:
            weight *= (trained * before / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
            weight = weight[:, columns]
        tile.data.copy_(weight)

    def extras(self) -> dict[str, bytes]:
        base = self.base.extras()
        return with_ends({**base, **self.adapter.extras()}, named_ends(base))


def _part(source: Source, name: str, *place: slice | None) -> Tensor:
    """A rectangle of a tensor in float32; None: the whole dim."""
    shape = source.tensors[name].shape
    wanted = [place[dim] if dim < len(place) else None for dim in range(len(shape))]
    slices = [part or slice(0, size) for part, size in zip(wanted, shape, strict=True)]
    part = torch.empty([s.stop - s.start for s in slices])
    source.read(name, Tile(part, tuple(s.start for s in slices)))
    return part
