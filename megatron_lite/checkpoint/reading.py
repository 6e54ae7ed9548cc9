"""Reading: every byte of a checkpoint is hashed before it is used or, when a run resumes, while it is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint import manifest as manifest_file
from megatron_lite.checkpoint.commit import STATE, step_of
from megatron_lite.checkpoint.manifest import FileEntry, Manifest
from megatron_lite.checkpoint.shards import Reads, check_pieces, fill, reads
from megatron_lite.checkpoint.storage import agree, amount, open_regular
from megatron_lite.distributed.comm import gather_names
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Piece
from megatron_lite.errors import CheckpointError

_MAX_READ_BYTES = 256 << 20  # limit for a manifest (a million boxes take about 80 MB), state.json or an extra


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be loaded at any layout. ``unhashed``: files that ``load`` verifies as it reads them."""

    path: Path
    manifest: Manifest
    unhashed: frozenset[str] = frozenset()

    @property
    def step(self) -> int:
        """The optimizer step it was saved after."""
        return self.manifest.step

    def state(self) -> dict[str, Any]:
        """The trainer's state beside the tensors."""
        tree = manifest_file.parse_json(self.extra(STATE), self.path / STATE)
        if not isinstance(tree, dict):
            raise CheckpointError(f"{self.path / STATE}: expected an object, found {type(tree).__name__}")
        return tree

    def extra(self, name: str) -> bytes:
        """The content of one of its small files, verified while reading."""
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.path} has no {name}")
        entry, file = self.manifest.files[name], self.path / name
        content = _read(file, entry.size)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise CheckpointError(f"{file} is damaged (its SHA-256 does not agree)")
        return content

    def check(self, pieces: Mapping[str, Piece], world: Axis, *, partial: bool = False) -> None:
        """Refuse what ``load`` would refuse, without reading tensors. Collective over ``world``."""
        names = None if partial else gather_names(pieces, world)
        agree(world, lambda: check_pieces(self.manifest, pieces, names, self.path), self.path)

    def load(self, pieces: Mapping[str, Piece], world: Axis, *, partial: bool = False) -> None:
        """Fill ``pieces`` in place from whatever layout was saved. Collective over ``world``.

        Float dtypes are converted to those of the pieces (fp32 masters into a bf16 model); other dtypes must be equal.
        Every piece must exist in the checkpoint; unless ``partial``, it must hold nothing else. Raises CheckpointError
        on every rank; the pieces may then be partly filled.
        """

        self.check(pieces, world, partial=partial)
        wanted: Reads = {}

        def look() -> dict[str, int]:
            wanted.update(reads(self.manifest, pieces))
            return {file: sum(tile.data.nbytes for *_, tile in some) for file, some in wanted.items()}

        needs = agree(world, look, self.path)
        own = _share({name: self.manifest.files[name] for name in self.unhashed}, needs, world.rank)
        agree(world, lambda: _refuse_damaged(self.path, fill(self.path, self.manifest, wanted, own)), self.path)


def open_checkpoint(path: Path, world: Axis | None = None, *, trust: bool = False, lazy: bool = False) -> Checkpoint:
    """Verify the checkpoint at ``path`` and open it. Collective over ``world``: the ranks share the hashing.

    It costs one full read (SHA-256: 1.5 to 1.8 GB/s for each rank). ``lazy``: files with tensors are hashed later,
    while ``load`` reads them. ``trust``: only check that all files exist with the right sizes; hash nothing. Raises
    CheckpointError on every rank, with one line for each file that is missing, extra, damaged or of the wrong size.
    """
    world = world or Axis("world")

    def verify_share() -> tuple[Manifest, frozenset[str]]:
        manifest = read_manifest(path)
        if problems := _listing_problems(path, manifest):
            raise CheckpointError(f"{path}: {'; '.join(problems)}")
        shards = frozenset(box.file for tensor in manifest.tensors.values() for box in tensor.boxes)
        later = shards if lazy and not trust else frozenset()
        now = {} if trust else {name: entry for name, entry in manifest.files.items() if name not in later}
        _refuse_damaged(path, _damaged(path, _share(now, [{}] * world.size, world.rank)))
        return manifest, later

    return Checkpoint(path, *agree(world, verify_share, path)[world.rank])


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of a checkpoint folder; other files are not looked at."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    file = path / manifest_file.NAME
    try:
        manifest = manifest_file.decode(_read(file, file.lstat().st_size), file)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {manifest_file.NAME} is missing: not a complete checkpoint") from None
    if step_of(path.name) not in (None, manifest.step):
        raise CheckpointError(f"{path}: the checkpoint in this folder is of step {manifest.step}")
    return manifest


def _read(path: Path, size: int) -> bytes:
    if size > _MAX_READ_BYTES:
        raise CheckpointError(f"{path}: {amount(size)} is too large for such a file")
    with open_regular(path) as file:
        return file.read(size)


def _listing_problems(path: Path, manifest: Manifest) -> list[str]:
    """Problems with the folder's listing: missing or extra files, entries that are no files, wrong sizes."""
    found = {entry.name: entry for entry in os.scandir(path)}
    found.pop(manifest_file.NAME)
    problems = [f"{name} is missing" for name in sorted(manifest.files.keys() - found.keys())]
    problems += [f"unexpected file {name!a}" for name in sorted(found.keys() - manifest.files.keys())]
    for name in sorted(found.keys() & manifest.files.keys()):
        size, wanted = found[name].stat(follow_symlinks=False).st_size, manifest.files[name].size
        if not found[name].is_file(follow_symlinks=False):
            problems.append(f"{name} is not a regular file")
        elif size != wanted:
            problems.append(f"{name}: size {size}, expected {wanted}")
    return problems


def _share(files: Mapping[str, FileEntry], needs: Sequence[Mapping[str, int]], rank: int) -> dict[str, FileEntry]:
    """The files that ``rank`` hashes. Files are assigned the largest first, each to a rank that has little to hash so
    far and reads much of the file anyway (``needs``: bytes of each file that a rank reads, by rank)."""
    load = [0] * len(needs)
    share = {}
    for name in sorted(files, key=lambda n: (-files[n].size, n)):
        hasher = min(range(len(needs)), key=lambda r: (load[r] - needs[r].get(name, 0), r))
        load[hasher] += files[name].size
        if hasher == rank:
            share[name] = files[name]
    return share


def _damaged(path: Path, files: Mapping[str, FileEntry]) -> list[str]:
    damaged = []
    for name, entry in files.items():
        with open_regular(path / name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                damaged.append(name)
    return damaged


def _refuse_damaged(path: Path, names: Sequence[str]) -> None:
    if names:
        told = "; ".join(f"{name} is damaged (its SHA-256 does not agree)" for name in names)
        raise CheckpointError(f"{path}: {told}")
