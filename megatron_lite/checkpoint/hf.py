"""Hugging Face folders: read a rectangle at a time, straight into shards; written a block at a time.

Nothing is taken on trust: an index names files of its own folder only, JSON has no duplicate keys, a config says
nothing that the model does not do, no code in a folder is run, and pickled weights are not opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.manifest import parse_json
from megatron_lite.checkpoint.shards import buffer
from megatron_lite.checkpoint.source import Info, Source
from megatron_lite.checkpoint.storage import new_folder, open_regular, write_file
from megatron_lite.checkpoint.tensor_file import TensorFile, header, row_blocks
from megatron_lite.config import parse_model
from megatron_lite.dist.shard import Tile
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.faults import Faults
from megatron_lite.models.huggingface import Part, config_json, model_section, tensor_parts

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
TOKENIZER_FILES = (  # what belongs to a model beside its weights
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json"),
)
_UNUSED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that older versions saved
_MAX_JSON_BYTES = 64 << 20


def is_hugging_face(path: Path) -> bool:
    """Whether this looks like a model folder."""
    return (path / CONFIG).is_file()


def own_file(folder: Path, name: str) -> Path:
    """A file of a model folder by its name. Links are followed within the folder, and, in the hub's cache
    (``snapshots/REVISION``), to its ``blobs``. Raises CheckpointError for any other place."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{folder}: {name!a} is not the name of a file in it")
    resolved, home = (folder / name).resolve(), folder.resolve()
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if resolved.parent not in allowed:
        raise CheckpointError(f"{folder / name} leads out of the folder, to {resolved}")
    if not resolved.exists():
        raise CheckpointError(f"{folder / name} is missing")
    return resolved


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """An object in a JSON file of a model folder."""
    path = own_file(folder, name)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{folder / name}: too large for such a file")
    with open_regular(path) as file:
        tree = parse_json(file.read(), folder / name)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{folder / name}: expected an object, found {type(tree).__name__}")
    return tree


