"""Megatron-LM's GPT checkpoints: ``torch_dist`` folders, and the older ``mp_rank_XX`` files of each rank. Weights only.

Megatron interleaves queries, keys and values by group; here they lie one below the other.
"""

from __future__ import annotations

import importlib
import io
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.pickles import SafeUnpickler, StoredTensor, load_torch
from megatron_lite.checkpoint.source import Info, Source
from megatron_lite.checkpoint.storage import open_regular
from megatron_lite.config import parse_model
from megatron_lite.distributed.shard import Tile
from megatron_lite.errors import CheckpointError, ConfigError

_LAYER = {  # ours → theirs, the first that is there
    "attention_norm": ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    "attention.qkv": ("self_attention.linear_qkv.",),
    "attention.q_norm": ("self_attention.q_layernorm.",),
    "attention.k_norm": ("self_attention.k_layernorm.",),
    "attention.out": ("self_attention.linear_proj.",),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    "mlp.up": ("mlp.linear_fc1.",),
    "mlp.down": ("mlp.linear_fc2.",),
}
_TOP = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "positions.weight": "embedding.position_embeddings.weight",
    "norm.weight": "decoder.final_layernorm.weight",
    "norm.bias": "decoder.final_layernorm.bias",
    "head.weight": "output_layer.weight",
}
_FIXED: dict[str, tuple[Any, ...]] = {  # what the model knows nothing else than
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "apply_layernorm_1p": (False,),
    "squared_relu": (False,),
    "num_experts": (None,),
    "multi_latent_attention": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "use_rope_scaling": (False,),
    "mtp_num_layers": (None,),
    "window_size": (None,),
}


