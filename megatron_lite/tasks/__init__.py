"""What a model is trained to do. A new task is a file here and a line in ``TASKS``. No torch in this file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lite.config import Config
    from megatron_lite.tasks.task import Task

TASKS = {"causal_lm": "megatron_lite.tasks.causal_lm:CausalLM"}  # train.task → module:class


def build_task(config: Config) -> Task:
    """The task that ``train.task`` names."""
    module, _, name = TASKS[config.train.task].partition(":")
    task: type[Task] = getattr(import_module(module), name)
    return task(config)
