"""LoRA and DoRA adapters in the format of Hugging Face's peft library: ``adapter_config.json`` and safetensors.

Their factors are ours, under their modules' names; only an embedding's A lies on its side there, and DoRA's magnitudes
are lengths of rows, where ours are relative to those of the base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from megatron_lite.checkpoint.fingerprint import fingerprint_of
from megatron_lite.checkpoint.hf import own_file, read_json
from megatron_lite.checkpoint.merge import updates
from megatron_lite.checkpoint.source import CheckpointSource, Info, Source
from megatron_lite.checkpoint.storage import new_folder, write_file
from megatron_lite.checkpoint.tensor_file import TensorFile
from megatron_lite.config import LoRAConfig, ModelConfig, parse_peft
from megatron_lite.dist.shard import Tile
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.faults import Faults
from megatron_lite.models.huggingface import tensor_parts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TOP = "base_model.model."
_READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout")
_ANY = (  # what the tensors tell, or what decides nothing once there are weights
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "task_type"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "megatron_core"),
    *("qalora_group_size", "runtime_config", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
)
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})


def is_peft(path: Path) -> bool:
    """Whether this looks like a folder of the peft library's."""
    return (path / CONFIG).is_file()


def modules(model: ModelConfig) -> dict[str, str]:
    """The peft library's name of every linear of ours that it can adapt, by the name that users give it here."""
    if model.family == "gpt2":
        raise CheckpointError("Hugging Face's GPT-2 has one A for queries, keys and values; here each has its own")
    short = {"attention.qkv": ("q", "k", "v"), "attention.out": ("o",), "mlp.up": ("gate", "up"), "mlp.down": ("down",)}
    found: dict[str, str] = {}
    for ours, parts in tensor_parts(model).items():
        owner, _, kind = ours.rpartition(".")
        block, _, linear = owner.partition(".")[2].partition(".")
        if kind != "weight" or (linear not in short and owner not in ("embedding", "head")):
            continue
        half = linear.partition(".")[0]
        names = [f"blocks.{block}.{half}.{x}" for x in short[linear]] if linear in short else [owner]
        found |= {name: part.name.removesuffix(".weight") for name, part in zip(names, parts, strict=True)}
    return found


class PeftSource(Source):
    """An adapter in a folder of the peft library's, for the model of ``base``. Raises CheckpointError, also for what
    its config asks for and this project does not do."""

    def __init__(self, folder: Path, base: Source) -> None:
        self.path, self.base, self.model, self.precision = folder, base, base.model, base.precision
        if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
            raise CheckpointError(f"{folder}/adapter_model.bin is a pickle, which may run code; save it as safetensors")
        tree = read_json(folder, CONFIG)
        self._file = TensorFile(own_file(folder, WEIGHTS))
        self.peft = self.lora = self._read_config(tree)
        self.tensors, self._theirs = {}, {}
        for ours, theirs, shape in tensors(self.lora, self.model):
            stored = self._file.tensors.get(theirs)
            wanted = shape[::-1] if theirs.endswith("lora_embedding_A") else shape
            if stored is None or stored.shape != wanted:
                raise CheckpointError(f"{folder}/{WEIGHTS}: {theirs} should be {wanted}, is {stored and stored.shape}")
            self.tensors[ours] = Info(
                torch.promote_types(stored.dtype, torch.float32), _padded(ours, shape, self.model)
            )
            self._theirs[ours] = theirs
        unused = sorted(n for n in self._file.tensors.keys() - set(self._theirs.values()) if ".base_layer." not in n)
        if unused:
            raise CheckpointError(f"{folder}/{WEIGHTS}: there is no use for {', '.join(unused[:3])}")

    def _read_config(self, tree: Mapping[str, Any]) -> LoRAConfig:
        where = self.path / CONFIG
        if tree.get("peft_type") != "LORA":
            raise CheckpointError(f"{where}: peft_type={tree.get('peft_type')!a}: only LORA is read")
        odd = [key for key, value in tree.items() if key not in (*_READ, *_ANY) and value not in _NOTHING]
        if odd:
            raise CheckpointError(f"{where}: {', '.join(f'{key}={tree[key]!a}' for key in odd)}: not done here")
        ranks, alphas, targets = {}, {}, []
        alpha, r = tree.get("lora_alpha", 8), tree.get("r", 8)
        for ours, theirs in modules(self.model).items():
            kind = "lora_embedding_A" if ours == "embedding" else "lora_A.weight"
            if (stored := self._file.tensors.get(f"{_TOP}{theirs}.{kind}")) is not None and len(stored.shape) == 2:
                targets.append(ours)
                ranks[ours] = stored.shape[0]
                alphas[ours] = _alpha(tree.get("alpha_pattern") or {}, theirs, alpha, where)
        section = {
            "method": "lora",
            "targets": targets,
            "r": r,
            "alpha": alpha,
            "ranks": {name: rank for name, rank in ranks.items() if rank != r},
            "alphas": {name: value for name, value in alphas.items() if value != alpha},
            "dropout": tree.get("lora_dropout") or 0.0,
            "rslora": bool(tree.get("use_rslora")),
            "dora": bool(tree.get("use_dora")),
        }
        try:
            found = parse_peft(section, str(where))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        assert isinstance(found, LoRAConfig)
        return found

    def read(self, name: str, tile: Tile) -> None:
        theirs, (rows, *columns) = self._theirs[name], tile.place
        stored = self._file.tensors[theirs].shape
        known = stored[1] if theirs.endswith("lora_embedding_A") else stored[0]  # without the padding of the vocabulary
        held = max(0, min(rows.stop, known) - rows.start)
        tile.data[held:].zero_()
        into = tile.data[:held]
        place = [slice(rows.start, rows.start + held), *columns]
        if theirs.endswith("lora_embedding_A"):
            side = torch.empty((into.shape[1], held))
            self._file.read(theirs, place[::-1], side)
            into.copy_(side.t())
        elif theirs.endswith("magnitude_vector"):
            length = torch.empty(held)
            self._file.read(theirs, place, length)
            into.copy_(length / _lengths(self.base, self.lora, name, place[0]))
        else:
            self._file.read(theirs, place, into)

    def close(self) -> None:
        self._file.close()


