"""Megatron-LM's GPT checkpoints: ``torch_dist`` folders, and the older ``mp_rank_XX`` files of each rank. Weights only.

Megatron interleaves the rows of queries, keys and values by group; here all queries come first, then keys, then values.
"""

from __future__ import annotations

import importlib
import io
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.formats.megatron_args import from_args, of_the_model
from megatron_lite.checkpoint.formats.pickles import SafeUnpickler, StoredTensor, load_torch
from megatron_lite.checkpoint.source import Info, Source, refuse_quantized
from megatron_lite.checkpoint.storage import open_regular
from megatron_lite.config import parse_model
from megatron_lite.distributed.shard import Tile
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.families.huggingface import tensor_parts

_LAYER = {  # our name: Megatron's names, of which the first that exists is used
    "attention_norm": ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    "attention.qkv": ("self_attention.linear_qkv.",),
    "attention.q_norm": ("self_attention.q_layernorm.",),
    "attention.k_norm": ("self_attention.k_layernorm.",),
    "attention.out": ("self_attention.linear_proj.",),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    "mlp.up": ("mlp.linear_fc1.",),
    "mlp.down": ("mlp.linear_fc2.",),
}
_VOCABULARY = ("embedding.weight", "head.weight")
_TOP = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "positions.weight": "embedding.position_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "norm.bias": "decoder.final_layernorm.bias",
    "head.weight": "output_layer.weight",
}
# Entries beside the weights that are not weights.
_NO_WEIGHT = re.compile(
    r"(.*\.)?_extra_state(/.*)?|(optimizer|chained_\d+|rng_state|rerun_state_machine_state|args)\b.*"
)


def _their_names(name: str) -> list[str]:
    """Megatron's possible names for one of our tensors."""
    if name in _TOP:
        return [_TOP[name]]
    _, layer, rest = name.split(".", 2)
    part, _, end = rest.rpartition(".")
    return [f"decoder.layers.{layer}.{prefix}{end}" for prefix in _LAYER[part]]


class MegatronSource(Source):
    """Weights under Megatron's names. Memory: one tensor."""

    def __init__(self, path: Path, args: Mapping[str, Any], vocab_size: int | None) -> None:
        self.path = path
        section, self.notes = from_args(args, path, vocab_size)
        try:
            self.model = parse_model(section, str(path))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        model = self.model
        if vocab_size is not None and vocab_size > model.vocab_multiple:
            raise CheckpointError(f"{path}: vocab_size={vocab_size} exceeds the padded size {model.vocab_multiple}")
        self.precision = "bfloat16" if args.get("bf16") else "float32"
        self._names: dict[str, str] = {}
        self.tensors: dict[str, Info] = {}
        self._last: tuple[str, Tensor] | None = None
        unread = {name for name in self._all() if not _NO_WEIGHT.fullmatch(name)}
        for name, parts in tensor_parts(model).items():
            theirs = next((n for n in _their_names(name) if self._has(n)), None)
            if theirs is None:
                raise CheckpointError(f"{path} lacks {_their_names(name)[0]}")
            unread.discard(self._split(theirs)[0])
            dtype, shape = self._kind(theirs)
            rows = model.padded_vocab_size if name in _VOCABULARY else sum(part.shape[0] for part in parts)
            meant = (rows, *parts[0].shape[1:])
            if shape != meant:
                raise CheckpointError(f"{path}: {theirs} has shape {shape}, its args imply {meant}")
            refuse_quantized(dtype, f"{path}: {theirs}")
            self._names[f"model.{name}"], self.tensors[f"model.{name}"] = theirs, Info(dtype, shape)
        if model.tie_embeddings and _TOP["head.weight"] in unread:  # the copy of the last pipeline stage
            unread.remove(_TOP["head.weight"])
            if not torch.equal(self._whole(_TOP["head.weight"]), self._whole(_TOP["embedding.weight"])):
                raise CheckpointError(
                    f"{path}: {_TOP['head.weight']} differs from the embedding, though tied by its args"
                )
        self.refuse_unused(unread)

    @abstractmethod
    def _all(self) -> Collection[str]:
        """The stored names of all tensors."""

    def _split(self, name: str) -> tuple[str, int | None]:
        """Where one of Megatron's tensors is stored: under its own name, or as a row of a stacked tensor."""
        return name, None

    def _has(self, name: str) -> bool:
        """Whether Megatron's tensor ``name`` exists (``decoder.layers.N.…`` for those of a layer)."""
        return self._split(name)[0] in self._all()

    @abstractmethod
    def _kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and global shape of one of Megatron's tensors."""

    @abstractmethod
    def _whole(self, name: str) -> Tensor:
        """One of Megatron's tensors, with gate and up concatenated by rows."""

    def read(self, name: str, tile: Tile) -> None:
        if self._last is None or self._last[0] != name:
            whole = self._whole(self._names[name])
            self._last = (name, self._ungrouped(whole) if ".attention.qkv." in name else whole)
        tile.data.copy_(self._last[1][tile.place])

    def _ungrouped(self, qkv: Tensor) -> Tensor:
        """[groups, queries of a group + key + value, head_dim, …] → all queries, all keys, all values."""
        model = self.model
        queries = model.num_heads // model.num_kv_heads
        grouped = qkv.view(model.num_kv_heads, queries + 2, model.head_dim, *qkv.shape[1:])
        return torch.cat([part.flatten(0, 2) for part in grouped.split((queries, 1, 1), dim=1)])


