"""LoRA and DoRA adapters in folders of the peft library.

Its factors equal ours, under its module names, with three exceptions. An embedding's A is transposed. DoRA's magnitudes
are L2 norms of rows, where ours are relative to those of the base. And GPT-2's queries, keys and values are one linear
there, with one A: three of our updates are written as one whose rank is the sum of theirs, with a block-diagonal B; one
of the library's is read as three with the same A.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.checkpoint.adapters.merge import Update, updates
from megatron_lite.checkpoint.adapters.peft_folder import CONFIG, WEIGHTS, PeftSource, write_folder
from megatron_lite.checkpoint.source import Info, Source
from megatron_lite.config import ModelConfig
from megatron_lite.distributed.shard import Tile
from megatron_lite.errors import CheckpointError
from megatron_lite.families.family import linears
from megatron_lite.families.huggingface import tensor_parts
from megatron_lite.peft.lora import LoRAConfig

_TOP = "base_model.model."
_TABLE = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
_LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
# Initialisations that left the base unchanged. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtracted the initial
# update from the base, and what was trained belongs to weights that no file holds.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class Module(NamedTuple):
    """A module of the peft library, with a weight [rows, columns] without the padding of the vocabulary. ``names``: our
    linears in it, in row order. ``start``: the row of our ``weight`` where its own begins."""

    names: list[str]
    weight: str
    start: int
    rows: int
    columns: int

    @property
    def table(self) -> bool:
        """Whether it is the embedding."""
        return self.names == ["embedding"]


def modules(model: ModelConfig) -> dict[str, Module]:
    """Every module that the peft library can adapt, by the library's name."""
    found: dict[str, Module] = {}
    held = {linear.name: [f"{linear.half}.{part}" for part in linear.parts] for linear in linears(model)}
    for ours, parts in tensor_parts(model).items():
        owner, _, kind = ours.rpartition(".")
        block, _, linear = owner.partition(".")[2].partition(".")
        if kind != "weight" or (linear not in held and owner not in ("embedding", "head")):
            continue
        names = [f"blocks.{block}.{name}" for name in held.get(linear, ())] or [owner]
        share, start = len(names) // len(parts), 0
        for i, part in enumerate(parts):
            own = names[i * share : (i + 1) * share]
            found[part.name.removesuffix(".weight")] = Module(own, f"model.{ours}", start, *part.shape)
            start += part.shape[0]
    return found


def _updates(config: LoRAConfig, model: ModelConfig) -> dict[str, Update]:
    """The update of each adapted linear, by name."""
    return {update.name: update for some in updates(config, model).values() for update in some}


class _Part(NamedTuple):
    """The position of one of our tensors in the tensor ``theirs``: ``known`` rows from ``first`` on; our other rows are
    padding. ``start``: its first row in the base's ``weight``."""

    theirs: str
    first: int
    known: int
    weight: str
    start: int


