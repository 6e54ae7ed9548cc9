"""Folders of Hugging Face's peft library, ``adapter_config.json`` beside safetensors: what its methods share.

A field of the config is honoured, known to change nothing, or refused by name; no code from a folder is run. What
differs by method is in ``peft/``.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from megatron_lite.checkpoint.adapters.fingerprint import fingerprint_of
from megatron_lite.checkpoint.formats.hf import own_file, read_json
from megatron_lite.checkpoint.source import Info, Source, refuse_quantized
from megatron_lite.checkpoint.storage import new_folder, write_file
from megatron_lite.checkpoint.tensor_file import TensorFile
from megatron_lite.config import PeftConfig, parse_peft
from megatron_lite.data.tokenizer import GENERATION
from megatron_lite.distributed.shard import Tile
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.families.huggingface import Part, tensor_parts
from megatron_lite.training.faults import Faults

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ANY = (  # without effect once there are weights
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "runtime_config"),
)
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})


class PeftSource(Source):
    """An adapter in a folder of the peft library, for the model of ``base``. A subclass for each method maps tensors.
    Raises CheckpointError, also for what its config asks for and is not supported here."""

    peft: PeftConfig
    peft_type: str  # the library's name of the method
    known: Collection[str]  # keys of the config that the method reads or may ignore

    def __init__(self, folder: Path, base: Source) -> None:
        if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
            raise CheckpointError(f"{folder}/adapter_model.bin is a pickle, which may run code; save it as safetensors")
        self.path, self.base, self.model, self.precision = folder, base, base.model, base.precision
        self.tensors: dict[str, Info] = {}
        self.config = read_json(folder, CONFIG)
        asked = {key: value for key, value in self.config.items() if not key.startswith("unsloth_")}
        odd = [k for k, value in asked.items() if k not in (*_ANY, *self.known) and value not in _NOTHING]
        if odd:
            told = ", ".join(f"{ascii(key)[1:-1]}={self.config[key]!a}"[:200] for key in odd[:3])
            raise CheckpointError(f"{folder / CONFIG}: {told}: not supported")
        self._file = TensorFile(own_file(folder, WEIGHTS))

    @staticmethod
    @abstractmethod
    def write(adapter: Source, base: Source, folder: Path) -> dict[str, Tensor]:
        """Write an adapter as the peft library does, and return its tensors. Raises CheckpointError."""

    def section(self, **keys: Any) -> Any:
        """The ``peft`` section with these keys. Raises CheckpointError."""
        try:
            return parse_peft(keys, str(self.path / CONFIG))
        except ConfigError as error:
            first, *more = str(error).splitlines()
            raise CheckpointError(first + (f" (and {len(more)} more like it)" if more else "")) from None

    def check_stored(self, theirs: str, shape: tuple[int, ...]) -> torch.dtype:
        """The dtype to compute in with the tensor ``theirs``. Raises CheckpointError where it lacks this shape."""
        stored = self._file.tensors.get(theirs)
        if stored is None or stored.shape != shape:
            raise CheckpointError(f"{self.path / WEIGHTS}: {theirs} should be {shape}, is {stored and stored.shape}")
        refuse_quantized(stored.dtype, f"{self.path / WEIGHTS}: {theirs}")
        return torch.promote_types(stored.dtype, torch.float32)

    def check_all_used(self, used: Collection[str]) -> None:
        """Refuse tensors that are neither ``used`` nor copies of the base's."""
        parts = {part.name: (ours, some) for ours, some in tensor_parts(self.model).items() for part in some}
        unused = sorted(name for name in self._file.tensors.keys() - set(used) if not self._is_of_the_base(name, parts))
        if unused:
            told = ", ".join(f"{name!a:.200}" for name in unused[:3])
            raise CheckpointError(f"{self.path / WEIGHTS}: there is no use for {told}")

    def _is_of_the_base(self, name: str, parts: Mapping[str, tuple[str, Sequence[Part]]]) -> bool:
        """Whether a tensor is an exact copy of a weight of the base: embeddings are often saved along."""
        ours, some = parts.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."), ("", ()))
        if len(some) != 1 or self._file.tensors[name].shape != some[0].stored:
            return False
        theirs, own = torch.empty(some[0].stored), torch.empty(some[0].shape)
        self.fill(name, [slice(0, size) for size in theirs.shape], theirs)
        self.base.read(f"model.{ours}", Tile(own, (0,) * own.dim()))
        dtype = self._file.tensors[name].dtype
        return torch.equal((theirs.t() if some[0].transposed else theirs).to(dtype), own.to(dtype))

    def fill(self, theirs: str, place: Sequence[slice], into: Tensor) -> None:
        """Read a rectangle of the tensor ``theirs``. Raises CheckpointError for numbers that are not finite."""
        self._file.read(theirs, place, into)
        if not into.isfinite().all():
            raise CheckpointError(f"{self.path / WEIGHTS}: {theirs} holds numbers that are not finite")

    def compare(self, written: Mapping[str, Tensor]) -> None:
        """Refuse a folder whose tensors are not those that were written."""
        for name, tensor in written.items():
            stored = torch.empty_like(tensor)
            self.fill(name, [slice(0, size) for size in tensor.shape], stored)
            if not torch.equal(stored, tensor):
                raise CheckpointError(f"{self.path} reads back other than written (faulty disk?)")

    def extras(self) -> dict[str, bytes]:
        there = (self.path / GENERATION).exists()
        return {GENERATION: own_file(self.path, GENERATION).read_bytes()} if there else {}

    def close(self) -> None:
        self._file.close()


def adapter_state(source: PeftSource, base: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """State and small files of a checkpoint of ours with this adapter, which belongs to the base at ``base``."""
    model, peft = source.model.model_dump(mode="json"), source.peft.model_dump(mode="json")
    tree = {"model": model, "train": {"precision": source.precision}, "peft": peft, "init": {"from": str(base)}}
    state = {"from": str(source.path), "base": fingerprint_of(source.base), "vocab_size": source.model.vocab_size}
    return state, {**source.extras(), "config.yaml": json.dumps(tree, indent=1).encode()}


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Source, adapter: Source
) -> None:
    """Write an adapter as the peft library does, with the generation config that tells which tokens end its texts.
    ``folder`` appears whole or not at all."""
    tree = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.path), "inference_mode": True, **config}
    generation = adapter.extras().get(GENERATION)
    with new_folder(folder) as temporary:
        write_file(temporary / WEIGHTS, [save(dict(tensors), {"format": "pt"})], Faults.none())
        write_file(temporary / CONFIG, [json.dumps(tree, indent=2).encode()], Faults.none())
        if generation is not None:
            write_file(temporary / GENERATION, [generation], Faults.none())
