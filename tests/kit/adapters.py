"""Bases and adapters on disk, made without training: their numbers depend on a seed alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_lite import checkpoint, peft
from megatron_lite.config import ModelConfig, parse_peft
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import initialize, inits_of, pieces_of
from megatron_lite.models.decoder import Decoder
from megatron_lite.training.faults import Faults

VOCAB, LENGTH = 61, 32
FAMILIES: dict[str, dict[str, Any]] = {"llama": {"num_kv_heads": 1}, "gpt2": {"family": "gpt2"}}


def decoder(
    family: str,
    tp: Axis | None = None,
    sp: bool = False,
    method: dict[str, Any] | None = None,
    seed: int = 1,
    hidden: int = 32,
    vocab: int = VOCAB,
    **keys: Any,
) -> Decoder:
    """A model in float64, with other ``keys`` of its config if any; with ``method`` the same one frozen, and its
    adapter beside it."""
    sizes = {"vocab_size": vocab, "vocab_multiple": 8, "hidden_size": hidden, "num_layers": 2, "num_heads": 4}
    keys = {"ffn_size": 4 * hidden, "max_seq_len": LENGTH, "init_std": 0.3, **FAMILIES[family], **keys}
    config = ModelConfig(**sizes, **keys)
    axis = tp or Axis("tp")
    model = Decoder(config, axis, sp=sp).double()
    peft.apply(model, parse_peft(method, ""), torch.float64)
    initialize(pieces_of(model, axis), inits_of(model), seed)
    return model


def saved(
    folder: Path,
    model: Decoder,
    seed: int,
    method: dict[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    step: int = 1,
) -> Path:
    """A checkpoint of a base, or of an adapter on what lies in ``base`` beside it, whose numbers depend on ``seed``;
    with small ``files`` beside them."""
    vocab = model.config.vocab_size
    with torch.no_grad():  # what is loaded has no padding
        model.embedding.weight[vocab:] = 0.0
        model.projection.weight[vocab:] = 0.0
    pieces = pieces_of(model, Axis("tp"))
    state = {"vocab_size": vocab, "tokenizer_sha256": None}
    if method is not None:
        frozen = {f"model.{name}": pieces[name] for name, p in model.named_parameters() if not p.requires_grad}
        state["base"] = checkpoint.fingerprint(frozen, Axis("world"))
        pieces = {name: pieces[name] for name, p in model.named_parameters() if p.requires_grad}
        initialize(pieces, dict.fromkeys(pieces, 0.3), seed)
    tree = {"model": model.config.model_dump(mode="json"), "train": {"precision": "float64"}, "peft": method}
    extras = {
        **(files or {}),
        "config.yaml": json.dumps({**tree, "init": {"from": str(folder.parent / "base")}}).encode(),
    }
    checkpoint.prepare(folder, Axis("world"))
    named = {f"model.{name}": piece for name, piece in pieces.items()}
    return checkpoint.save(folder, step, named, state, extras, Axis("world"), Faults.none())