class LoRASource(PeftSource):
    """LoRA and DoRA."""

    peft: LoRAConfig
    peft_type = "LORA"
    known = (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
        # Known from the tensors, or without effect on them.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("init_lora_weights", "qalora_group_size", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
        "megatron_core",
    )

    def __init__(self, folder: Path, base: Source) -> None:
        super().__init__(folder, base)
        self.peft = self._read_config()
        self._parts: dict[str, _Part] = {}
        adapted = _updates(self.peft, self.model)
        for name, module in modules(self.model).items():
            for update in (adapted[linear] for linear in module.names if linear in adapted):
                r, rows, columns = self.peft.rank_of(update.name), update.length, module.columns
                first = update.start - module.start
                known = min(rows, module.rows - first)
                # The shape there, our shape, our first row there, our rows that are not padding.
                kinds = {
                    "a": ((r, columns), (r, columns), 0, r),
                    "b": ((module.rows, r), (rows, r), first, known),
                    "m": ((module.rows,), (rows,), first, known),
                }
                if module.table:
                    kinds |= {"a": ((r, known), (rows, r), 0, known), "b": ((columns, r), (columns, r), 0, columns)}
                if not self.peft.dora:
                    del kinds["m"]
                for kind, (stored, shape, row, held) in kinds.items():
                    theirs = f"{_TOP}{name}.{(_TABLE if module.table else _LINEAR)[kind]}"
                    ours = f"{update.factors}_{kind}"
                    self.tensors[ours] = Info(self.check_stored(theirs, stored), shape)
                    self._parts[ours] = _Part(theirs, row, held, module.weight, update.start)
        self.check_all_used({part.theirs for part in self._parts.values()})

    def _read_config(self) -> LoRAConfig:
        tree, where = self.config, f"{self.path / CONFIG}"
        if (start := tree.get("init_lora_weights")) not in _STARTS:
            raise CheckpointError(
                f"{where}: init_lora_weights={start!a:.40} changed the base's weights when training began; "
                "have the peft library convert it to plain LoRA (path_initial_model_for_weight_conversion)"
            )
        ranks: dict[str, int] = {}
        alphas: dict[str, Any] = {}
        odd: list[str] = []
        alpha, r = tree.get("lora_alpha", 8), tree.get("r", 8)
        patterns = {key: _patterns(tree.get(key), f"{where}: {key}") for key in ("alpha_pattern", "rank_pattern")}
        known = modules(self.model)
        wanted = _meant(tree, list(known), where)
        for name, module in known.items():
            a = f"{_TOP}{name}.{(_TABLE if module.table else _LINEAR)['a']}"
            if (stored := self._file.tensors.get(a)) is not None and len(stored.shape) == 2:
                if name not in wanted:
                    keys = ", ".join(key for key in _CHOICE if tree.get(key) is not None)
                    raise CheckpointError(f"{where}: {keys}: leaves out {name}, but there is {a}")
                if stored.shape[0] != (own := _first(patterns["rank_pattern"], name, r)):
                    odd.append(f"{a} has rank {stored.shape[0]}, r and rank_pattern give {own}")
                ranks |= dict.fromkeys(module.names, stored.shape[0])
                alphas |= dict.fromkeys(module.names, _first(patterns["alpha_pattern"], name, alpha))
        if not ranks and self._file.tensors:
            first = next(iter(self._file.tensors))
            raise CheckpointError(f"{self.path / WEIGHTS}: {first!a:.200} does not belong to any module of this model")
        config = self.section(
            method="lora",
            targets=list(ranks),
            r=r,
            alpha=alpha,
            ranks={name: rank for name, rank in ranks.items() if rank != r},
            alphas={name: value for name, value in alphas.items() if value != alpha},
            dropout=tree.get("lora_dropout") or 0.0,
            rslora=bool(tree.get("use_rslora")),
            dora=bool(tree.get("use_dora")),
        )
        assert isinstance(config, LoRAConfig)
        if mistakes := config.unfit(self.model):
            raise CheckpointError(f"{where}: {'; '.join(mistakes)}")
        if odd:
            raise CheckpointError(f"{self.path / WEIGHTS}: {odd[0]}")
        return config

    def read(self, name: str, tile: Tile) -> None:
        part, (rows, *columns) = self._parts[name], tile.place
        held = max(0, min(rows.stop, part.known) - rows.start)
        tile.data[held:].zero_()
        into = tile.data[:held]
        place = [slice(part.first + rows.start, part.first + rows.start + held), *columns]
        if part.theirs.endswith(_TABLE["a"]):
            side = torch.empty((into.shape[1], held))
            self.fill(part.theirs, place[::-1], side)
            into.copy_(side.t())
            return
        self.fill(part.theirs, place, into)
        if part.theirs.endswith(_LINEAR["m"]):
            into /= _lengths(self.base, part.weight, part.start + rows.start, held).to(into.device)

    @staticmethod
    def write(adapter: Source, base: Source, folder: Path) -> dict[str, Tensor]:
        config, model = adapter.peft, adapter.model
        assert isinstance(config, LoRAConfig)
        adapted, written = _updates(config, model), {}
        found: dict[str, tuple[int, float]] = {}  # rank and alpha by module

        def factor(update: Update, kind: str, *shape: int) -> Tensor:
            data = torch.empty(shape)
            adapter.read(f"{update.factors}_{kind}", Tile(data, (0,) * len(shape)))
            return data

        for name, module in modules(model).items():
            some = [adapted[linear] for linear in module.names if linear in adapted]
            if not some:
                continue
            r, top = sum(config.rank_of(update.name) for update in some), f"{_TOP}{name}"
            if module.table:
                found[name] = r, config.alpha_of("embedding")
                written[f"{top}.{_TABLE['a']}"] = factor(some[0], "a", module.rows, r).t().contiguous()
                written[f"{top}.{_TABLE['b']}"] = factor(some[0], "b", module.columns, r)
                continue
            # The module has one alpha; B absorbs the ratio where the updates' scales differ.
            scale = some[0].scale
            alpha = scale * (math.sqrt(r) if config.rslora else r)
            found[name] = r, config.alpha_of(some[0].name) if len(some) == 1 else alpha
            a, b = torch.empty((r, module.columns)), torch.zeros((module.rows, r))
            lengths = _lengths(base, module.weight, module.start, module.rows) if config.dora else None
            column = 0
            for update in some:
                own = config.rank_of(update.name)
                first, columns = update.start - module.start, slice(column, column + own)
                rows = slice(first, min(first + update.length, module.rows))
                a[columns] = factor(update, "a", own, module.columns)
                b[rows, columns] = factor(update, "b", rows.stop - first, own) * (update.scale / scale)
                if lengths is not None:
                    lengths[rows] *= factor(update, "m", rows.stop - first)
                column += own
            written |= {f"{top}.{_LINEAR['a']}": a, f"{top}.{_LINEAR['b']}": b}
            if lengths is not None:
                written[f"{top}.{_LINEAR['m']}"] = lengths
        tree = {
            "peft_type": LoRASource.peft_type,
            "r": config.r,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "use_rslora": config.rslora,
            "use_dora": config.dora,
            "bias": "none",
            "fan_in_fan_out": model.traits.names.transposed,
            # A pattern that matches exactly these modules, and none of the same name in other blocks.
            "target_modules": "|".join(map(re.escape, found)),
            "rank_pattern": {f"^{re.escape(name)}$": r for name, (r, _) in found.items() if r != config.r},
            "alpha_pattern": {
                f"^{re.escape(name)}$": alpha for name, (_, alpha) in found.items() if alpha != config.alpha
            },
        }
        write_folder(folder, tree, written, base, adapter)
        return written


