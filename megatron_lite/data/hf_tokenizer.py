"""Hugging Face tokenizers: a tokenizer.json, or a sentencepiece model with the settings of their classes.

transformers defines what a folder means: if there are settings, it builds the tokenizer, and its tokens are used. It
gets a copy of the files that contains only known keys.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.data.tokenizer import (
    ADDED,
    JSON,
    MAIN,
    MERGES,
    MODEL,
    SETTINGS,
    SPECIAL_MAP,
    Encoded,
    SentencePiece,
    Tokenizer,
    parse_object,
)
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.families.huggingface import MODEL_TYPES

FLAGS = frozenset(
    (
        *("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens"),
        *("trim_offsets", "do_lower_case", "remove_space", "keep_accents"),  # read by some classes
        "clean_up_tokenization_spaces",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    )
)
HONOURED = FLAGS | {  # and every other key that ends in _token, a text that is one token
    *("tokenizer_class", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    *("model_specific_special_tokens", "errors"),
}
HARMLESS = frozenset(  # batch lengths and sides, names, templates (read elsewhere), keys that no class reads
    (
        *("model_max_length", "max_len", "max_length", "padding_side", "truncation_side", "truncation", "padding"),
        *("truncation_strategy", "stride", "pad_to_multiple_of", "pad_token_type_id", "model_input_names"),
        *("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "is_local"),
        *("added_tokens_file", "tokenizer_config_file", "chat_template_file", "local_files_only", "backend"),
        *("files_loaded", "trust_remote_code", "additional_special_tokens_ids", "use_fast", "from_slow", "device_map"),
        *("auto_map", "processor_class", "chat_template", "response_schema", "response_template", "verbose"),
        *("chat_control_tokens", "use_default_system_prompt", "sp_model_kwargs", "spaces_between_special_tokens"),
        *("return_tensors", "return_token_type_ids", "add_generation_prompt", "transformers_version"),
        *("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "vocab_size", "model_type", "max_new_tokens"),
    )
)
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerBase", "PythonBackend")
# The tokenizer class that AutoTokenizer uses for a model type; for some, whatever the folder names.
REGISTERED = {kind: row.tokenizer for kind, row in MODEL_TYPES.items() if row.tokenizer}
_OWN_CLASS_WINS = {kind for kind, row in MODEL_TYPES.items() if row.tokenizer_wins}
_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # candidates if no file names the end token
_BESIDE = (SETTINGS, SPECIAL_MAP, ADDED)
_MAX_ID = (1 << 31) - 1


class HuggingFace(Tokenizer):
    """A tokenizer of the ``tokenizers`` library. ``files``: the content of its folder. Raises DataError if they are
    not a tokenizer or contain unknown keys, ConfigError if the libraries are missing."""

    def __init__(self, files: Mapping[str, bytes], name: str) -> None:
        self._files, self._name, self._known = files, name, _known(files, name)
        self._split = False
        self._clean: Callable[[str], str] = str
        self._names: Mapping[str, str] = {}
        declared = _declared(files, name)
        if any(self._known.values()):
            theirs = _build(files, self._known, name)
            self._model = theirs.backend_tokenizer
            self._names = theirs.special_tokens_map
            ends = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
            self._split = theirs.split_special_tokens
            forced = theirs.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
            if theirs.clean_up_tokenization_spaces and (forced or type(self._model.model).__name__ != "BPE"):
                self._clean = theirs.clean_up_tokenization
        elif JSON not in files:
            raise DataError(f"{name}: nothing says which tokenizer it belongs to ({SETTINGS}: tokenizer_class)")
        else:
            self._model, ends = _raw(files[JSON], name), (None, None, None)
        for text, number in declared.items():
            if (found := self._model.token_to_id(text)) != number:
                raise DataError(f"{name}: {text!a} is to be token {number}, but would be {found}")
        if getattr(self._model.model, "dropout", None):
            raise DataError(f"{name}: its BPE leaves out merges at random (dropout)")
        self._model.no_truncation()
        self._model.no_padding()
        ids = self._model.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if self.vocab_size > _MAX_ID:
            raise DataError(f"{name}: token {self.vocab_size - 1} is too large a token id")
        added = self._model.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in sorted(added.items()) if token.special}
        self.begin, self.end = self._around()
        self.bos_id, self.eos_id, self.pad_id = (-1 if each is None else each for each in ends)
        guess = [text for text in _ENDS if text in self.special]
        if self.eos_id < 0 and len(guess) == 1 and not any("eos_token" in tree for tree in self._known.values()):
            self.eos_id = self.special[guess[0]]

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the post-processor puts before and after a text. The post-processor is then removed, because
        these tokens are not always wanted and it trims spaces from token offsets."""
        whole = self._encoded("a", special=True, whole=True)
        self._model.post_processor = None
        bare = self._encoded("a", special=True).ids
        ids, added = whole.ids, whole.special_tokens_mask
        start = added.index(0) if 0 in added else 0
        stop = start + len(bare)
        if ids[start:stop] != bare or 0 in added[stop:] or any(each >= self.vocab_size for each in ids):
            raise DataError(f"{self._name}: its post-processor does not only put tokens before and after a text")
        return tuple(ids[:start]), tuple(ids[stop:])

    def names(self) -> dict[str, str]:
        return {**super().names(), **self._names}

    @cached_property
    def sha256(self) -> str:  # type: ignore[override]
        """The digest of tokenizer.json, and of the settings if they change the tokens."""
        content = self._files[next(name for name in MAIN if name in self._files)]
        if alone := JSON in self._files:
            alone = not any(self._known.values()) or _essence(_raw(content, JSON)) == _essence(self._model)
        else:
            content += self._files.get(MERGES, b"")
        settings = b"" if alone else json.dumps(self._known, sort_keys=True).encode()
        return hashlib.sha256(content + settings).hexdigest()

    def _encoded(self, text: str, special: bool, whole: bool = False) -> Any:
        self._model.encode_special_tokens = self._split or not special  # the library's name for reading them as text
        with _refused(f"{self._name} cannot encode {text[:30]!a}"):
            return self._model.encode(text, add_special_tokens=whole)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._encoded(text, special).ids

    def encode_documents(self, texts: list[bytes], *, special: bool = False) -> list[np.ndarray]:
        return [np.array(self.encode(text.decode(), special=special), np.int32) for text in texts]

    def encode_spans(self, text: str, *, special: bool = True) -> Encoded:
        found = self._encoded(text, special)
        starts, stops = np.array(found.offsets, np.int64).reshape(-1, 2).T
        return Encoded(np.array(found.ids, np.int64), starts, stops)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._clean(self._model.decode(list(tokens), skip_special_tokens=True))

    def show(self, tokens: Sequence[int]) -> str:
        return self._model.decode(list(tokens), skip_special_tokens=False)


