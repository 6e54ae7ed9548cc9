"""Tokenizers: sentencepiece's ``.model`` and Hugging Face's ``tokenizer.json`` behind one interface.

Both are loaded with care, because a user may hand us any file. No torch: the data tools start without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from megatron_lite.errors import CheckpointError, ConfigError, DataError

MODEL, JSON, SETTINGS, TEMPLATE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (  # what belongs to a model beside its weights
    *(MODEL, JSON, SETTINGS, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", GENERATION, TEMPLATE, "chat_template.json"),
)
_MAX_FILE_BYTES = 256 << 20
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # where nothing beside a tokenizer.json names its own


class Encoded(NamedTuple):
    """int64 [n] tokens, and for each the characters [starts, stops) of the text it stands for.

    Of the tokens that share a character, each covers it or (sentencepiece) covers nothing at its beginning.
    """

    tokens: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def within(self, spans: Iterable[tuple[int, int]]) -> np.ndarray:
        """bool [n]: which tokens stand for a character of one of ``spans``."""
        found = np.zeros(len(self.tokens), bool)
        for start, stop in spans:
            found |= (self.starts < stop) & (np.maximum(self.stops, self.starts + 1) > start)
        return found


class Tokenizer(ABC):
    """Text to tokens and back.

    Attributes:
        vocab_size: the largest token id and one.
        bos_id, eos_id, pad_id: begin and end of a sequence, and what fills it up; -1 where there is none.
        special: the control tokens, text to id. Text that spells one is that token only where it is asked for
            (``special=True``), as of what a chat template has written.
        sha256: of the file it was loaded from.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    special: Mapping[str, int]
    sha256: str

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text; nothing is added to them."""

    @abstractmethod
    def encode_documents(self, texts: list[bytes], eos: bool) -> list[np.ndarray]:
        """int32 [n] tokens of each UTF-8 text, in one thread; with ``eos`` that token after each."""

    @abstractmethod
    def encode_spans(self, text: str) -> Encoded:
        """The tokens of a text in which control tokens count, and where each comes from."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""

    def show(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens spelled out."""
        names = {token: text for text, token in self.special.items()}
        parts: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token in names:
                parts += [self.decode(run), names[token]]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.decode(run)])

    def token(self, token: int) -> str:
        """The text of a control token, "" of another one or of -1."""
        return next((text for text, known in self.special.items() if known == token), "")


class SentencePiece(Tokenizer):
    """A sentencepiece model. Raises DataError where ``content`` is not one."""

    def __init__(self, content: bytes, name: str) -> None:
        try:
            if not content:  # which the library takes for no model at all, and answers when it is used
                raise ValueError("an empty file")
            self._model = SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise DataError(f"{name} is not a sentencepiece model: {' '.join(str(error).split())}") from None
        self.vocab_size, self.sha256 = self._model.vocab_size(), hashlib.sha256(content).hexdigest()
        self.bos_id, self.eos_id, self.pad_id = self._model.bos_id(), self._model.eos_id(), self._model.pad_id()

    @cached_property
    def special(self) -> Mapping[str, int]:  # type: ignore[override]
        model = self._model
        return {model.id_to_piece(i): i for i in range(self.vocab_size) if model.is_control(i)}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.encode_spans(text).tokens.tolist() if special else self._model.encode(text)

    def encode_documents(self, texts: list[bytes], eos: bool) -> list[np.ndarray]:
        return self._model.encode(texts, out_type="numpy", num_threads=1, add_eos=eos)

    def encode_spans(self, text: str) -> Encoded:
        found: list[tuple[int, int, int]] = []
        start = 0
        for match in self._control.finditer(text):
            found += self._pieces(text[start : match.start()], start)
            found.append((self.special[match[0]], *match.span()))
            start = match.end()
        found += self._pieces(text[start:], start)
        return Encoded(*np.array(found, np.int64).reshape(-1, 3).T)

    def _pieces(self, text: str, offset: int) -> list[tuple[int, int, int]]:
        if not text:
            return []
        from sentencepiece import sentencepiece_pb2

        raw = self._model.encode(text, out_type="serialized_proto")
        pieces = sentencepiece_pb2.SentencePieceText.FromString(raw).pieces  # type: ignore[attr-defined]
        if text.isascii():
            return [(piece.id, piece.begin + offset, piece.end + offset) for piece in pieces]
        # Its offsets count bytes: characters before each of them are the bytes that start one.
        firsts = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        where = np.concatenate(([0], np.cumsum(firsts))) + offset
        return [(piece.id, int(where[piece.begin]), int(where[piece.end])) for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode(list(tokens))


class TokenizerJson(Tokenizer):
    """Hugging Face's format, read by their ``tokenizers`` library. ``files``: what lies beside it, of which the
    settings name the ends of a sequence. Raises DataError for what is not one, ConfigError without the library."""

    def __init__(self, content: bytes, name: str, files: Mapping[str, bytes]) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ConfigError(f"{name}: reading it needs tokenizers: pip install 'megatron_lite[hf]'") from None
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"{name} is not a tokenizer.json: {' '.join(str(error).split())}") from None
        self._model.no_truncation()
        self._model.no_padding()
        # It adds what is not asked for here, and takes the spaces at the ends of tokens out of their offsets.
        self._model.post_processor = None  # type: ignore[assignment]
        ids = self._model.get_vocab(with_added_tokens=True).values()
        self.vocab_size, self.sha256 = max(ids, default=-1) + 1, hashlib.sha256(content).hexdigest()
        added = self._model.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in sorted(added.items()) if token.special}
        settings = {**parse_object(files, "special_tokens_map.json"), **parse_object(files, SETTINGS)}
        guess = [text for text in _ENDS if text in self.special]
        self.bos_id = self._named(settings.get("bos_token"), name)
        self.eos_id = self._named(settings.get("eos_token", guess[0] if len(guess) == 1 else None), name)
        self.pad_id = self._named(settings.get("pad_token"), name)

    def _named(self, token: Any, name: str) -> int:
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return -1
        found = self._model.token_to_id(text) if isinstance(text, str) else None
        if found is None:
            raise DataError(f"{name} has no token {text!a}, which {SETTINGS} names")
        return found

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        self._model.encode_special_tokens = not special  # the library's word for taking them as plain text
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: list[bytes], eos: bool) -> list[np.ndarray]:
        end = [self.eos_id] if eos else []
        return [np.array([*self.encode(text.decode()), *end], np.int32) for text in texts]

    def encode_spans(self, text: str) -> Encoded:
        self._model.encode_special_tokens = False
        found = self._model.encode(text, add_special_tokens=False)
        starts, stops = np.array(found.offsets, np.int64).reshape(-1, 2).T
        return Encoded(np.array(found.ids, np.int64), starts, stops)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode(list(tokens), skip_special_tokens=True)


def parse_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in a small JSON file, empty where there is none. Raises DataError for anything else."""
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{name}: expected an object")
    return found


def tokenizer_path(path: str | Path) -> Path:
    """The file that a name means: itself, or of a folder its tokenizer.json, else its tokenizer.model."""
    path = Path(path)
    found = next((path / name for name in (JSON, MODEL) if (path / name).is_file()), None) if path.is_dir() else path
    if found is None or not found.is_file():
        raise ConfigError(f"data.tokenizer: no {'tokenizer' if path.is_dir() else 'file'} {path}")
    return found


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """What makes up the tokenizer at ``path``, by the names a model folder has for it: a sentencepiece model by itself,
    a tokenizer.json with what lies beside it, a folder whole."""
    file = tokenizer_path(path)
    names = TOKENIZER_FILES if file.suffix == ".json" or Path(path).is_dir() else ()
    beside = [file.parent / name for name in names]
    for each in (file, *beside):
        if each.is_file() and each.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{each}: {each.stat().st_size} bytes are too many for a tokenizer")
    try:
        files = {each.name: each.read_bytes() for each in beside if each.is_file()}
        return files | {JSON if file.suffix == ".json" else MODEL: file.read_bytes()}
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece ``.model``, a ``tokenizer.json``, or a folder that has one.

    Raises ConfigError where there is none, DataError where it does not load.
    """
    return read_tokenizer(tokenizer_files(path), str(tokenizer_path(path)))


def read_tokenizer(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """The tokenizer in ``files``, tokenizer.json before tokenizer.model. Raises as ``load_tokenizer`` does."""
    if JSON in files:
        return TokenizerJson(files[JSON], name, files)
    if MODEL in files:
        return SentencePiece(files[MODEL], name)
    raise ConfigError(f"{name} has no {MODEL} and no {JSON}")


def carried_tokenizer(files: Mapping[str, bytes], where: Path) -> Tokenizer:
    """The tokenizer that a model at ``where`` has among its small files. Raises CheckpointError."""
    if not files.keys() & {MODEL, JSON}:
        raise CheckpointError(f"{where} has no {MODEL} and no {JSON}, to read a prompt with")
    try:
        return read_tokenizer(files, f"{where}: its tokenizer")
    except DataError as error:
        raise CheckpointError(str(error)) from None
