"""Validation inside a run: what it is over, and that it does not depend on how much is trained on at a time."""

import json

import pytest

from tests.kit.alone import run_alone
from tests.kit.tiny import tiny_config, tiny_data


def validation(run):
    lines = [json.loads(line) for line in (run.config.folder / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


def test_the_loss_does_not_depend_on_the_batch(tmp_path):
    config = tiny_config(tmp_path, tiny_data(tmp_path), train__steps=1, optim__warmup_steps=0)
    frozen = ("optim.lr=1e-30", "train.eval_every=1", "data.split=[0.9,0.1,0]")
    found = []
    for number, (batch, micro, steps) in enumerate([(8, 8, 10), (8, 1, 100), (6, 3, 8), (64, 32, 1), (1, 1, 99)]):
        sizes = (f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}", f"train.eval_steps={steps}")
        run, log = run_alone(config, f"run.name=run{number}", *frozen, *sizes)
        assert "\nvalidation: all 42 windows, each once\n" in log
        found += validation(run)
    assert found == pytest.approx([found[0]] * 5, rel=1e-6) and len(found) == 5
    run, log = run_alone(config, "run.name=some", *frozen, "train.eval_steps=2")
    assert "\nvalidation: the first 16 of 42 windows, each once\n" in log
    assert validation(run)[0] != pytest.approx(found[0], rel=1e-6)
