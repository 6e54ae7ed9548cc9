"""Which checkpoint to resume from, and which ones to keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_lite.checkpoint.commit import LATEST, committed, discard, step_name, step_of, warn
from megatron_lite.checkpoint.manifest import NAME as MANIFEST
from megatron_lite.checkpoint.reading import Checkpoint, open_checkpoint
from megatron_lite.checkpoint.storage import storage_errors
from megatron_lite.distributed.comm import gather_objects
from megatron_lite.distributed.mesh import Axis
from megatron_lite.errors import CheckpointError, MegatronLiteError, StorageError


def newest(
    folder: Path, world: Axis, warn: Callable[[str], None] = warn, *, trust: bool = False, lazy: bool = False
) -> Checkpoint | None:
    """The checkpoint to resume from: the one that ``latest`` names if it verifies, else the newest earlier one that
    does. Checkpoints later than ``latest`` are not considered: they belong to an abandoned branch, or were committed
    just before a crash.

    Returns None if there is no checkpoint. Collective over ``world``; every rank verifies a share of each candidate
    (``lazy`` leaves the tensors to ``load``). Rank 0 calls ``warn`` for every checkpoint that is skipped.

    Raises CheckpointError if there are checkpoints but none is intact: starting over must be the user's decision.
    """
    tell = warn if world.rank == 0 else lambda line: None
    problems: list[MegatronLiteError] = []
    for path in gather_objects(_candidates(folder, tell) if world.rank == 0 else None, world)[0]:
        try:
            checkpoint = open_checkpoint(path, world, trust=trust, lazy=lazy)
        except (CheckpointError, StorageError) as error:
            problems.append(error)
            tell(f"passed over a checkpoint: {error}")
        else:
            if problems:
                tell(f"falling back to {checkpoint.path}")
            return checkpoint
    if problems:
        names = [path.name for path in committed(folder).values()][: -len(problems)]
        later = f"; later than {LATEST}, and not tried: {', '.join(names)}" if names else ""
        told = f"none of {len(problems)} checkpoints is sound; the first: {problems[0]}"
        raise CheckpointError(f"{folder}: {told}{later}")
    return None


def find(path: Path) -> Path:
    """The checkpoint at ``path``: itself or, for a run or its ``checkpoints`` folder, the one that ``latest`` names.

    Does not verify it. Raises CheckpointError if there is no checkpoint.
    """
    if step_of(path.name) is not None or (path / MANIFEST).exists():
        return path
    for folder in (path, path / "checkpoints"):
        step = pointer(folder)
        if step is not None:
            return folder / step_name(step)
    raise CheckpointError(f"{path}: no checkpoint there")


def _candidates(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """The checkpoint that ``latest`` names, then older ones, newest first; all of them if ``latest`` names none."""
    steps = committed(folder)
    pointed = pointer(folder)
    if steps and (pointed is None or pointed not in steps):
        warn(f"{folder / LATEST} does not name a checkpoint; looking at all of them")
    limit = pointed if pointed in steps else max(steps, default=0)
    return [path for step, path in steps.items() if step <= limit]


def pointer(folder: Path) -> int | None:
    """The step that ``latest`` names; None if the file is missing or does not hold a checkpoint's name."""
    try:
        with (folder / LATEST).open("rb") as file:
            return step_of(file.read(100).decode("ascii").strip())
    except (OSError, UnicodeDecodeError):
        return None


def prune(folder: Path, keep: int, every: int | None = None) -> list[Path]:
    """Delete checkpoints that are no longer needed, and return them. Single process; call it after a commit.

    Keeps the last ``keep`` checkpoints up to the one that ``latest`` names, every step divisible by ``every``, and all
    that are newer than ``latest``. Deletes nothing if ``latest`` names no checkpoint. Raises StorageError.
    """
    steps = committed(folder)
    pointed = pointer(folder)
    if pointed not in steps:
        return []
    old = [step for step in steps if step <= pointed][max(keep, 1) :]
    doomed = [steps[step] for step in old if not every or step % every]
    with storage_errors(folder):
        for path in doomed:
            discard(path)
    return doomed
