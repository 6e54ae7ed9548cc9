"""Opens checkpoints of any format: recognises the format of a path."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.checkpoint.adapters.peft_folder import CONFIG, PeftSource
from megatron_lite.checkpoint.formats.deepspeed import DeepSpeedSource, is_deepspeed
from megatron_lite.checkpoint.formats.hf import HuggingFaceSource, is_hugging_face, read_json
from megatron_lite.checkpoint.formats.megatron import is_megatron, open_megatron
from megatron_lite.checkpoint.reading import open_checkpoint
from megatron_lite.checkpoint.retention import find
from megatron_lite.checkpoint.source import CheckpointSource, Source
from megatron_lite.checkpoint.storage import agree
from megatron_lite.config import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.errors import CheckpointError
from megatron_lite.peft import METHODS


def open_source(
    path: Path, world: Axis | None = None, *, trust: bool = False, like: ModelConfig | None = None
) -> Source:
    """Open and check a checkpoint: one of ours (or a run or its ``checkpoints`` folder, for the latest), a Hugging Face
    folder, or a checkpoint of DeepSpeed or Megatron-LM.

    Collective over ``world``, whose ranks share the checking. ``trust``: skip the digests. ``like``: a model that
    provides what a format lacks: the padding of the vocabulary (Hugging Face), its true size (Megatron), or the whole
    model (DeepSpeed). Raises CheckpointError.
    """
    if (path / CONFIG).is_file() and not is_hugging_face(path):
        raise CheckpointError(f"{path} is an adapter of the peft library; convert it with ckpt import_peft")
    if is_hugging_face(path):
        world, multiple = world or Axis("world"), like.vocab_multiple if like else None
        theirs: list[Source] = []
        agree(world, lambda: theirs.append(HuggingFaceSource(path, multiple, compare=world.rank == 0)), path)
        return theirs[0]
    if is_megatron(path):
        return open_megatron(path, like.vocab_size if like else None)
    if is_deepspeed(path):
        if like is None:
            raise CheckpointError(
                f"{path}: a DeepSpeed checkpoint does not describe its model; use ckpt import_deepspeed with a config"
            )
        return DeepSpeedSource(path, like)
    return CheckpointSource(open_checkpoint(find(path), world, trust=trust))


def open_adapter(path: Path, base: Source, world: Axis, *, trust: bool = False) -> Source:
    """Open an adapter on ``base``: one of ours or a folder of the peft library. Collective over ``world``. Raises
    CheckpointError."""
    if not (path / CONFIG).is_file():
        found = open_source(path, world, trust=trust)
        if found.peft is None:
            raise CheckpointError(f"{found.path} holds no adapter")
        return found
    theirs: list[Source] = []
    agree(world, lambda: theirs.append(open_peft(path, base)), path)
    return theirs[0]


def open_peft(folder: Path, base: Source) -> PeftSource:
    """Open a folder of the peft library as an adapter for the model of ``base``. Raises CheckpointError."""
    kind = read_json(folder, CONFIG).get("peft_type")
    folders = filter(None, (method.peft_folder() for method in METHODS.values()))
    known = {each.peft_type: each for each in folders}
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(f"{folder / CONFIG}: peft_type={kind!a}: only {', '.join(known)} are read")
    return known[kind](folder, base)
