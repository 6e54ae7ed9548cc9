"""Tokenizers: sentencepiece's ``.model`` and Hugging Face folders behind one interface.

The files are not trusted. No torch: the data tools start without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from megatron_lite.cli import of_the_hub
from megatron_lite.errors import CheckpointError, ConfigError, DataError

MODEL, JSON, SETTINGS, TEMPLATE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_MAP, ADDED, GENERATION = "special_tokens_map.json", "added_tokens.json", "generation_config.json"
VOCAB, MERGES = "vocab.json", "merges.txt"  # GPT-2's format, before tokenizer.json
MAIN = (JSON, MODEL, VOCAB)  # main files; the first that exists is used
TOKENIZER_FILES = (  # files of a model folder that belong to the tokenizer or to generation
    *(MODEL, JSON, SETTINGS, SPECIAL_MAP, ADDED),
    *(VOCAB, MERGES, GENERATION, TEMPLATE, "chat_template.json"),
)
_CONFIG = "config.json"  # the model's config, which influences the tokenizer class
_MAX_FILE_BYTES = 256 << 20


class Encoded(NamedTuple):
    """int64 [n] tokens, and for each token the characters [starts, stops) of the text that it stands for.

    If several tokens share a character, each covers it or (sentencepiece) is empty at its beginning.
    """

    tokens: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def within(self, spans: Iterable[tuple[int, int]]) -> np.ndarray:
        """bool [n]: which tokens overlap one of ``spans``."""
        found = np.zeros(len(self.tokens), bool)
        for start, stop in spans:
            found |= (self.starts < stop) & (np.maximum(self.stops, self.starts + 1) > start)
        return found


class Tokenizer(ABC):
    """Text to tokens and back.

    Attributes:
        vocab_size: the largest token id plus one.
        bos_id, eos_id, pad_id: begin of sequence, end of sequence, padding; -1 if there is none.
        special: control tokens, text to id. Text that spells one is read as that token only with ``special=True``, as
            for the output of a chat template.
        begin, end: tokens that the tokenizer itself puts before and after a text, such as bos.
        sha256: digest of the file it was loaded from, and of the settings beside it if they change its tokens.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    special: Mapping[str, int]
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    sha256: str

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text, without begin or end tokens."""

    @abstractmethod
    def encode_documents(self, texts: list[bytes], *, special: bool = False) -> list[np.ndarray]:
        """int32 [n] tokens of each UTF-8 text, in one thread, without begin or end tokens."""

    @abstractmethod
    def encode_spans(self, text: str, *, special: bool = True) -> Encoded:
        """The tokens of a text, control tokens recognised, with the span of each."""

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

    def names(self) -> dict[str, str]:
        """Control tokens by their names in chat templates; without a padding token, eos stands for it."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        ids["pad_token"] = self.eos_id if self.pad_id < 0 else self.pad_id
        return {name: self.token(token) for name, token in ids.items()}

    def around(self, bos: bool | None = None, eos: bool | None = None) -> tuple[list[int], list[int]]:
        """The tokens before and after a text. None: those that the tokenizer itself adds; True: bos and eos; False:
        none. Raises ConfigError if it has no such token."""
        sides = []
        for name, wanted, own, token in (("bos", bos, self.begin, self.bos_id), ("eos", eos, self.end, self.eos_id)):
            if wanted and token < 0 and not own:
                raise ConfigError(f"--add_{name}=true: the tokenizer has no {name} token")
            sides.append(list(own) if wanted is None or (wanted and token < 0) else [token] * wanted)
        return sides[0], sides[1]

    def encode_prompt(self, text: str, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """The tokens of a prompt, control tokens recognised, with the tokens of ``around``, which are not doubled; at
        least one token."""
        before, after = self.around(bos, eos)
        tokens = led(before, self.encode(text, special=True))
        return (tokens if after and tokens[-len(after) :] == after else [*tokens, *after]) or [self.eos_id]

    def token(self, token: int) -> str:
        """The text of a control token; "" for any other token and for -1."""
        return next((text for text, known in self.special.items() if known == token), "")


def led(begin: list[int], tokens: list[int]) -> list[int]:
    """``tokens`` with ``begin`` before them, unless they begin with it already."""
    return tokens if tokens[: len(begin)] == begin else [*begin, *tokens]


class SentencePiece(Tokenizer):
    """A sentencepiece model. Raises DataError if ``content`` is not one."""

    def __init__(self, content: bytes, name: str) -> None:
        try:
            if not content:  # the library accepts empty content and fails only when used
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

    def encode_documents(self, texts: list[bytes], *, special: bool = False) -> list[np.ndarray]:
        if special:
            return [self.encode_spans(text.decode()).tokens.astype(np.int32) for text in texts]
        return self._model.encode(texts, out_type="numpy", num_threads=1)

    def encode_spans(self, text: str, *, special: bool = True) -> Encoded:
        found: list[tuple[int, int, int]] = []
        start = 0
        for match in self._control.finditer(text) if special else ():
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
        # Offsets count bytes; the character index is the number of character-starting bytes before.
        firsts = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        where = np.concatenate(([0], np.cumsum(firsts))) + offset
        return [(piece.id, int(where[piece.begin]), int(where[piece.end])) for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode(list(tokens))


def parse_object(files: Mapping[str, bytes], name: str, where: str = "") -> dict[str, Any]:
    """The object in a small JSON file; empty if there is no file. Raises DataError, beginning with ``where``, for
    anything else."""
    if name not in files:
        return {}
    try:
        found = json.loads(files[name], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}{name}: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}{name}: expected an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]!a} is a duplicate key")
    return found


