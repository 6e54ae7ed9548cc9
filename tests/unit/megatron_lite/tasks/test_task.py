"""A task of one's own is a class and a line: samples, loss and metrics are then its own, in a whole run."""

import json
import math

import numpy as np
import pytest

from megatron_lite.config import load_config
from megatron_lite.data.batch import IGNORED
from megatron_lite.errors import ConfigError
from megatron_lite.models.head import cross_entropy
from megatron_lite.tasks import TASKS, build_task
from megatron_lite.tasks.task import Task
from tests.kit.alone import run_alone
from tests.kit.tiny import tiny_config, tiny_data


class Echo:
    """Every other token, at random by the sample's position, is to be said again: as many places as tokens."""

    extra = 0

    def __call__(self, tokens, trained, position):
        chosen = np.random.default_rng(position).random(len(tokens)) < 0.5
        return tokens, np.where(chosen, tokens.astype(np.int64), IGNORED)


class Repeating(Task):
    """Say the token that was read: learnt in a few steps."""

    objective = Echo()

    def loss(self, forward, batch, context):
        return forward(batch.tokens, context, cross_entropy(batch.targets, batch.counted))

    def metrics(self, loss):
        return {"validation_bits": loss / math.log(2)}

    def describe(self, metrics):
        return f"bits {metrics['validation_bits']:.2f}"


def test_a_run_learns_and_reports_a_task_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "repeat", f"{__name__}:Repeating")
    config = tiny_config(tmp_path, tiny_data(tmp_path))
    flags = ("train.task=repeat", "train.steps=30", "optim.lr=0.02", "train.eval_every=30", "data.split=[0.9,0.1,0]")
    run, log = run_alone(config, *flags)
    lines = [json.loads(line) for line in (run.config.folder / "metrics.jsonl").read_text().splitlines()]
    bits = [line["validation_bits"] for line in lines if "validation_bits" in line]
    assert len(bits) == 1 and f"bits {bits[0]:.2f}" in log
    assert bits[0] < 0.5 * lines[0]["loss"] / math.log(2)


def test_a_task_that_is_not_there_is_refused_with_the_nearest(tmp_path):
    config = tiny_config(tmp_path, tiny_data(tmp_path))
    told = r"^train\.task: expected 'causal_lm', not 'causal_ml' \(did you mean 'causal_lm'\?\)$"
    with pytest.raises(ConfigError, match=told):
        run_alone(config, "train.task=causal_ml")


def test_a_perplexity_beyond_a_float_is_cut_off(tmp_path):
    task = build_task(load_config(str(tiny_config(tmp_path, tiny_data(tmp_path))), {}))
    assert task.metrics(1.5)["validation_perplexity"] == math.exp(1.5)
    assert task.metrics(800.0) == {"validation_loss": 800.0, "validation_perplexity": math.exp(700)}