def adapter_state(source: PeftSource, base: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """State and small files of a checkpoint of ours with this adapter, which belongs to the base at ``base``."""
    model = source.model.model_dump(mode="json")
    peft = source.lora.model_dump(mode="json")
    tree = {"model": model, "train": {"precision": source.precision}, "peft": peft, "init": {"from": str(base)}}
    state = {"from": str(source.path), "base": fingerprint_of(source.base), "vocab_size": source.model.vocab_size}
    return state, {"config.yaml": json.dumps(tree, indent=1).encode()}


def tensors(config: LoRAConfig, model: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every factor: our name, theirs, and our shape without the padding of the vocabulary."""
    names, shapes = modules(model), {f"model.{n}": parts for n, parts in tensor_parts(model).items()}
    by_short = {}
    for weight, some in updates(config, model).items():
        for update in some:
            owner, _, short = update.factors.rpartition(".lora_")
            half = owner.removeprefix("model.").rpartition(".")[0]
            by_short[update.factors] = (f"{half}.{short}" if half else short, weight, update)
    for factors, (name, weight, update) in by_short.items():
        rows, columns = update.length, shapes[weight][0].shape[1]
        r, top = config.rank_of(name), f"{_TOP}{names[name]}"
        if name == "embedding":
            assert model.vocab_size
            yield f"{factors}_a", f"{top}.lora_embedding_A", (model.vocab_size, r)
            yield f"{factors}_b", f"{top}.lora_embedding_B", (columns, r)
            continue
        rows = model.vocab_size or rows if name == "head" else rows
        yield f"{factors}_a", f"{top}.lora_A.weight", (r, columns)
        yield f"{factors}_b", f"{top}.lora_B.weight", (rows, r)
        if config.dora:
            yield f"{factors}_m", f"{top}.lora_magnitude_vector", (rows,)


def export_peft(adapter: CheckpointSource, base: Source, base_path: Path, folder: Path) -> None:
    """Write an adapter as the peft library does; ``folder`` appears whole or not at all. Raises CheckpointError."""
    config = adapter.peft
    if not isinstance(config, LoRAConfig):
        what = "no adapter" if config is None else f"a {config.method} adapter"
        raise CheckpointError(f"{adapter.path} holds {what}; only LoRA and DoRA are written for the peft library")
    names, written = modules(adapter.model), {}
    for ours, theirs, shape in tensors(config, adapter.model):
        data = torch.empty(shape)
        adapter.read(ours, Tile(data, (0,) * len(shape)))
        if theirs.endswith("magnitude_vector"):
            data *= _lengths(base, config, ours, slice(0, shape[0]))
        written[theirs] = data.t().contiguous() if theirs.endswith("lora_embedding_A") else data
    matched = config.matched(adapter.model)
    ranks = {n: config.rank_of(n) for n in matched if config.rank_of(n) != config.r}
    alphas = {n: config.alpha_of(n) for n in matched if config.alpha_of(n) != config.alpha}
    tree = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_path),
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # One pattern for exactly the modules that are there: names of another block must not match.
        "target_modules": "|".join(re.escape(names[name]) for name in matched),
        "rank_pattern": {f"^{re.escape(names[name])}$": r for name, r in ranks.items()},
        "alpha_pattern": {f"^{re.escape(names[name])}$": alpha for name, alpha in alphas.items()},
    }
    with new_folder(folder) as temporary:
        write_file(temporary / WEIGHTS, [save(written, {"format": "pt"})], Faults.none())
        write_file(temporary / CONFIG, [json.dumps(tree, indent=2).encode()], Faults.none())


def _alpha(patterns: Mapping[str, Any], module: str, default: Any, where: Path) -> Any:
    """What a pattern says of a module: a name, or the end of one after a dot. The peft library takes regular
    expressions; those of a stranger could keep a processor busy for ever."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise CheckpointError(f"{where}: alpha_pattern: {pattern!a}: only names of modules are read")
        if module == name or (not pattern.startswith("^") and module.endswith(f".{name}")):
            return value
    return default


def _padded(name: str, shape: tuple[int, ...], model: ModelConfig) -> tuple[int, ...]:
    rows = name in ("model.embedding.lora_embedding_a", "model.head.lora_head_b")
    return (model.padded_vocab_size, *shape[1:]) if rows else shape


def _lengths(base: Source, config: LoRAConfig, name: str, rows: slice) -> Tensor:
    """The lengths of the base's rows that a magnitude belongs to."""
    factors = name.removesuffix("_m")
    owned = ((w, u) for w, some in updates(config, base.model).items() for u in some)
    weight, update = next((w, u) for w, u in owned if u.factors == factors)
    block = torch.empty((rows.stop - rows.start, base.tensors[weight].shape[1]))
    base.read(weight, Tile(block, (update.start + rows.start, 0)))
    return torch.linalg.vector_norm(block, dim=1)
