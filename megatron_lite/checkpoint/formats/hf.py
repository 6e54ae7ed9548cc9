"""Hugging Face folders: read in rectangles, directly into shards; written in blocks.

Nothing is trusted: an index may only name files of its own folder, JSON must not have duplicate keys, every key of the
config must be one that the model honours, code in a folder is not run, and pickled weights are not opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lite.checkpoint.manifest import parse_json
from megatron_lite.checkpoint.shards import buffer
from megatron_lite.checkpoint.source import Info, Source, refuse_quantized, shown
from megatron_lite.checkpoint.storage import new_folder, open_regular, write_file
from megatron_lite.checkpoint.tensor_file import TensorFile, header, row_blocks
from megatron_lite.config import ModelConfig, parse_model
from megatron_lite.data.ends import tokenizer_ids
from megatron_lite.data.hf_tokenizer import named, settled
from megatron_lite.data.tokenizer import GENERATION, MAIN, TOKENIZER_FILES, carried_tokenizer
from megatron_lite.distributed.shard import Tile
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.families.huggingface import (
    TOKEN_IDS,
    Part,
    config_json,
    from_config_json,
    from_mistral,
    tensor_parts,
)
from megatron_lite.layers.positions import rope_frequencies
from megatron_lite.training.faults import Faults

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of the peft library
_HEAD = "lm_head.weight"
# Buffers that older versions saved and newer ones compute.
_MAX_JSON_BYTES, _BLOCK_BYTES = 64 << 20, 64 << 20


def is_hugging_face(path: Path) -> bool:
    """Whether this looks like a model folder."""
    return (path / CONFIG).is_file()


def own_file(folder: Path, name: str) -> Path:
    """A file of a model folder by its name. Links are followed within the folder, and, in the hub's cache
    (``snapshots/REVISION``), to its ``blobs``. Raises CheckpointError for any other place."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{folder}: {name!a} is not the name of a file in it")
    try:
        resolved, home = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(f"{folder / name}: a link that leads to itself") from None
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


def read_model(
    folder: Path, vocab_multiple: int | None = None, *, strict: bool = False
) -> tuple[ModelConfig, list[str]]:
    """The model that a folder's ``config.json`` describes, and notes about it. Raises CheckpointError; with ``strict``,
    also for unknown keys."""
    section, notes = from_config_json(read_json(folder, CONFIG), str(folder / CONFIG), strict=strict)
    if vocab_multiple is not None:
        section["vocab_multiple"] = vocab_multiple
    try:
        return parse_model(section, str(folder / CONFIG)), notes
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