class TorchDistSource(MegatronSource):
    """A ``torch_dist`` checkpoint (``iter_XXXXXXX`` with ``.metadata``), saved from any layout."""

    def __init__(self, path: Path, vocab_size: int | None = None) -> None:
        with open_regular(path / ".metadata") as file:
            metadata = SafeUnpickler(file.read(), _dcp_class, path / ".metadata").read()
        common = load_torch(path / "common.pt")
        self._chunks: dict[str, Any] = metadata.state_dict_metadata
        self._stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        self.step = int(common.get("iteration", 0))
        super().__init__(path, _args(common, path / "common.pt"), vocab_size)

    def _all(self) -> Collection[str]:
        return self._chunks

    def _split(self, name: str) -> tuple[str, int | None]:
        stacked = re.sub(r"^decoder\.layers\.(\d+)\.", "decoder.layers.", name)
        if stacked == name or name in self._chunks:
            return name, None
        return stacked, int(name.split(".")[2])

    def _kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        name, row = self._split(name)
        entry = self._chunks[name]
        if not hasattr(entry, "size"):
            raise CheckpointError(f"{self.path}: {name} is not a tensor")
        shape = tuple(entry.size)
        if row is not None and shape[0] != self.model.num_layers:
            layers = self.model.num_layers
            raise CheckpointError(f"{self.path}: {name} stacks {shape[0]} layers, its args say {layers}")
        return entry.properties.dtype, shape if row is None else shape[1:]

    def _whole(self, name: str) -> Tensor:
        dtype, shape = self._kind(name)
        key, row = self._split(name)
        whole, filled = torch.empty(shape, dtype=dtype), 0
        for chunk in self._chunks[key].chunks:
            offset, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if row is not None and not offset[0] <= row < offset[0] + sizes[0]:
                continue
            part = self._part(key, offset)
            if tuple(part.shape) != sizes:
                raise CheckpointError(f"{self.path}: {key} has a part of shape {tuple(part.shape)}, not {sizes}")
            if row is not None:
                part, offset = part[row - offset[0]], offset[1:]
            whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
            filled += part.numel()
        if filled != whole.numel():
            raise CheckpointError(f"{self.path}: the parts of {key} hold {filled} elements, not {whole.numel()}")
        return whole

    def _part(self, key: str, offset: tuple[int, ...]) -> Tensor:
        info = self._stored.get((key, offset))
        if info is None or Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{self.path}: no file for the part of {key} at {offset}")
        with open_regular(self.path / info.relative_path) as file:
            file.seek(info.offset)
            raw = file.read(info.length)
        try:
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except Exception as error:  # of many types
            raise CheckpointError(f"{self.path / info.relative_path}: {' '.join(str(error).split())[:200]}") from None


