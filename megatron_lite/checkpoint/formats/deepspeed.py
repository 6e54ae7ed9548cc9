"""ZeRO checkpoints written by DeepSpeed: float32 masters and Adam's moments, assembled from all ranks' flat parts while
reading. Stages 1 to 3, data parallelism only, under Hugging Face's names or ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.formats.hf import PartsSource
from megatron_lite.checkpoint.formats.pickles import StoredTensor, load_torch
from megatron_lite.config import ModelConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.families.huggingface import Part, tensor_parts

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Flat:
    """A tensor in pieces: (flat tensor, first element there, elements), in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    segments: Sequence[tuple[StoredTensor, int, int]]

    def fill(self, into: Tensor, first: int) -> None:
        """Fill a flat tensor with the elements beginning at ``first``, from all the places that hold them."""
        start, stop = 0, first + into.numel()
        for flat, offset, length in self.segments:
            low, high = max(first, start), min(stop, start + length)
            if low < high:
                flat.fill(into[low - first : high - first], offset + low - start)
            start += length

    def read(self) -> Tensor:
        """The whole tensor."""
        whole = torch.empty(math.prod(self.shape), dtype=self.dtype)
        self.fill(whole, 0)
        return whole.view(self.shape)


class FlatFile:
    """Flat tensors behind the interface of a tensor file."""

    def __init__(self, tensors: dict[str, Flat]) -> None:
        self.tensors = tensors

    def read(self, name: str, place: Sequence[slice], into: Tensor) -> None:
        """Fill ``into`` with the rectangle ``place``: whole rows are read and then cut."""
        flat = self.tensors[name]
        whole = into.shape[1:] == flat.shape[1:] and into.is_contiguous()
        rows = into if whole else torch.empty((into.shape[0], *flat.shape[1:]), dtype=flat.dtype)
        flat.fill(rows.view(-1), place[0].start * math.prod(flat.shape[1:]))
        if not whole:
            into.copy_(rows[(slice(None), *place[1:])])

    def close(self) -> None:
        """Nothing to close."""


def is_deepspeed(path: Path) -> bool:
    """Whether this looks like a ZeRO checkpoint, or the parent folder of one."""
    return any(any(path.glob(f"{above}*_optim_states.pt")) for above in ("", "*/"))