def tokenizer_path(path: str | Path) -> Path:
    """The main file of a tokenizer: the path itself or, in a folder, tokenizer.json, tokenizer.model or vocab.json."""
    path = Path(path)
    found = next((path / name for name in MAIN if (path / name).is_file()), None) if path.is_dir() else path
    if found is None or not found.is_file():
        raise ConfigError(
            f"data.tokenizer: no {'tokenizer' if path.is_dir() else 'file'} {path}{of_the_hub(str(path))}"
        )
    return found


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """The files of the tokenizer at ``path``, by their names in a model folder. A folder: all its tokenizer files. A
    file with a standard name: with the files beside it. A sentencepiece model of another name: alone."""
    file = tokenizer_path(path)
    whole = file.suffix == ".json" or file.name == MODEL
    beside = [file.parent / name for name in (*TOKENIZER_FILES, _CONFIG) if whole]
    for each in (file, *beside):
        if each.is_file() and each.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{each}: {each.stat().st_size} bytes are too many for a tokenizer")
    try:
        files = {each.name: each.read_bytes() for each in beside if each.is_file()}
        files |= {VOCAB if file.name == VOCAB else JSON if file.suffix == ".json" else MODEL: file.read_bytes()}
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    if file.name in (MODEL, VOCAB):
        files.pop(JSON, None)
    from megatron_lite.data.hf_tokenizer import settled  # it imports this module

    return settled(files, parse_object({_CONFIG: files.pop(_CONFIG, b"{}")}, _CONFIG, f"{path}: "), str(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece ``.model``, a ``tokenizer.json``, or a folder that has one.

    Raises ConfigError if there is none, DataError if it does not load.
    """
    return read_tokenizer(tokenizer_files(path), str(tokenizer_path(path)))


def read_tokenizer(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """The tokenizer in ``files``, tokenizer.json before tokenizer.model. Raises as ``load_tokenizer`` does."""
    if not files.keys() & {*MAIN}:
        raise ConfigError(f"{name} has no {MODEL} and no {JSON}")
    from megatron_lite.data.hf_tokenizer import HuggingFace, is_hugging_face

    return HuggingFace(files, name) if is_hugging_face(files, name) else SentencePiece(files[MODEL], name)


def carried_tokenizer(files: Mapping[str, bytes], where: Path) -> Tokenizer:
    """The tokenizer among the small files of a model at ``where``. Raises CheckpointError."""
    if not files.keys() & {*MAIN}:
        raise CheckpointError(f"{where} has no {MODEL} and no {JSON}, to read a prompt with")
    try:
        return read_tokenizer(files, f"{where}: its tokenizer")
    except DataError as error:
        raise CheckpointError(str(error)) from None