_DCP = {  # the classes in the metadata of torch.distributed.checkpoint
    "filesystem": ("_StorageInfo", "_StoragePrefix"),
    "metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
}


def _dcp_class(module: str, name: str) -> Any:
    """One of ``_DCP``'s classes, a dtype, a size or a layout; None for anything else."""
    package, _, last = module.rpartition(".")
    if package == "torch.distributed.checkpoint" and name in _DCP.get(last, ()):
        return getattr(importlib.import_module(module), name, None)
    if module == "torch":
        kind = getattr(torch, name, None)
        return kind if name == "Size" or isinstance(kind, torch.dtype) else None
    return torch.serialization._get_layout if (module, name) == ("torch.serialization", "_get_layout") else None


class LegacySource(MegatronSource):
    """``mp_rank_TP`` or ``mp_rank_TP_PP`` folders, each with a rank's ``model_optim_rng.pt``, with Megatron Core's
    names.

    Each pipeline stage numbers its own layers from 0, and stages may have different numbers of layers. With virtual
    stages (``model0``, ``model1``, …), the layers go around all stages once for each virtual stage.
    """

    def __init__(self, path: Path, vocab_size: int | None = None) -> None:
        trees: dict[tuple[int, int], dict[str, Any]] = {}
        for folder in sorted(path.glob("mp_rank_*")):
            match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", folder.name)
            if match is None:
                raise CheckpointError(f"{folder}: expert parallelism or another unsupported layout")
            trees[int(match[2] or 0), int(match[1])] = load_torch(folder / "model_optim_rng.pt")
        self._tp, self._pp = (1 + max((key[axis] for key in trees), default=-1) for axis in (1, 0))
        if len(trees) != self._tp * self._pp or not trees:
            raise CheckpointError(f"{path}: {len(trees)} rank folders for tp {self._tp} × pp {self._pp}")
        args = _args(trees[0, 0], path)
        iteration, common = trees[0, 0].get("iteration"), of_the_model(args)
        for (pp, tp), tree in trees.items():
            if of_the_model(_args(tree, path)) != common or tree.get("iteration") != iteration:
                where = f"{path}: rank {tp} of stage {pp}"
                raise CheckpointError(f"{where} has other args or another iteration than rank 0")
        version = trees[0, 0].get("checkpoint_version", 3.0)
        if not isinstance(version, (int, float)) or version < 2:
            raise CheckpointError(f"{path}: checkpoint_version {version!a} orders queries and keys differently")
        self._parts: dict[str, list[StoredTensor]] = {}
        first = 0
        for chunk in self._virtual_stages(trees[0, 0], path):
            for pp in range(self._pp):
                first += self._add_stage([trees[pp, tp].get(chunk) for tp in range(self._tp)], first, path)
        if first != args.get("num_layers"):
            raise CheckpointError(f"{path}: its stages hold {first} layers, its args say {args.get('num_layers')}")
        self.step = iteration if isinstance(iteration, int) else 0
        super().__init__(path, args, vocab_size)

    @staticmethod
    def _virtual_stages(tree: Mapping[str, Any], path: Path) -> list[str]:
        """The keys of a rank's model parts: one, or one for each virtual stage."""
        virtual = sorted((key for key in tree if re.fullmatch(r"model\d+", key)), key=lambda key: int(key[5:]))
        if ("model" in tree) == bool(virtual) or virtual != [f"model{i}" for i in range(len(virtual))]:
            raise CheckpointError(f"{path}: expected the key model, or model0, model1, …, found {sorted(tree)}")
        return virtual or ["model"]

    def _add_stage(self, ranks: Sequence[Any], first: int, path: Path) -> int:
        """Register the tensors of a stage whose first layer is ``first``; returns its number of layers."""
        if not all(isinstance(model, dict) and "language_model" not in model for model in ranks):
            raise CheckpointError(f"{path}: its tensors lack Megatron Core's names (written by an older Megatron-LM)")
        layers: set[int] = set()
        names = [name for name, value in ranks[0].items() if isinstance(value, StoredTensor)]
        if any(sorted(names) != sorted(n for n, v in model.items() if isinstance(v, StoredTensor)) for model in ranks):
            raise CheckpointError(f"{path}: the tensor-parallel ranks of a pipeline stage hold different tensors")
        for name in names:
            if name.startswith("module."):
                raise CheckpointError(f"{path}: {name}: a wrapped model; only plain Megatron Core models are supported")
            parts, layer = [model[name] for model in ranks], re.match(r"decoder\.layers\.(\d+)\.", name)
            if layer:
                layers.add(int(layer[1]))
                name = f"decoder.layers.{first + int(layer[1])}.{name[layer.end() :]}"
            if name not in self._parts:
                self._parts[name] = parts
            elif not _NO_WEIGHT.fullmatch(name) and not all(map(_equal, self._parts[name], parts)):
                raise CheckpointError(f"{path}: {name} is there twice, with different values")
        if layers != set(range(len(layers))):
            raise CheckpointError(f"{path}: a pipeline stage holds the layers {sorted(layers)}, not all from 0 on")
        return len(layers)

    def _all(self) -> Collection[str]:
        return self._parts

    def _kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        part, dim = self._parts[name][0], self._dim(name)
        return part.dtype, tuple(n * self._tp if d == dim else n for d, n in enumerate(part.shape))

    def _dim(self, name: str) -> int | None:
        """The dim that tensor parallelism splits."""
        if "layer_norm" in name or "layernorm" in name or "position_embeddings" in name:
            return None
        if "linear_proj" in name or "linear_fc2" in name:
            return 1 if name.endswith("weight") else None
        return 0

    def _whole(self, name: str) -> Tensor:
        dim, parts = self._dim(name), self._parts[name]
        if any(part.shape != parts[0].shape for part in parts):
            raise CheckpointError(f"{self.path}: {name} has parts of different shapes on the tensor-parallel ranks")
        if dim is None:
            if not all(_equal(parts[0], part) for part in parts[1:]):
                raise CheckpointError(f"{self.path}: {name} differs between the tensor-parallel ranks")
            return parts[0].read()
        read = [part.read() for part in parts]
        if "linear_fc1" in name and self.model.traits.gated:
            halves = [part.chunk(2) for part in read]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(read, dim)


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    return a.shape == b.shape and torch.equal(a.read(), b.read())


