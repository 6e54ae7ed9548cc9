"""Saving: a checkpoint appears complete, under its final name, or not at all.

``step_N.tmp-<nonce>/`` is written and fsynced by every rank, signed by a manifest, renamed to ``step_N``, and only then
named by ``latest`` (docs/adr/0002). A power cut after any of these steps leaves a consistent folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_lite.checkpoint import manifest as manifest_file
from megatron_lite.checkpoint import shards
from megatron_lite.checkpoint.manifest import BoxEntry, FileEntry, Manifest, TensorEntry
from megatron_lite.checkpoint.storage import (
    agree,
    disk_full,
    free_space,
    nonce,
    open_folder,
    rename,
    replace_file,
    storage_errors,
    sync_folder,
    write_file,
)
from megatron_lite.distributed.comm import gather_objects
from megatron_lite.distributed.mesh import Axis
from megatron_lite.errors import StorageError
from megatron_lite.training.faults import Faults

STATE = "state.json"
LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,12})")
_RESERVE = 1 << 20  # spare bytes for the manifest, file system metadata and logs


def save(
    folder: Path,
    step: int,
    pieces: Mapping[str, shards.Piece],
    state: Mapping[str, Any],
    extras: Mapping[str, bytes],
    world: Axis,
    faults: Faults,
) -> Path:
    """Commit a checkpoint of ``step`` in ``folder`` and return its path. Collective over ``world``.

    ``pieces``: this rank's parts of the global tensors; together the ranks hold every element. ``state`` (JSON) and
    ``extras`` (file name: content) are taken from rank 0. Extra memory: one box at most, if it is strided or on a
    device.

    Raises StorageError on every rank if any of them cannot write. Then nothing of the attempt remains, and earlier
    checkpoints are untouched.
    """
    faults.at("save", step)
    layout = arrange([shards.holdings(pieces)], world)
    return write(folder, step, layout, shards.reader(pieces), state, extras, world, faults)


class Layout(NamedTuple):
    """Which box goes into which file, the files that this rank writes, and the total number of bytes."""

    tensors: dict[str, TensorEntry]
    own: dict[str, shards.ShardFile]
    size: int


def arrange(held: list[dict[str, shards.Holding]], world: Axis) -> Layout:
    """Decide which rank writes what. ``held``: candidates for each of the files that this rank writes. Collective."""
    told = gather_objects(held, world)
    tensors = shards.plan([holdings for some in told for holdings in some])
    files = {name: shards.shard_file(tensors, name) for name in map(shards.shard_name, range(sum(map(len, told))))}
    first = sum(map(len, told[: world.rank]))
    own = {name: file for i in range(len(held)) if (file := files[name := shards.shard_name(first + i)])}
    return Layout(tensors, own, sum(file.size for file in files.values() if file))


def write(
    folder: Path,
    step: int,
    layout: Layout,
    read: Callable[[str, BoxEntry], Iterable[Any]],
    state: Mapping[str, Any],
    extras: Mapping[str, bytes],
    world: Axis,
    faults: Faults,
) -> Path:
    """The writing part of ``save``: ``read`` yields the bytes of a box when it is written."""
    small = {STATE: json.dumps(state, allow_nan=False, indent=1).encode(), **extras}
    need = layout.size + sum(map(len, small.values())) + _RESERVE
    temporary = folder / f"{step_name(step)}.tmp-{gather_objects(nonce(), world)[0]}"
    lead = world.rank == 0

    def begin() -> None:
        if not folder.is_dir():
            raise StorageError(f"{folder}: no such directory")
        if free_space(folder) < need:
            raise disk_full(folder, need)
        if lead:
            temporary.mkdir()
            at_work.enter_context(open_folder(temporary, lock=True))

    def write_own() -> dict[str, FileEntry]:
        return {name: write_file(temporary / name, file.chunks(read), faults) for name, file in layout.own.items()}

    def commit() -> None:
        entries = {name: entry for part in written for name, entry in part.items()}
        for name, content in small.items():
            entries[name] = write_file(temporary / name, [content], faults)
        signed = manifest_file.encode(Manifest(step=step, tensors=layout.tensors, files=entries))
        write_file(temporary / manifest_file.NAME, [signed], faults)
        sync_folder(temporary, faults)
        _put_in_place(temporary, folder / step_name(step), faults)

    try:
        with contextlib.ExitStack() as at_work:
            agree(world, begin, folder, need)
            written = agree(world, write_own, folder, need)
            agree(world, commit if lead else lambda: None, folder, need)
    except BaseException:
        if lead:
            with contextlib.suppress(OSError):
                _remove_leftovers(folder)
        raise
    return folder / step_name(step)


def _put_in_place(temporary: Path, final: Path, faults: Faults) -> None:
    """Give a finished checkpoint its name and point ``latest`` at it."""
    replaced = final.with_name(f"{final.name}.old-{nonce()}")
    if os.path.lexists(final):  # a damaged checkpoint of a step that was reached again
        rename(final, replaced, faults)  # _remove_leftovers restores it if the next rename never happens
    rename(temporary, final, faults)
    sync_folder(final.parent, faults)
    replace_file(final.with_name(LATEST), f"{final.name}\n".encode(), faults)
    if os.path.lexists(replaced):
        try:
            discard(replaced)
        except OSError as error:  # the new checkpoint is in place; the old one is a leftover
            warn(f"{error.filename or replaced} could not be removed: {error.strerror}")


def prepare(folder: Path, world: Axis) -> None:
    """Prepare ``folder`` before a run: check that it is writable and shared by all ranks, and remove leftovers.

    A folder that a live process is writing is left alone. Collective; raises StorageError on every rank.
    """
    shared = folder / f".probe.{gather_objects(nonce(), world)[0]}"
    own = shared.with_name(f"{shared.name}.{world.rank}")

    def write_shared() -> None:
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            write_file(shared, [b"probe"], Faults.none())

    def write_own() -> None:
        if not shared.exists():
            raise StorageError(f"{folder}: not shared by all ranks: what rank 0 wrote there is not seen everywhere")
        write_file(own, [b"probe"], Faults.none())
        own.unlink()

    agree(world, write_shared, folder)
    agree(world, write_own, folder)
    if world.rank == 0:
        with storage_errors(folder):
            shared.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Delete leftovers of interrupted saves and undo half-made swaps. Files that a live process is writing stay; files
    that cannot be removed stay, too, with a warning."""
    for path in list(folder.iterdir()):
        name, _, kind = path.name.partition(".")
        swapped = step_of(name) is not None and kind.startswith(("old-", "tmp-"))
        if not swapped and not path.name.startswith((".probe.", f".{LATEST}.")):
            continue
        try:
            if kind.startswith("old-") and not (folder / name).exists():
                path.rename(folder / name)
                continue
            with open_folder(path, lock=True) if _is_folder(path) else contextlib.nullcontext():
                _remove(path)
        except BlockingIOError:
            continue
        except OSError as error:
            warn(f"{error.filename or path} is left over, and could not be removed: {error.strerror}")


def warn(line: str) -> None:
    """Print a warning."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def discard(path: Path) -> None:
    """Delete a checkpoint; an interruption at any point leaves nothing that looks like one."""
    doomed = path.with_name(f"{path.name.partition('.')[0]}.tmp-{nonce()}")
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def step_name(step: int) -> str:
    """The folder name of a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint folder's name, or None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def committed(folder: Path) -> dict[int, Path]:
    """The committed checkpoints in a folder by step, the last first. Links are not followed."""
    found = []
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                step = step_of(entry.name)
                if step is not None and entry.is_dir(follow_symlinks=False):
                    found.append((step, Path(entry.path)))
    return dict(sorted(found, reverse=True))