def read_model(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The ``model`` section that a folder's ``config.json`` describes, and notes about it."""
    return model_section(read_json(folder, CONFIG), str(folder / CONFIG))


class HuggingFaceSource(Source):
    """The weights of a model folder. ``vocab_multiple``: what the vocabulary is padded to, with zeros."""

    def __init__(self, folder: Path, vocab_multiple: int | None = None) -> None:
        self.path = folder
        section, self.notes = read_model(folder)
        if vocab_multiple is not None:
            section["vocab_multiple"] = vocab_multiple
        try:
            self.model = parse_model(section, str(folder / CONFIG))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        self._files: dict[str, TensorFile] = {}
        self._where = self._locate()
        self._parts = {f"model.{name}": self._named(parts) for name, parts in tensor_parts(self.model).items()}
        self.tensors = {name: self._info(name, parts) for name, parts in self._parts.items()}
        self.precision = "bfloat16" if self.tensors["model.norm.weight"].dtype == torch.bfloat16 else "float32"
        used = {part.name for parts in self._parts.values() for part in parts}
        unused = {n for n in self._where if n not in used and not n.endswith(_UNUSED)}
        if self.model.tie_embeddings:
            unused.discard("lm_head.weight")
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise CheckpointError(f"{folder}: the model has no use for {', '.join(sorted(unused)[:3])}{more}")

    def _locate(self) -> dict[str, TensorFile]:
        """Which file each tensor lies in."""
        if (self.path / INDEX).exists():
            listed = read_json(self.path, INDEX).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise CheckpointError(f"{self.path / INDEX}: weight_map: expected file names by tensor")
            for name in sorted(set(listed.values())):
                self._files[name] = TensorFile(own_file(self.path, name))
            for tensor, name in listed.items():
                if tensor not in self._files[name].tensors:
                    raise CheckpointError(f"{self.path / name} lacks {tensor!a}, which the index says is there")
            return {tensor: self._files[name] for tensor, name in listed.items()}
        if not (self.path / SINGLE).exists():
            pickled = sorted(p.name for p in self.path.glob("*.bin"))[:1]
            hint = f"; {pickled[0]} is pickled, which is never opened: save it as safetensors" if pickled else ""
            raise CheckpointError(f"{self.path}: no {SINGLE} and no {INDEX}{hint}")
        self._files[SINGLE] = TensorFile(own_file(self.path, SINGLE))
        return dict.fromkeys(self._files[SINGLE].tensors, self._files[SINGLE])

    def _named(self, parts: list[Part]) -> list[Part]:
        """Under the names in the files, which lack the model's own prefix where its base was saved alone."""
        named = []
        for part in parts:
            short = part.name.partition(".")[2]
            use = (
                part
                if part.name in self._where or short not in self._where
                else Part(short, part.shape, part.transposed)
            )
            if use.name not in self._where:
                raise CheckpointError(f"{self.path} lacks {part.name}")
            named.append(use)
        return named

    def _info(self, name: str, parts: list[Part]) -> Info:
        for part in parts:
            stored = self._where[part.name].tensors[part.name]
            if stored.shape != part.stored:
                shape = stored.shape
                raise CheckpointError(f"{self.path}: {part.name} has shape {shape}, {CONFIG} means {part.stored}")
            if not stored.dtype.is_floating_point:
                raise CheckpointError(f"{self.path}: {part.name} is {stored.dtype}: quantised weights are not read")
        first = self._where[parts[0].name].tensors[parts[0].name]
        rows = sum(part.shape[0] for part in parts)
        if name in ("model.embedding.weight", "model.head.weight"):
            rows = self.model.padded_vocab_size
        return Info(first.dtype, (rows, *parts[0].shape[1:]))

    def read(self, name: str, tile: Tile) -> None:
        first, stop = tile.offset[0], tile.offset[0] + tile.shape[0]
        columns = tuple(slice(o, o + n) for o, n in zip(tile.offset[1:], tile.shape[1:], strict=True))
        start = 0
        for part in self._parts[name]:
            low, high = max(first, start), min(stop, start + part.shape[0])
            if low < high:
                into, rows = tile.data[low - first : high - first], slice(low - start, high - start)
                place = (*columns, rows) if part.transposed else (rows, *columns)
                self._where[part.name].read(part.name, place, into.t() if part.transposed else into)
            start += part.shape[0]
        if stop > start:
            tile.data[max(0, start - first) :].zero_()  # the padding of the vocabulary

    def extras(self) -> dict[str, bytes]:
        return {name: own_file(self.path, name).read_bytes() for name in TOKENIZER_FILES if (self.path / name).exists()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def export(
    source: Source, folder: Path, dtype: torch.dtype | None, shard_bytes: int, block_bytes: int = 64 << 20
) -> dict[str, str]:
    """Write a model folder; its files' SHA-256 by name. ``dtype`` None: as stored. Memory: one block.

    ``folder`` appears whole or not at all. Raises CheckpointError for a model that Hugging Face has no name for, or
    where ``folder`` is there already.
    """
    parts = tensor_parts(source.model)
    # Theirs → (ours, first row, part).
    placed: dict[str, tuple[str, int, Part]] = {}
    for ours, some in parts.items():
        start = 0
        for part in some:
            placed[part.name] = (f"model.{ours}", start, part)
            start += part.shape[0]
    kinds = {theirs: _kind(source, dtype, *place) for theirs, place in placed.items()}
    stored = str(next(iter(kinds.values())).dtype).removeprefix("torch.")
    small = {name: content for name, content in source.extras().items() if name in TOKENIZER_FILES}
    small[CONFIG] = json.dumps(config_json(source.model, stored), indent=2).encode()

    groups: list[list[str]] = [[]]
    size = 0
    for name, info in kinds.items():
        length = math.prod(info.shape) * info.dtype.itemsize
        if groups[-1] and size + length > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += length
    files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}
    if len(groups) == 1:
        files = {SINGLE: groups[0]}
    else:
        total = sum(math.prod(info.shape) * info.dtype.itemsize for info in kinds.values())
        where = {name: file for file, names in files.items() for name in names}
        small[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2).encode()

    digests: dict[str, str] = {}
    with new_folder(folder) as temporary:
        for file, names in files.items():
            chunks = _file(names, kinds, lambda name: _blocks(source, kinds[name], *placed[name], block_bytes))
            digests[file] = write_file(temporary / file, chunks, Faults.none()).sha256
        for name, content in small.items():
            digests[name] = write_file(temporary / name, [content], Faults.none()).sha256
    return digests


def _kind(source: Source, dtype: torch.dtype | None, ours: str, start: int, part: Part) -> Info:
    if ours not in source.tensors:
        raise CheckpointError(f"{source.path} lacks {ours}")
    info = source.tensors[ours]
    return Info(dtype or info.dtype, part.stored)


def _file(names: list[str], kinds: Mapping[str, Info], blocks: Callable[[str], Iterator[Tensor]]) -> Iterator[Any]:
    yield header([(name, *kinds[name]) for name in names], {"format": "pt"})
    for name in names:
        for block in blocks(name):
            yield buffer(block)


def _blocks(source: Source, info: Info, ours: str, start: int, part: Part, limit: int) -> Iterator[Tensor]:
    """One tensor of theirs, in order, a block of rows at a time."""
    for place in row_blocks(info.shape, info.dtype.itemsize, limit):
        lows, sizes = [s.start for s in place], [s.stop - s.start for s in place]
        if part.transposed:
            block = torch.empty(sizes[::-1], dtype=info.dtype)
            source.read(ours, Tile(block, (start, lows[0])))
            yield block.t()
        else:
            block = torch.empty(sizes, dtype=info.dtype)
            source.read(ours, Tile(block, (start + lows[0], *lows[1:])))
            yield block