def _meant(config: Mapping[str, Any], names: Sequence[str], where: str) -> set[str]:
    """The modules among ``names`` that the library's config selects. Raises CheckpointError."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if targets is None:
        return set(names)
    if targets == "all-linear":
        found = {name for name in names if name.rpartition(".")[2] not in ("lm_head", "embed_tokens", "wte")}
    else:
        found = _matching(targets, names, f"{where}: target_modules")
    found -= _matching(excluded, names, f"{where}: exclude_modules")
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern") or r"[^.]*"
    if layers is None or layers == [] or isinstance(targets, str):
        return found
    parents = "|".join(pattern) if isinstance(pattern, list) else pattern
    own = "|".join(str(layer) for layer in (layers if isinstance(layers, list) else [layers]))
    return found & _matching(rf"(.*?\.)?({parents})\.({own})\..*", names, f"{where}: layers_pattern")


def _matching(wanted: Any, names: Sequence[str], where: str) -> set[str]:
    """The names that match: a list matches suffixes, a regular expression whole names. Another process with a time
    limit evaluates the expression, since a hostile one may never end."""
    if isinstance(wanted, list):
        return {name for name in names if any(f".{name}".endswith(f".{end}") for end in wanted)}
    if not isinstance(wanted, str):
        raise CheckpointError(f"{where}: expected a list of names, found {type(wanted).__name__}")
    code = "import json, re, sys; p, n = json.load(sys.stdin); print(json.dumps([x for x in n if re.fullmatch(p, x)]))"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code],
            input=json.dumps([wanted, list(names)]),
            capture_output=True,
            text=True,
            timeout=3,
            check=True,
        )
    except subprocess.SubprocessError:
        raise CheckpointError(f"{where}: {wanted!a:.200} is not a pattern that can be matched") from None
    return set(json.loads(done.stdout))


def _patterns(patterns: Any, where: str) -> dict[tuple[bool, str], tuple[int, Any]]:
    """Values by (whether a whole name is meant, name), each with its index. The peft library takes any regular
    expression; here only names are read, since a hostile expression may never end."""
    if patterns is not None and not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: expected an object, found {type(patterns).__name__}")
    found: dict[tuple[bool, str], tuple[int, Any]] = {}
    for i, (pattern, value) in enumerate((patterns or {}).items()):
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise CheckpointError(f"{where}: {pattern[:200]!a}: only module names are supported, not patterns")
        found.setdefault((pattern.startswith("^"), name), (i, value))
    return found


def _first(patterns: Mapping[tuple[bool, str], tuple[int, Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module: its whole name, or the end of it after a dot."""
    parts = module.split(".")
    names = [(True, module), *((False, ".".join(parts[i:])) for i in range(len(parts)))]
    return min((patterns[name] for name in names if name in patterns), key=lambda hit: hit[0], default=(0, default))[1]


def _lengths(base: Source, weight: str, start: int, count: int) -> Tensor:
    """The L2 norms of ``count`` rows of a base's weight."""
    block = torch.empty((count, base.tensors[weight].shape[1]))
    base.read(weight, Tile(block, (start, 0)))
    return torch.linalg.vector_norm(block, dim=1)
