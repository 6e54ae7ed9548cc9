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
    """The checkpoint to resume from: what ``latest`` names if it verifies, else the newest one before it that does. A
    later one than ``latest`` is of a branch that was left, or was committed just before a crash: it is no way back.

    None when there is none at all. Collective over ``world``; every rank verifies a share of each candidate, of which
    ``lazy`` leaves the tensors to ``load``. Rank 0 hands every checkpoint that had to be passed over to ``warn``.

    Raises CheckpointError when there are checkpoints but none is sound: starting afresh must be the user's decision.
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
    """The checkpoint that ``path`` means: itself, or, for a run or its ``checkpoints`` folder, what ``latest`` names.

    Nothing is verified here. Raises CheckpointError when there is no checkpoint.
    """
    if step_of(path.name) is not None or (path / MANIFEST).exists():
        return path
    for folder in (path, path / "checkpoints"):
        step = pointer(folder)
        if step is not None:
            return folder / step_name(step)
    raise CheckpointError(f"{path}: no checkpoint there")


def _candidates(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """The checkpoint that ``latest`` names, then older ones from the last; all, where it names none that is there."""
    steps = committed(folder)
    pointed = pointer(folder)
    if steps and (pointed is None or pointed not in steps):
        warn(f"{folder / LATEST} does not name a checkpoint; looking at all of them")
    limit = pointed if pointed in steps else max(steps, default=0)
    return [path for step, path in steps.items() if step <= limit]


def pointer(folder: Path) -> int | None:
    """The step that ``latest`` names; None if it is missing or anything but the name of a checkpoint."""
    try:
        with (folder / LATEST).open("rb") as file:
            return step_of(file.read(100).decode("ascii").strip())
    except (OSError, UnicodeDecodeError):
        return None


def prune(folder: Path, keep: int, every: int | None = None) -> list[Path]:
    """Delete checkpoints that are no longer wanted, and return which. Single process; call it after a commit.

    Kept are the last ``keep`` up to what ``latest`` names (always itself), every step that ``every`` divides, and
    whatever is newer than ``latest``. Nothing is deleted while ``latest`` names no checkpoint. Raises StorageError.
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
