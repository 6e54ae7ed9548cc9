"""The tokenizer: a sentencepiece model, loaded with care because a user may hand us any file."""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor

from megatron_lite.errors import CheckpointError, ConfigError, DataError


def load_tokenizer(path: str | Path) -> SentencePieceProcessor:
    """Load a sentencepiece ``.model``. Raises ConfigError where there is none, DataError where it does not load."""
    if not Path(path).is_file():
        raise ConfigError(f"data.tokenizer: no file {path}")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{path} is not a sentencepiece model: {' '.join(str(error).split())}") from None


def parse_tokenizer(content: bytes, where: Path) -> SentencePieceProcessor:
    """The sentencepiece model that travels in ``where``. Raises CheckpointError."""
    try:
        return SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise CheckpointError(f"{where}: its tokenizer.model is not a sentencepiece model: {message}") from None
