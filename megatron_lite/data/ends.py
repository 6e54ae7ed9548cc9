"""Which tokens end a text: those named by a model's files, and those that end the answers in its tuning data.

They are stored in ``generation_config.json``, where every library looks for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_lite.data.tokenizer import GENERATION, MAIN, Tokenizer, parse_object, read_tokenizer
from megatron_lite.errors import DataError


def named_ends(files: Mapping[str, bytes]) -> list[int]:
    """The end tokens in the ``generation_config.json`` among a model's small files. Raises DataError."""
    named = parse_object(files, GENERATION).get("eos_token_id")
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return check_ends(listed, f"{GENERATION}: eos_token_id")


def ends(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> set[int]:
    """The tokens that end a text: the tokenizer's own, and those that the model's files name. Raises DataError."""
    return {token for token in (tokenizer.eos_id, *named_ends(files)) if token >= 0}


def check_ends(ids: Any, where: str) -> list[int]:
    """Validate a list of token ids found in ``where``; -1 means none. Raises DataError."""
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise DataError(f"{where}: expected token ids, found {ids!a:.100}")
    return [token for token in ids if token >= 0]


def tokenizer_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The bos, eos and pad tokens that a tokenizer has, by their names in such a config."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {name: token for name, token in ids.items() if token >= 0}


def with_ends(files: Mapping[str, bytes], more: Iterable[int]) -> dict[str, bytes]:
    """A model's small files, with the tokens ``more`` added to its end tokens. Raises DataError."""
    added = list(more)
    if not added:
        return dict(files)
    if GENERATION in files:
        tree, own = parse_object(files, GENERATION), named_ends(files)
    else:
        tree = tokenizer_ids(read_tokenizer(files, "the tokenizer")) if files.keys() & {*MAIN} else {}
        own = [tree["eos_token_id"]] if "eos_token_id" in tree else []
    ends = list(dict.fromkeys([*own, *added]))
    if ends == own:
        return dict(files)
    return {**files, GENERATION: json.dumps({**tree, "eos_token_id": ends}, indent=2).encode()}