def _args(tree: Any, where: Path) -> dict[str, Any]:
    args = tree.get("args") if isinstance(tree, dict) else None
    if args is None:
        raise CheckpointError(f"{where}: no args, which describe the model")
    return args if isinstance(args, dict) else dict(vars(args))


_TRACKER = "latest_checkpointed_iteration.txt"


def is_megatron(path: Path) -> bool:
    """Whether this looks like an iteration's folder, or the parent of one."""
    return any((path / name).is_file() for name in (_TRACKER, ".metadata")) or any(path.glob("mp_rank_*/*.pt"))


def open_megatron(path: Path, vocab_size: int | None = None) -> MegatronSource:
    """Open the checkpoint at ``path``: an iteration's folder, or its parent, for the latest iteration."""
    tracker = path / _TRACKER
    if tracker.is_file():
        text = tracker.read_text(errors="replace").strip()
        if not text.isdecimal() and text != "release":
            raise CheckpointError(f"{tracker}: {text[:20]!a} is not an iteration")
        path = path / (f"iter_{int(text):07d}" if text.isdecimal() else "release")
    if (path / ".metadata").is_file():
        return TorchDistSource(path, vocab_size)
    if any(path.glob("mp_rank_*")):
        return LegacySource(path, vocab_size)
    raise CheckpointError(f"{path}: neither a torch_dist checkpoint (.metadata) nor mp_rank_XX folders")
