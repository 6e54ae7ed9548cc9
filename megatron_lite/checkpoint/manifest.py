"""The manifest of a checkpoint: its tensors, the files that hold their parts, and the digest of every file.

It names no rank and no layout. A tensor is the union of boxes (rectangles of the global tensor). A box lies in one
safetensors file, under a key made of the tensor's name and the box's origin. Before the manifest is used, its own
digest is verified and every field is checked, because anyone who can write the folder can also compute a digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_lite.errors import CheckpointError

NAME = "manifest.json"
# As safetensors spells them.
ITEM_SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
_TAIL = re.compile(rb',"sha256":"([0-9a-f]{64})"}\n')
_TAIL_BYTES = 78

Size = Annotated[int, Field(ge=0, lt=1 << 53)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A safe file name: no separator, no leading dot, no control characters.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}$")]
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/\-]{1,400}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileEntry(_Entry):
    """Size in bytes and SHA-256 of one file."""

    size: Size
    sha256: Digest


class BoxEntry(_Entry):
    """One rectangle of a tensor, and the file it lies in."""

    file: FileName
    offset: list[Size]
    shape: list[Size]

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rectangle alone."""
        return tuple(self.offset), tuple(self.shape)


class TensorEntry(_Entry):
    """A global tensor; its boxes cover it exactly once."""

    dtype: str
    shape: list[Size]
    boxes: list[BoxEntry]

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return ITEM_SIZES[self.dtype]

    def key(self, name: str, box: BoxEntry) -> str:
        """The name of the box in its safetensors file."""
        return name if box.shape == self.shape else f"{name}@{','.join(map(str, box.offset))}"

    def problem(self) -> str:
        """What is wrong with this entry, or an empty string."""
        if self.dtype not in ITEM_SIZES:
            return f"unknown dtype {self.dtype!r}"
        if math.prod(self.shape) >= 1 << 53:
            return f"shape {self.shape} is impossibly large"
        return tiling_problem(self.shape, self.boxes)


class Manifest(_Entry):
    """The content of a checkpoint folder, except the manifest itself."""

    format: Literal["megatron_lite"] = "megatron_lite"
    version: Literal[1] = 1
    step: Size
    tensors: dict[TensorName, TensorEntry]
    files: dict[FileName, FileEntry]


def tiling_problem(shape: Sequence[int], boxes: Sequence[BoxEntry]) -> str:
    """Why ``boxes`` do not cover a tensor of ``shape`` exactly once, or an empty string."""
    for box in boxes:
        inside = len(box.offset) == len(box.shape) == len(shape) and all(
            n > 0 and offset + n <= size for offset, n, size in zip(box.offset, box.shape, shape, strict=True)
        )
        if not inside:
            return f"box at {box.offset} of shape {box.shape} is not inside {list(shape)}"
    covered, wanted = sum(math.prod(box.shape) for box in boxes), math.prod(shape)
    if covered != wanted:
        return f"its boxes hold {covered} elements, the tensor {wanted}"
    if len(boxes) > 1:
        # Equal volume without overlap is an exact cover. A sweep along the most divided dim compares few boxes at a
        # time.
        dim = max(range(len(shape)), key=lambda d: len({box.offset[d] for box in boxes}))
        in_sight: list[BoxEntry] = []
        for box in sorted(boxes, key=lambda b: b.offset[dim]):
            in_sight = [other for other in in_sight if other.offset[dim] + other.shape[dim] > box.offset[dim]]
            if any(overlap(box, other) is not None for other in in_sight):
                return f"boxes overlap at {box.offset}"
            in_sight.append(box)
    return ""


def overlap(a: Any, b: Any) -> list[tuple[int, int]] | None:
    """The intersection of two boxes as (start, stop) for each dim in global coordinates, or None."""
    found = []
    for a_start, a_size, b_start, b_size in zip(a.offset, a.shape, b.offset, b.shape, strict=True):
        start, stop = max(a_start, b_start), min(a_start + a_size, b_start + b_size)
        if start >= stop:
            return None
        found.append((start, stop))
    return found


def encode(manifest: Manifest) -> bytes:
    """The file's bytes: JSON whose last member is the SHA-256 of all bytes before it."""
    raw = json.dumps(manifest.model_dump(), sort_keys=True, separators=(",", ":")).removesuffix("}").encode()
    return raw + b',"sha256":"%s"}\n' % hashlib.sha256(raw).hexdigest().encode()


def decode(raw: bytes, path: Path) -> Manifest:
    """Check and read the bytes of the manifest at ``path``; nothing is parsed before its digest agrees.

    Raises CheckpointError naming the field.
    """
    tail = _TAIL.fullmatch(raw[-_TAIL_BYTES:])
    if tail is None or hashlib.sha256(raw[:-_TAIL_BYTES]).hexdigest().encode() != tail[1]:
        raise CheckpointError(f"{path}: damaged (its SHA-256 does not agree)")
    tree = parse_json(raw[:-_TAIL_BYTES] + b"}", path)
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(ascii(part).strip("'") for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from None
    if NAME in manifest.files:
        raise CheckpointError(f"{path}: files.{NAME}: a manifest cannot list itself")
    for name, tensor in manifest.tensors.items():
        if problem := tensor.problem():
            raise CheckpointError(f"{path}: tensors.{name}: {problem}")
        if stray := {box.file for box in tensor.boxes} - manifest.files.keys():
            raise CheckpointError(f"{path}: tensors.{name}: {min(stray)} is not among the files")
    return manifest


def parse_json(raw: bytes, path: Path) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN, limited nesting. Raises CheckpointError."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"duplicate key {Counter(key for key, _ in pairs).most_common(1)[0][0]!a}")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")