class DeepSpeedSource(PartsSource):
    """A ``global_stepN`` folder (or its parent, with a ``latest`` file) of a model with this config."""

    def __init__(self, path: Path, model: ModelConfig) -> None:
        pointer = path / "latest"
        if pointer.is_file():
            tag = pointer.read_text(errors="replace").strip()
            if Path(tag).name != tag or not tag:
                raise CheckpointError(f"{pointer}: {tag[:40]!a} is not the name of a folder in it")
            path = path / tag
        shards = sorted(path.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
        states = sorted(path.glob("*model_states.pt"), key=_rank)
        if not shards or not states:
            raise CheckpointError(f"{path}: no ZeRO checkpoint: no *_optim_states.pt and *_model_states.pt")
        if any("mp_rank_00" not in shard.name for shard in shards):
            raise CheckpointError(f"{path}: the model was split over ranks, and nothing here describes how")
        optimizers = [self._tree(shard, "optimizer_state_dict") for shard in shards]
        models = [load_torch(state) for state in states]
        shapes = self._of(models[0], states[0], "param_shapes")
        if models[0].get("mp_world_size", 1) not in (None, 1):
            raise CheckpointError(f"{path}: the model was split over {models[0]['mp_world_size']} ranks: not supported")
        by_parameter = "fp32_flat_groups" in optimizers[0]  # stage 3
        key = "fp32_flat_groups" if by_parameter else "single_partition_of_fp32_groups"
        masters = [tree.get(key) for tree in optimizers]
        if not all(isinstance(groups, (list, tuple)) for groups in masters):
            raise CheckpointError(f"{path}: no {key}: no ZeRO checkpoint with float32 masters")
        count = optimizers[0].get("partition_count", len(shards))
        if len(shards) != (max(count) if isinstance(count, (list, tuple)) else count):
            raise CheckpointError(f"{path}: {len(shards)} *_optim_states.pt for {count} ranks")
        places = None if by_parameter else [tree.get("param_slice_mappings") for tree in optimizers]
        trained, frozen = self._file(path, shapes, masters, places), _frozen(path, models, shapes, len(shards))
        if any(name.startswith("base_model.model.") for name in trained.tensors):
            raise CheckpointError(
                f"{path}: the model is wrapped by the peft library; ckpt import_peft reads its adapters"
            )
        weights = FlatFile({**trained.tensors, **frozen})
        files = {"model": weights}
        for moment in MOMENTS:
            held = [_moments(tree, moment) for tree in optimizers]
            if all(held) and not frozen:
                files[f"optimizer.{moment}"] = self._file(path, shapes, held, places)
        if any(name.startswith("blocks.") for name in weights.tensors):
            parts = {name: [Part(name, flat.shape)] for name, flat in weights.tensors.items()}
        else:
            parts = tensor_parts(model)
        for alias, name in (models[0].get("shared_params") or {}).items():
            if _bare(name) in weights.tensors:
                weights.tensors.setdefault(_bare(alias), weights.tensors[_bare(name)])
        self.step = _step(optimizers[0])
        super().__init__(path, model, parts, files)
        if frozen:
            self.notes = [f"without the optimizer: {len(frozen)} of its parameters were frozen"]
        self._check_all_used(weights)

    def _check_all_used(self, weights: FlatFile) -> None:
        """Refuse a parameter that the model does not use, except a tied head that equals the embedding."""
        used = {part.name for _, parts in self._places.values() for part in parts}
        unused = weights.tensors.keys() - used
        for head in [name for name in unused if name.endswith("lm_head.weight") and self.model.tie_embeddings]:
            embedding = self._places["model.embedding.weight"][1][0].name
            if not torch.equal(weights.tensors[head].read(), weights.tensors[embedding].read()):
                raise CheckpointError(f"{self.path}: {head} differs from the embedding, but the config ties them")
            unused.remove(head)
        self.refuse_unused(unused)

    @staticmethod
    def _tree(path: Path, key: str) -> Any:
        return DeepSpeedSource._of(load_torch(path), path, key)

    @staticmethod
    def _of(tree: Any, path: Path, key: str) -> Any:
        found = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(found, (dict, list)):
            raise CheckpointError(f"{path}: no {key}")
        return found

    @staticmethod
    def _file(path: Path, shapes: Any, ranks: Sequence[Sequence[StoredTensor]], places: Any) -> FlatFile:
        """The place of each parameter in the flat groups of every rank. ``places``: each rank's record of them for
        every group, at stages 1 and 2. Stage 3 has none: every parameter is divided separately."""
        found: dict[str, Flat] = {}
        stretches = [_Stretch(groups) for groups in ranks]
        start = 0
        for index, group in enumerate(shapes):
            for name, shape in group.items():
                part = -(-math.prod(shape) // len(ranks))
                segments: list[tuple[StoredTensor, int, int]] = []
                for rank, stretch in enumerate(stretches):
                    if places is None:
                        segments += stretch.cut(path, start, part)
                    elif place := (places[rank] or {index: {}})[index].get(name):
                        segments += _Stretch([ranks[rank][index]]).cut(path, place.start, place.numel)
                if sum(length for _, _, length in segments) < math.prod(shape):
                    raise CheckpointError(f"{path}: {name} is incomplete")
                found[_bare(name)] = Flat(torch.float32, tuple(shape), segments)
                start += part
        return FlatFile(found)


class _Stretch:
    """Flat tensors, concatenated."""

    def __init__(self, flats: Sequence[StoredTensor]) -> None:
        self.flats = flats
        self.starts = list(accumulate((flat.shape[0] for flat in flats), initial=0))

    def cut(self, path: Path, start: int, length: int) -> list[tuple[StoredTensor, int, int]]:
        """The places of ``length`` elements beginning at ``start``."""
        if start + length > self.starts[-1]:
            raise CheckpointError(f"{path}: its parts hold {self.starts[-1]} elements, expected {start + length}")
        found = []
        for flat, first in zip(self.flats, self.starts, strict=False):
            low, high = max(start, first), min(start + length, first + flat.shape[0])
            if low < high:
                found.append((flat, low - first, high - low))
        return found


def _rank(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)", path.name)
    return int(match[1]) if match else 0


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _frozen(path: Path, models: Sequence[Any], shapes: Any, ranks: int) -> dict[str, Flat]:
    """The frozen parameters: divided over the ranks at stage 3, complete and stored separately at stage 2, among the
    module's tensors at stage 1."""
    wanted = models[0].get("frozen_param_shapes") or {}
    found: dict[str, Flat] = {}
    for name, shape in wanted.items():
        parts = [(model.get("frozen_param_fragments") or {}).get(name) for model in models]
        held = [part for part in parts if isinstance(part, StoredTensor)]
        if len(held) not in (1, ranks) or len(held) < len(parts):
            raise CheckpointError(f"{path}: {name}, which is frozen, is not whole")
        found[_bare(name)] = _joined(path, name, tuple(shape), held)
    trained = {name for group in shapes for name in group}
    beside = {*wanted, *trained, *(models[0].get("buffer_names") or ()), *(models[0].get("shared_params") or ())}
    module = models[0].get("module")
    for name, tensor in (module if isinstance(module, dict) else {}).items():
        if isinstance(tensor, StoredTensor) and name not in beside and 0 not in tensor.shape:
            found[_bare(name)] = _joined(path, name, tensor.shape, [tensor])
    return found


def _joined(path: Path, name: str, shape: tuple[int, ...], parts: Sequence[StoredTensor]) -> Flat:
    """A tensor from equal flat parts; the last one may be padded."""
    segments: list[tuple[StoredTensor, int, int]] = []
    rest = math.prod(shape)
    for part in parts:
        length = min(rest, math.prod(part.shape))
        segments.append((part, 0, length))
        rest -= length
    if rest:
        raise CheckpointError(f"{path}: {name}, which is frozen, is not whole")
    return Flat(parts[0].dtype, shape, segments)


def _base_state(tree: Mapping[str, Any]) -> Any:
    base = tree.get("base_optimizer_state") or tree.get("optimizer_state_dict")
    if isinstance(base, dict):
        base = base.get("state", base)
    return list(base.values()) if isinstance(base, dict) else base


def _moments(tree: Mapping[str, Any], moment: str) -> list[StoredTensor]:
    """One of Adam's moments for every group, if all of them exist."""
    state = _base_state(tree) or []
    found = [one.get(moment) for one in state if isinstance(one, dict)]
    return [tensor for tensor in found if isinstance(tensor, StoredTensor)] if found else []


def _step(tree: Mapping[str, Any]) -> int:
    for one in _base_state(tree) or []:
        step = one.get("step") if isinstance(one, dict) else None
        if isinstance(step, StoredTensor):
            return int(step.read().item())
        if isinstance(step, (int, float)):
            return int(step)
    return 0
