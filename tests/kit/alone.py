"""A run of a single rank inside this process: what it does and says, without the start of one."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from megatron_lite.config import load_config
from megatron_lite.distributed.env import Rank
from megatron_lite.distributed.mesh import solo_mesh
from megatron_lite.planning.plan import make_plan
from megatron_lite.training.lifetime import StopRequest
from megatron_lite.training.run import Run
from megatron_lite.training.watchdog import Watchdog


def run_alone(config: Path, *flags: str, faults: str = "") -> tuple[Run, str]:
    """Train to the end; the run and its log. ``flags``: as ``train.steps=3``."""
    checked = load_config(str(config), dict(cast(tuple[str, str], flag.split("=", 1)) for flag in flags))
    (checked.folder / "logs").mkdir(parents=True, exist_ok=True)
    logger, log = logging.getLogger("megatron_lite"), io.StringIO()
    handler, level = logging.StreamHandler(log), logger.level
    mesh, rank, stop = solo_mesh(), Rank(faults=faults), cast(StopRequest, SimpleNamespace(asked=False))
    with contextlib.ExitStack() as stack:
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        logger.setLevel(logging.INFO)
        stack.callback(logger.setLevel, level)
        stack.callback(gc.enable)  # which a run does for itself
        watchdog = stack.enter_context(contextlib.closing(Watchdog(checked.folder / "logs", rank, mesh, 60)))
        run = Run(checked, make_plan(checked, 1), rank, mesh, stop, watchdog)
        stack.callback(run.close)
        run.loop()
    return run, log.getvalue()


def moments_step(run: Run) -> set[float]:
    """How many updates AdamW believes to have made, of all its parameters."""
    state: Any = run.trainer.engine.optimizer.state
    return {float(one["step"]) for one in state.values()}