def is_hugging_face(files: Mapping[str, bytes], name: str) -> bool:
    """Whether these files are a Hugging Face tokenizer, not just a sentencepiece model."""
    return (
        JSON in files or MODEL not in files or any(_telling(parse_object(files, file, f"{name}: ")) for file in _BESIDE)
    )


def _telling(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may change the tokens."""
    return {
        key: value
        for key, value in tree.items()
        if not (key in HARMLESS or key.startswith(("_", "unsloth_")))
        and (key in HONOURED or key.endswith("_token") or value not in (None, False, "", [], {}))
    }


def settled(files: dict[str, bytes], config: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """The tokenizer files of a folder, made independent of its ``config.json``: if that decides which class
    transformers uses, tokenizer_config.json is changed to name the class. Raises DataError for invalid JSON."""
    if not files.keys() & {*MAIN} or not is_hugging_face(files, name):
        return files
    tree = parse_object(files, SETTINGS, f"{name}: ")
    told = tree.get("tokenizer_class") or config.get("tokenizer_class")
    kind = config.get("model_type")
    registered = REGISTERED.get(kind) if isinstance(kind, str) else None
    wins = told is None or registered in _GENERIC or kind in _OWN_CLASS_WINS
    wanted = registered if registered and wins and registered != _plain(told) else told
    if wanted in (None, tree.get("tokenizer_class")):
        return files
    wanted = "PreTrainedTokenizerFast" if wanted in _GENERIC else wanted  # its name in every version
    return files | {SETTINGS: json.dumps(tree | {"tokenizer_class": wanted}, indent=2).encode()}


def named(files: dict[str, bytes], kind: str) -> dict[str, bytes]:
    """The files of a tokenizer, for a folder with a model of type ``kind``. If transformers would build a different
    tokenizer for that type, tokenizer_config.json is made to name the generic class."""
    tree = parse_object(files, SETTINGS)
    if JSON not in files or kind not in REGISTERED or tree.get("tokenizer_class"):
        return files
    return files | {SETTINGS: json.dumps(tree | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2).encode()}


def _plain(name: Any) -> str:
    return str(name).removesuffix("Fast")


def _known(files: Mapping[str, bytes], name: str) -> dict[str, dict[str, Any]]:
    """The settings that change the tokens, for each file beside a tokenizer. Raises DataError for unknown keys."""
    found = {file: _telling(parse_object(files, file, f"{name}: ")) for file in _BESIDE}
    for file in (SETTINGS, SPECIAL_MAP):
        if unknown := sorted(key for key in found[file].keys() - HONOURED if not key.endswith("_token")):
            told = ", ".join(map(ascii, unknown))
            raise DataError(f"{name}: {file}: {told}: unknown, and may change the tokens; remove what does not")
        for key, value in found[file].items():
            if not isinstance(value, bool | None if key in FLAGS else object if key in HONOURED else str | dict | None):
                wanted = "true or false" if key in FLAGS else "a token"
                raise DataError(f"{name}: {file}: {key!a}: expected {wanted}, found {json.dumps(value)[:60]}")
    # Token objects carry their type in one of the files, and must not in the other.
    decoder = found[SETTINGS].pop("added_tokens_decoder", None)
    found[SETTINGS] = _typed(found[SETTINGS]) | ({} if decoder is None else {"added_tokens_decoder": decoder})
    more = found[SPECIAL_MAP].get("additional_special_tokens")
    if isinstance(more, list):
        found[SPECIAL_MAP]["additional_special_tokens"] = _typed(more, special=True)
    return found


def _typed(value: Any, **given: bool) -> Any:
    if isinstance(value, dict):
        if isinstance(value.get("content"), str):
            return {**value, **given, "__type": "AddedToken"}
        return {key: _typed(each, **given) for key, each in value.items()}
    return [_typed(each, **given) for each in value] if isinstance(value, list) else value


def _declared(files: Mapping[str, bytes], name: str) -> dict[str, int]:
    """The added tokens to which the files give ids, by text. Raises DataError if they are inconsistent."""
    pairs: list[tuple[Any, Any]] = []
    if JSON in files:
        listed = parse_object(files, JSON, f"{name}: ").get("added_tokens")
        listed = listed if isinstance(listed, list) else []  # the library refuses it later
        pairs += [(each.get("content"), each.get("id")) for each in listed if isinstance(each, dict)]
    tree = parse_object(files, SETTINGS)
    if "added_tokens_decoder" in tree:
        decoder = tree["added_tokens_decoder"]
        if not isinstance(decoder, dict) or not all(isinstance(each, dict) for each in decoder.values()):
            raise DataError(f"{name}: {SETTINGS}: added_tokens_decoder: expected tokens by their numbers")
        pairs += [(each.get("content"), key) for key, each in decoder.items()]
    else:
        pairs += parse_object(files, ADDED).items()
    declared: dict[str, int] = {}
    for text, number in pairs:
        digits = isinstance(number, str) and re.fullmatch(r"\d{1,10}", number, re.ASCII)
        number = int(number) if digits else number
        if not isinstance(text, str) or not text or re.search("[\ud800-\udfff]", text):
            raise DataError(f"{name}: {text!a} is not a valid text of an added token")
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _MAX_ID:
            raise DataError(f"{name}: added token {text!a}: {number!a} is not a token id")
        if declared.setdefault(text, number) != number:
            raise DataError(f"{name}: added token {text!a} has two numbers, {declared[text]} and {number}")
    numbers: dict[int, str] = {}
    for text, number in declared.items():
        if numbers.setdefault(number, text) != text:
            raise DataError(f"{name}: two added tokens, {numbers[number]!a} and {text!a}, have the number {number}")
    return declared


def _raw(content: bytes, name: str) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ConfigError(f"{name}: reading it needs tokenizers: pip install 'megatron_lite[hf]'") from None
    with _refused(f"{name} is not a tokenizer.json"):
        return tokenizers.Tokenizer.from_str(content.decode())


def _build(files: Mapping[str, bytes], known: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """Build the tokenizer with the class that AutoTokenizer would choose (AutoTokenizer itself loads torch)."""
    if JSON not in files and MODEL in files:
        SentencePiece(files[MODEL], name)
    try:
        import transformers
    except ModuleNotFoundError:
        raise ConfigError(f"{name}: its settings need transformers: pip install 'megatron_lite[hf]'") from None
    kind = _class(files, known[SETTINGS].get("tokenizer_class"), name, transformers)
    with tempfile.TemporaryDirectory() as folder:
        for file in files.keys() & {*MAIN, MERGES}:
            Path(folder, file).write_bytes(files[file])
        for file, tree in known.items():
            if tree:
                Path(folder, file).write_text(json.dumps(tree))
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        try:
            with _refused(f"{name}: transformers' {kind.__name__} does not read it"):
                return kind.from_pretrained(folder, local_files_only=True)
        finally:
            transformers.logging.set_verbosity(verbosity)


def _class(files: Mapping[str, bytes], named: Any, name: str, transformers: Any) -> Any:
    backend = getattr(transformers, "TokenizersBackend", None)
    if backend is None:
        raise ConfigError(f"{name}: its settings need transformers 5, this is {transformers.__version__}")
    if named is None or named in _GENERIC or _plain(named) in _GENERIC:
        return backend
    if not isinstance(named, str) or not re.fullmatch(r"\w{1,64}Tokenizer(Fast)?", named, re.ASCII):
        raise DataError(f"{name}: tokenizer_class {json.dumps(named)[:80]} is not one of transformers' tokenizers")
    if _plain(named) == "LlamaTokenizer" and b'"ByteLevel"' in files.get(JSON, b""):
        return backend  # a sentencepiece class with a file that is not: Llama 3
    try:
        found = getattr(transformers, _plain(named), None)
    except Exception as error:  # it needs a package that is not installed
        raise ConfigError(f"{name}: tokenizer_class {named}: {_one_line(error)}") from None
    if found is None:  # transformers uses the generic class for an unknown name
        if parse_object(files, SETTINGS).get("auto_map"):
            raise DataError(f"{name}: tokenizer_class {named} is code of the folder's own, which is never run")
        return backend
    if not isinstance(found, type) or not issubclass(found, backend):
        raise DataError(f"{name}: tokenizer_class {named} is not supported: it is not of the tokenizers library")
    return found


def _essence(model: Any) -> Any:
    """The parts of tokenizer.json that determine the tokens of a text."""
    tree = json.loads(model.to_str(), object_hook=_without_defaults)
    return {key: tree.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}


def _without_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tree.items() if k != "trim_offsets" and v is not None and v is not False and v != ""}


@contextmanager
def _refused(told: str) -> Iterator[None]:
    """Turn any exception of the libraries into a DataError that begins with ``told``."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{told}: {_one_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic in Rust
            raise
        raise DataError(f"{told}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