class Tensors(Protocol):
    """Named tensors of another format, of which rectangles can be read; for example a safetensors file."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """All tensors, with dtype and shape."""

    def read(self, name: str, place: Sequence[slice], into: Tensor) -> None:
        """Fill ``into`` with the rectangle at ``place``."""

    def close(self) -> None:
        """Close all files."""


class PartsSource(Source):
    """Weights under the names of another format, of which one or several (``parts``) make one of ours.

    ``files``: for weights (``model``) and, if they exist, optimizer tensors (``optimizer.KIND``).
    """

    def __init__(
        self, path: Path, model: ModelConfig, parts: Mapping[str, list[Part]], files: Mapping[str, Tensors]
    ) -> None:
        self.path, self.model = path, model
        self.tensors: dict[str, Info] = {}
        self._places: dict[str, tuple[Tensors, list[Part]]] = {}
        for kind, file in files.items():
            top, _, moment = kind.partition(".")
            for name, some in parts.items():
                full = ".".join(filter(None, (top, name, moment)))
                named = [self._named(part, file) for part in some]
                self._places[full] = file, named
                self.tensors[full] = self._info(name, named, file)

    def _named(self, part: Part, file: Tensors) -> Part:
        """Under its name in the file, which lacks the model's own prefix where its base was saved alone."""
        for name in (part.name, _bare(part.name)):
            if name in file.tensors:
                return Part(name, part.shape, part.transposed)
        near = sorted(name for name in file.tensors if name.startswith(part.name.removesuffix("weight")))[:3]
        hint = f"; it has {', '.join(map(shown, near))}" if near else ""
        raise CheckpointError(f"{self.path} lacks {part.name}{hint}")

    def _info(self, name: str, parts: list[Part], file: Tensors) -> Info:
        for part in parts:
            stored = file.tensors[part.name]
            if stored.shape != part.stored:
                shape = stored.shape
                raise CheckpointError(f"{self.path}: {part.name} has shape {shape}, its config implies {part.stored}")
            refuse_quantized(stored.dtype, f"{self.path}: {part.name}")
        rows = sum(part.shape[0] for part in parts)
        if name in ("embedding.weight", "head.weight"):
            rows = self.model.padded_vocab_size
        return Info(file.tensors[parts[0].name].dtype, (rows, *parts[0].shape[1:]))

    def read(self, name: str, tile: Tile) -> None:
        first, stop = tile.offset[0], tile.offset[0] + tile.shape[0]
        columns = tuple(slice(o, o + n) for o, n in zip(tile.offset[1:], tile.shape[1:], strict=True))
        file, parts = self._places[name]
        start = 0
        for part in parts:
            low, high = max(first, start), min(stop, start + part.shape[0])
            if low < high:
                into, rows = tile.data[low - first : high - first], slice(low - start, high - start)
                place = (*columns, rows) if part.transposed else (rows, *columns)
                file.read(part.name, place, into.t() if part.transposed else into)
            start += part.shape[0]
        if stop > start:
            tile.data[max(0, start - first) :].zero_()  # the padding of the vocabulary

    def close(self) -> None:
        for file, _ in self._places.values():
            file.close()


def _bare(name: str) -> str:
    """The name of a tensor if only the base model was saved."""
    return name.removeprefix("model.").removeprefix("transformer.")