def model_section(args: Mapping[str, Any], where: Path, vocab_size: int | None) -> dict[str, Any]:
    """Our ``model`` section for Megatron's arguments. Raises CheckpointError naming what cannot be honoured."""
    missing = [n for n in ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size") if n not in args]
    if missing:
        raise CheckpointError(f"{where}: its args lack {', '.join(missing)}")
    refused = [f"{n}={args[n]!r}" for n, values in _FIXED.items() if n in args and args[n] not in values]
    swiglu, rope = bool(args.get("swiglu")), args.get("position_embedding_type") == "rope"
    rms, bias = args.get("normalization", "LayerNorm") == "RMSNorm", bool(args.get("add_bias_linear", True))
    if not swiglu == rope == rms:
        refused.append("a mix of Llama (RMSNorm, swiglu, rope) and GPT-2 (LayerNorm, gelu, learned positions)")
    if not swiglu and not (args.get("openai_gelu") or args.get("bias_gelu_fusion")):
        refused.append("gelu without the tanh approximation (bias_gelu_fusion or openai_gelu)")
    if refused:
        raise CheckpointError(f"{where}: cannot be honoured: {'; '.join(refused)}")
    heads, padded = args["num_attention_heads"], args["padded_vocab_size"]
    return {
        "family": "llama" if swiglu else "gpt2",
        "vocab_size": vocab_size or padded,
        "vocab_multiple": padded,
        "num_layers": args["num_layers"],
        "hidden_size": args["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": (args.get("num_query_groups") or heads) if args.get("group_query_attention") else heads,
        "head_dim": args.get("kv_channels") or args["hidden_size"] // heads,
        "ffn_size": args.get("ffn_hidden_size") or 4 * args["hidden_size"],
        "max_seq_len": args.get("max_position_embeddings") or args.get("seq_length") or 2048,
        "norm_eps": args.get("norm_epsilon", 1e-5),
        "rope_theta": float(args.get("rotary_base", 10000)),
        "bias": bias,
        "qkv_bias": bias or bool(args.get("add_qkv_bias")),
        "qk_norm": bool(args.get("qk_layernorm")),
        "tie_embeddings": not args.get("untie_embeddings_and_output_weights", False),
    }


class MegatronSource(Source):
    """Weights under Megatron's names. Memory: one of them."""

    def __init__(self, path: Path, args: Mapping[str, Any], vocab_size: int | None) -> None:
        self.path = path
        try:
            self.model = parse_model(model_section(args, path, vocab_size), str(path))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        model = self.model
        if vocab_size is not None and vocab_size > model.vocab_multiple:
            raise CheckpointError(f"{path}: vocab_size={vocab_size} is more than its padded {model.vocab_multiple}")
        self.precision = "bfloat16" if args.get("bf16") else "float32"
        ours = {name: theirs for name, theirs in _TOP.items() if self._has(theirs)}
        for i in range(model.num_layers):
            for name, prefixes in _LAYER.items():
                for end in ("weight", "bias"):
                    found = [p for p in prefixes if self._has(f"decoder.layers.{i}.{p}{end}")]
                    if found:
                        ours[f"blocks.{i}.{name}.{end}"] = f"decoder.layers.{i}.{found[0]}{end}"
        if model.tie_embeddings:
            ours.pop("head.weight", None)
        self._names = {f"model.{name}": theirs for name, theirs in ours.items()}
        self.tensors = {name: Info(*self._kind(theirs)) for name, theirs in self._names.items()}
        self._last: tuple[str, Tensor] | None = None

    @abstractmethod
    def _has(self, name: str) -> bool:
        """Whether there is such a tensor of theirs, ``decoder.layers.N.…`` for those of a layer."""

    @abstractmethod
    def _kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and global shape of one of theirs."""

    @abstractmethod
    def _whole(self, name: str) -> Tensor:
        """One of theirs, gate and up halves one below the other."""

    def read(self, name: str, tile: Tile) -> None:
        if self._last is None or self._last[0] != name:
            whole = self._whole(self._names[name])
            self._last = (name, self._ungrouped(whole) if ".attention.qkv." in name else whole)
        tile.data.copy_(self._last[1][tile.place])

    def _ungrouped(self, qkv: Tensor) -> Tensor:
        """[groups, queries of a group + key + value, head_dim, …] → all queries, all keys, all values."""
        model = self.model
        assert model.num_kv_heads and model.head_dim
        queries = model.num_heads // model.num_kv_heads
        grouped = qkv.view(model.num_kv_heads, queries + 2, model.head_dim, *qkv.shape[1:])
        return torch.cat([part.flatten(0, 2) for part in grouped.split((queries, 1, 1), dim=1)])


class TorchDistSource(MegatronSource):
    """A ``torch_dist`` checkpoint (``iter_XXXXXXX`` with ``.metadata``), of whatever layout it was saved from."""

    def __init__(self, path: Path, vocab_size: int | None = None) -> None:
        with open_regular(path / ".metadata") as file:
            metadata = SafeUnpickler(file.read(), _dcp_class, path / ".metadata").read()
        common = load_torch(path / "common.pt")
        self._chunks: dict[str, Any] = metadata.state_dict_metadata
        self._stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        self.step = int(common.get("iteration", 0))
        super().__init__(path, _args(common, path / "common.pt"), vocab_size)

    def _split(self, name: str) -> tuple[str, int | None]:
        """A layer's tensor is its own, or a row of one that stacks those of all layers."""
        stacked = re.sub(r"^decoder\.layers\.(\d+)\.", "decoder.layers.", name)
        if stacked == name or name in self._chunks:
            return name, None
        return stacked, int(name.split(".")[2])

    def _has(self, name: str) -> bool:
        return self._split(name)[0] in self._chunks

    def _kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        name, row = self._split(name)
        entry = self._chunks[name]
        shape = tuple(entry.size)
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
        except Exception as error:  # of many kinds
            raise CheckpointError(f"{self.path / info.relative_path}: {' '.join(str(error).split())[:200]}") from None


_DCP = {  # what the metadata of torch.distributed.checkpoint is made of
    "filesystem": ("_StorageInfo", "_StoragePrefix"),
    "metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
}


def _dcp_class(module: str, name: str) -> Any:
    """One of these classes, a dtype, a size or a layout; None for anything else."""
    package, _, last = module.rpartition(".")
    if package == "torch.distributed.checkpoint" and name in _DCP.get(last, ()):
        return getattr(importlib.import_module(module), name, None)
    if module == "torch":
        kind = getattr(torch, name, None)
        return kind if name == "Size" or isinstance(kind, torch.dtype) else None
    return torch.serialization._get_layout if (module, name) == ("torch.serialization", "_get_layout") else None


class LegacySource(MegatronSource):
    """``mp_rank_TP`` or ``mp_rank_TP_PP`` folders, each with a rank's ``model_optim_rng.pt``, with core's names."""

    def __init__(self, path: Path, vocab_size: int | None = None) -> None:
        trees: dict[tuple[int, int], dict[str, Any]] = {}
        for folder in sorted(path.glob("mp_rank_*")):
            match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", folder.name)
            if match:
                trees[int(match[2] or 0), int(match[1])] = load_torch(folder / "model_optim_rng.pt")
        self._tp, self._pp = (1 + max((key[axis] for key in trees), default=-1) for axis in (1, 0))
        if len(trees) != self._tp * self._pp or not trees:
            raise CheckpointError(f"{path}: {len(trees)} rank folders for tp {self._tp} × pp {self._pp}")
        args = _args(trees[0, 0], path)
        self._parts: dict[str, list[StoredTensor]] = {}
        for pp in range(self._pp):
            first = int(args.get("num_layers", 0)) // self._pp * pp
            for tp in range(self._tp):
                model = trees[pp, tp].get("model")
                if not isinstance(model, dict) or "language_model" in model:
                    raise CheckpointError(f"{path}: without core's names (older than Megatron-LM's use of its core)")
                for name, tensor in model.items():
                    if isinstance(tensor, StoredTensor):
                        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
                        if layer:
                            name = f"decoder.layers.{first + int(layer[1])}.{name[layer.end() :]}"
                        self._parts.setdefault(name, []).append(tensor)
        step = trees[0, 0].get("iteration", 0)
        self.step = step if isinstance(step, int) else 0
        super().__init__(path, args, vocab_size)
        self.tensors = {n: Info(i.dtype, self._global(self._names[n], i.shape)) for n, i in self.tensors.items()}

    def _has(self, name: str) -> bool:
        return name in self._parts

    def _kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self._parts[name][0].dtype, self._parts[name][0].shape

    def _dim(self, name: str) -> int | None:
        """The dim that tensor parallelism splits."""
        if "layer_norm" in name or "layernorm" in name or "position_embeddings" in name:
            return None
        if "linear_proj" in name or "linear_fc2" in name:
            return 1 if name.endswith("weight") else None
        return 0

    def _global(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        dim = self._dim(name)
        return tuple(n * self._tp if d == dim else n for d, n in enumerate(shape))

    def _whole(self, name: str) -> Tensor:
        dim, parts = self._dim(name), self._parts[name]
        if dim is None:
            return parts[0].read()
        if len(parts) < self._tp or any(part.shape != parts[0].shape for part in parts):
            raise CheckpointError(f"{self.path}: {name} is not there in equal parts on every rank")
        read = [part.read() for part in parts[: self._tp]]
        if "linear_fc1" in name and self.model.family == "llama":
            halves = [part.chunk(2) for part in read]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(read, dim)


def _args(tree: Any, where: Path) -> dict[str, Any]:
    args = tree.get("args") if isinstance(tree, dict) else None
    if args is None:
        raise CheckpointError(f"{where}: no args, which say what the model is")
    return args if isinstance(args, dict) else dict(vars(args))


_TRACKER = "latest_checkpointed_iteration.txt"


def is_megatron(path: Path) -> bool:
    """Whether this looks like an iteration's folder, or the one above it."""
    return any((path / name).is_file() for name in (_TRACKER, ".metadata")) or any(path.glob("mp_rank_*/*.pt"))


def open_megatron(path: Path, vocab_size: int | None = None) -> MegatronSource:
    """The checkpoint at ``path``: an iteration's folder, or the one above it, whose latest is meant."""
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
