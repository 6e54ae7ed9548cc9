"""The check of a conversion: logits of our model against those of the library that owns the format."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.formats.hf import CONFIG, read_json
from megatron_lite.checkpoint.source import Source
from megatron_lite.config import ModelConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.families.huggingface import MODEL_TYPES
from megatron_lite.inference.loading import load_model

_MOST_ELEMENTS = 2 << 30


def some_tokens(model: ModelConfig, most: int) -> Tensor:
    """Tokens to compare logits for, int64 [1, seq] with seq at most ``most``."""
    return torch.arange(min(32, most)).unsqueeze(0) * 7919 % (model.vocab_size or 1)


def too_large(source: Source) -> str:
    """Why logits are not compared, or an empty string: a comparison holds the model twice, in float32."""
    elements = sum(math.prod(info.shape) for name, info in source.tensors.items() if name.startswith("model."))
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    if elements <= min(_MOST_ELEMENTS, free // 8):
        return ""
    return f"its logits were not compared: {elements:,} parameters are too many to hold twice"


@contextlib.contextmanager
def in_silence() -> Iterator[None]:
    """Suppress the progress bars and warnings of the libraries that logits are compared with."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
        yield


def cannot_read(library: str, error: Exception) -> str:
    """Why logits are not compared with a library that raised this."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"its logits were not compared: {library} cannot read it: {first:.200}"


def relative_gap(ours: Tensor, want: Tensor) -> float:
    """The largest difference of logits, relative to the largest logit."""
    return float((ours - want).abs().max() / want.abs().max())


def same_as_transformers(source: Source, folder: Path, dtype: torch.dtype | None = None) -> str:
    """Compare the logits of ``source``, its weights rounded to ``dtype``, with those that transformers computes from a
    Hugging Face folder. Returns the result as a text for the user. No code from the folder runs, no pickle is read.

    Raises CheckpointError if they differ.
    """
    if importlib.util.find_spec("transformers") is None:
        return "its logits were not compared: transformers is not installed"
    if reason := too_large(source):
        return reason
    tokens = some_tokens(source.model, source.model.max_seq_len)
    owner = MODEL_TYPES[read_json(folder, CONFIG)["model_type"]].architecture
    with in_silence(), torch.no_grad():
        try:
            import transformers

            theirs = getattr(transformers, owner).from_pretrained(
                folder.resolve(), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
            theirs.config.return_dict = True
            want = theirs.eval()(tokens).logits[:, -1]
        except Exception as error:
            return cannot_read("transformers", error)
        del theirs
        model = load_model(source)
        if dtype is not None:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        ours = model(tokens)
    gap = relative_gap(ours, want)
    if not gap < 1e-4:
        raise CheckpointError(f"{folder}: transformers' logits differ from ours by {gap:.2g} of the largest")
    return f"transformers' logits equal ours within {gap:.1g}"