class _Folder:
    """The tensors in all safetensors files of a model folder, in the index or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        listed: Any = {}
        if (path / INDEX).exists():
            listed = read_json(path, INDEX).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise CheckpointError(f"{path / INDEX}: weight_map: expected file names by tensor")
        elif not (path / SINGLE).exists():
            pickled = sorted(p.name for p in path.glob("*.bin"))[:1]
            hint = f"; {pickled[0]} is pickled, which is never opened: save it as safetensors" if pickled else ""
            raise CheckpointError(f"{path}: no {SINGLE} and no {INDEX}{hint}")
        there = {file.name for file in path.glob("*.safetensors") if not file.name.startswith(".")}
        self._files = {name: TensorFile(own_file(path, name)) for name in sorted({*listed.values(), *there})}
        for tensor, name in listed.items():
            if tensor not in self._files[name].tensors:
                raise CheckpointError(f"{path / name} lacks {tensor!a}, which the index says is there")
        self._holders: dict[str, list[str]] = {}  # files by tensor
        for name, file in self._files.items():
            for tensor in file.tensors:
                self._holders.setdefault(tensor, []).append(name)
        self.tensors = {tensor: self._files[names[0]].tensors[tensor] for tensor, names in self._holders.items()}

    def read(self, name: str, place: Sequence[slice], into: Tensor) -> None:
        self._files[self._holders[name][0]].read(name, place, into)

    def whole(self, name: str) -> Tensor:
        """A whole (small) tensor, in float64."""
        tensor = torch.empty(self.tensors[name].shape, dtype=torch.float64)
        self.read(name, [slice(0, size) for size in tensor.shape], tensor)
        return tensor

    def check_copies(self) -> None:
        """Refuse a tensor that several files hold with different values."""
        for tensor, (first, *others) in self._holders.items():
            for other in others:
                if not _equal(self._files[first], tensor, self._files[other], tensor):
                    raise CheckpointError(f"{self.path}: {shown(tensor)} differs between {first} and {other}")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _equal(a: Tensors, a_name: str, b: Tensors, b_name: str, head_dim: int | None = None) -> bool:
    """Whether two tensors hold the same numbers, in any dtype. ``head_dim``: rows that rotate together are neighbours
    in ``a``, and half a head of ``head_dim`` rows apart in ``b``."""
    left, right = a.tensors[a_name], b.tensors[b_name]
    if left.shape != right.shape:
        return False
    dtype = torch.promote_types(left.dtype, right.dtype)
    limit = head_dim * math.prod(left.shape[1:]) * dtype.itemsize if head_dim else _BLOCK_BYTES
    for place in row_blocks(left.shape, dtype.itemsize, limit):
        ours, theirs = (torch.empty([s.stop - s.start for s in place], dtype=dtype) for _ in range(2))
        a.read(a_name, place, ours)
        b.read(b_name, place, theirs)
        if head_dim:
            ours = ours.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        if not torch.equal(ours, theirs):
            return False
    return True


class HuggingFaceSource(PartsSource):
    """The weights of a model folder. ``vocab_multiple``: the vocabulary is padded with zeros to a multiple of it.
    ``strict``: refuse unknown keys in the config.

    Every tensor in the folder is used, or repeats what another tensor or the config says, or is named in a
    CheckpointError. ``compare`` False: another rank checks the repeated tensors.
    """

    def __init__(
        self, folder: Path, vocab_multiple: int | None = None, *, strict: bool = False, compare: bool = True
    ) -> None:
        if (folder / ADAPTER_CONFIG).exists():
            raise CheckpointError(f"{folder}: {ADAPTER_CONFIG} beside {CONFIG}: an adapter needs a folder of its own")
        model, self.notes = read_model(folder, vocab_multiple, strict=strict)
        files = _Folder(folder)
        if model.num_layers > len(files.tensors):
            raise CheckpointError(
                f"{folder}: its config has {model.num_layers} layers, its files hold {len(files.tensors)} tensors"
            )
        super().__init__(folder, model, tensor_parts(model), {"model": files})
        self.precision = "bfloat16" if self.tensors["model.norm.weight"].dtype == torch.bfloat16 else "float32"
        used = {part.name for _, parts in self._places.values() for part in parts}
        bare = sorted(name for name in used - {_HEAD} if _bare(name) == name)
        if bare and len(bare) < len(used - {_HEAD}):
            raise CheckpointError(f"{folder}: {bare[0]} lacks the prefix that other tensors have")
        if compare:
            self._check_rest(files, used)
        self.notes += self._generation_notes()

    def _check_rest(self, files: _Folder, used: set[str]) -> None:
        files.check_copies()
        self.refuse_unused([name for name in files.tensors.keys() - used if not self._is_redundant(files, name)])

    def _is_redundant(self, files: _Folder, name: str) -> bool:
        """Whether a tensor repeats other information. Raises CheckpointError if it contradicts it."""
        if name == _HEAD:  # the model's head is tied
            (embedding,) = self._places["model.embedding.weight"][1]
            if not _equal(files, name, files, embedding.name):
                raise CheckpointError(
                    f"{self.path}: tie_word_embeddings=true, but {name} differs from {embedding.name}: transformers "
                    f"5 uses both, older versions ignored {name}; set tie_word_embeddings in {CONFIG} accordingly"
                )
        elif re.fullmatch(self.model.traits.buffers, name):
            if name.endswith("inv_freq"):
                if not self._means_frequencies(files, name):
                    raise CheckpointError(f"{self.path}: {name} holds other frequencies than {CONFIG} implies")
            elif not self._is_causal_mask(files, name):
                raise CheckpointError(f"{self.path}: {name} is not a causal mask")
        else:
            theirs, paired = from_mistral(name)
            if theirs not in files.tensors:
                return False
            if not _equal(files, name, files, theirs, self.model.head_dim if paired else None):
                raise CheckpointError(f"{self.path}: {name} differs from {theirs}")
        return True

    def _means_frequencies(self, files: _Folder, name: str) -> bool:
        head_dim, stored = self.model.head_dim, files.tensors[name]
        assert head_dim
        if stored.shape != (head_dim // 2,) or not stored.dtype.is_floating_point:
            return False
        value, rounding = files.whole(name), 1e-5 + 2 * torch.finfo(stored.dtype).eps  # float32 powers, rounded
        scalings = (self.model.rope_scaling, None)  # older versions scaled positions, not frequencies
        known = (rope_frequencies(head_dim, self.model.rope_theta, scaling) for scaling in scalings)
        return any(value.allclose(frequencies, rtol=rounding, atol=1e-7) for frequencies in known)

    def _is_causal_mask(self, files: _Folder, name: str) -> bool:
        shape = files.tensors[name].shape
        if math.prod(shape) == 1:  # what was added where nobody may look, or a mask for one token
            return bool(files.whole(name) <= -1e4) or bool(files.whole(name) == 1)
        if len(shape) != 4 or shape[:2] != (1, 1) or shape[2] != shape[3] or shape[2] > self.model.max_seq_len:
            return False
        value = files.whole(name)
        return value.equal(torch.ones_like(value).tril())

    def _generation_notes(self) -> list[str]:
        """Notes on generation settings in the folder that are not read here."""
        if not (self.path / GENERATION).exists():
            return []
        known = {*TOKEN_IDS, "transformers_version", "_from_model_config"}
        asked = {k: v for k, v in read_json(self.path, GENERATION).items() if k not in known and v is not None}
        told = ", ".join(f"{shown(key)}={value!a:.80}" for key, value in asked.items())
        return [f"{GENERATION}: {told}: kept for exports; generate uses its own flags"] if asked else []

    def extras(self) -> dict[str, bytes]:
        found = {n: own_file(self.path, n).read_bytes() for n in TOKENIZER_FILES if (self.path / n).exists()}
        tree = read_json(self.path, CONFIG)
        try:
            found = settled(found, tree, str(self.path))
        except DataError as error:
            raise CheckpointError(str(error)) from None
        ids = {name: tree[name] for name in TOKEN_IDS if tree.get(name) is not None}
        if GENERATION not in found and ids:  # older folders have them in config.json only
            found[GENERATION] = json.dumps(ids, indent=2).encode()
        return found


def _token_ids(extras: Mapping[str, bytes], where: Path) -> dict[str, Any]:
    """The bos, eos and pad tokens, as far as they are known."""
    if GENERATION in extras:
        tree = parse_json(extras[GENERATION], where / GENERATION)
        return tree if isinstance(tree, dict) else {}
    if extras.keys() & {*MAIN}:
        return tokenizer_ids(carried_tokenizer(extras, where))
    return {}


def export(
    source: Source, folder: Path, dtype: torch.dtype | None, shard_bytes: int, block_bytes: int = _BLOCK_BYTES
) -> dict[str, str]:
    """Write a model folder; its files' SHA-256 by name. ``dtype`` None: as stored. Memory: one block.

    ``folder`` appears complete or not at all. Raises CheckpointError for a model that has no Hugging Face equivalent,
    or if ``folder`` exists already.
    """
    parts = tensor_parts(source.model)
    # Hugging Face name: (our name, first row, part).
    placed: dict[str, tuple[str, int, Part]] = {}
    for ours, some in parts.items():
        start = 0
        for part in some:
            placed[part.name] = (f"model.{ours}", start, part)
            start += part.shape[0]
    kinds = {theirs: _kind(source, dtype, *place) for theirs, place in placed.items()}
    stored = str(next(iter(kinds.values())).dtype).removeprefix("torch.")
    small = {name: content for name, content in source.extras().items() if name in TOKENIZER_FILES}
    ids = _token_ids(small, source.path)
    small = named(small, source.model.traits.model_type(source.model))
    small[CONFIG] = json.dumps(config_json(source.model, stored, ids), indent=2).encode()

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
    """One Hugging Face tensor in order, a block of rows at a time."""
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
