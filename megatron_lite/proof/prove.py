"""The equivalence prover: train the same steps under two layouts and compare everything that should be equal.

Each layout really runs, as processes on this machine over gloo, from the same seed and the same global batches.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from megatron_lite.cli import several
from megatron_lite.config import Config
from megatron_lite.distributed.mesh import build_mesh
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.errors import MegatronLiteError
from megatron_lite.planning.plan import make_plan
from megatron_lite.proof.record import FLOORS, TOLERANCES, Record, Row, compare, record
from megatron_lite.proof.side import Side
from megatron_lite.training.step import Trainer


class LayoutsDifferError(MegatronLiteError):
    """The two layouts do not compute the same training run."""

    exit_code = 1


def prove(
    sides: Sequence[Side],
    steps: int,
    tolerance: float | None = None,
    *,
    timeout: float = 600.0,
    prepare_b: Callable[[Trainer], None] | None = None,
) -> list[Row]:
    """Run both sides and compare them; prints a table. ``tolerance`` None: that of the dtype (``TOLERANCES``).

    Raises LayoutsDifferError naming the first tensor beyond it. ``prepare_b`` may change the second side's trainer.
    """
    dtype = sides[0].config.train.precision
    # Muon orthogonalises in bfloat16 for every dtype.
    muon = dtype == "float32" and sides[0].config.optim.name == "muon"
    judged_as = "bfloat16" if muon else dtype
    limit = TOLERANCES[judged_as] if tolerance is None else tolerance
    console = Console(width=None if sys.stdout.isatty() else 120)  # a log must not truncate names
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mlite-prove-") as folder:
        for label, side, prepare in zip("ab", sides, (None, prepare_b), strict=True):
            console.print(
                f"{label}: {side.name or 'tp=1'} on {side.ranks} rank{'s'[: side.ranks > 1]} …", highlight=False
            )
            into = Path(folder) / label
            into.mkdir()
            run_ranks(_record_rank, side.ranks, side.config, steps, str(into), prepare, timeout=timeout)
        for step in range(1, steps + 1):
            ours, theirs = (_load(Path(folder) / label / f"step_{step}.safetensors") for label in "ab")
            rows += compare(ours, theirs, step, limit, FLOORS[judged_as])
    console.print(_table(rows, sides, limit))
    for row in rows:
        if row.first_beyond is not None:
            name, difference = row.first_beyond
            raise LayoutsDifferError(
                f"the layouts differ: first at step {row.step} in the {row.kind} of {name}: "
                f"relative difference {difference:.3g}, tolerance {limit:g}"
            )
    how = f"equal within {limit:g} over {several(steps, 'step')} in {dtype}"
    console.print(f"{how} (Muon's updates in bfloat16)" if muon else how, highlight=False)
    console.print(
        f"differences are relative to a tensor's largest element or, if greater, to {FLOORS[judged_as]:g} of the "
        "largest of its kind; optimizers start with non-zero moments, which keep them from amplifying the rounding of "
        "near-zero gradients",
        highlight=False,
        style="dim",
    )
    return rows


def _table(rows: list[Row], sides: Sequence[Side], limit: float) -> Table:
    table = Table(title=f"{sides[0].name}  against  {sides[1].name}")
    for column in ("step", "what", "largest relative difference", "in", ""):
        table.add_column(column, justify="right" if column in ("step", "largest relative difference") else "left")
    for row in rows:
        verdict = "[green]equal[/green]" if row.first_beyond is None else "[red]DIFFERS[/red]"
        table.add_row(str(row.step), row.kind, f"{row.difference:.2e}", row.tensor, verdict)
    return table


def _record_rank(
    rank: int, size: int, config: Config, steps: int, folder: str, prepare: Callable[[Trainer], None] | None
) -> None:
    mesh = build_mesh(make_plan(config, size).degrees, torch.device("cpu"))
    assert mesh is not None
    for step, noted in enumerate(record(config, mesh, steps, prepare), start=1):
        if rank == 0:
            # safetensors sorts by name, so the order of computation goes into the names.
            numbered = {f"{i:06d} {name}": tensor.contiguous() for i, (name, tensor) in enumerate(noted.items())}
            save_file(numbered, Path(folder) / f"step_{step}.safetensors")


def _load(path: Path) -> Record:
    return {name.split(" ", 1)[1]: tensor for name, tensor in sorted(load_file(path).items())}
