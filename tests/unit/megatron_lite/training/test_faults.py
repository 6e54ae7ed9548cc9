"""Faults strike where they are told to, and nowhere else."""

import errno
import signal
import time

import pytest
import torch

from megatron_lite.errors import ConfigError
from megatron_lite.training.faults import Faults


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("explode:rank=1", "unknown kind 'explode', allowed: kill, stop"),
        ("kill:colour=1", "'colour=1' is not one of rank="),
        ("kill:rank", "'rank' is not one of rank="),
        ("kill:step=1:step=2", "'step=2' is not one of"),
        ("kill:step=soon", "step must be a number"),
        ("kill:rank=-1", "rank must not be negative"),
        ("sleep:seconds=nan", "seconds must not be negative"),
        ("kill:phase=forward", "unknown phase 'forward', allowed: fwd, bwd"),
        ("enospc:step=3", "op=N names the file operation"),
        ("kill:op=0", "op=N names the file operation"),
        ("nan:phase=fwd", "nan takes rank, step and attempt only"),
    ],
)
def test_bad_grammar_is_refused_in_one_line(text, complaint):
    with pytest.raises(ConfigError) as refused:
        Faults.parse(f"kill:rank=9;{text}")
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_fault_strikes_its_rank_step_phase_and_attempt_only():
    text = "raise:rank=1:step=7:phase=bwd"
    for other in (Faults.parse(text, rank=0), Faults.parse(text, rank=1, attempt=1), Faults.parse(""), Faults.none()):
        other.at("bwd", 7)
    faults = Faults.parse(text, rank=1)
    faults.at("bwd", 6)
    faults.at("fwd", 7)
    with pytest.raises(RuntimeError, match="injected fault at step 7, bwd"):
        faults.at("bwd", 7)


def test_a_fault_with_a_step_strikes_once_and_one_without_always(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    faults = Faults.parse("sleep:seconds=0.5:phase=fwd ; sleep:seconds=2:phase=fwd:step=1")
    for step in (1, 1, 2):
        faults.at("fwd", step)
    assert slept == [0.5, 2.0, 0.5, 0.5]


def test_file_operations_are_counted_from_the_start_of_each_save():
    faults = Faults.parse("enospc:step=20:op=2")
    for step in (10, 20):
        faults.at("save", step)
        faults.file_operation("write a")
        if step == 10:
            faults.file_operation("write b")
    with pytest.raises(OSError) as full:
        faults.file_operation("write b")
    assert full.value.errno == errno.ENOSPC


def test_nan_poisons_one_loss_and_its_gradient():
    faults = Faults.parse("nan:step=3")
    weight = torch.ones(2, requires_grad=True)
    assert faults.poison(weight.sum(), 2).item() == 2.0
    faults.at("fwd", 3)  # not a phase fault
    loss = faults.poison(weight.sum(), 3)
    loss.backward()
    assert loss.isnan() and weight.grad.isnan().all()
    assert faults.poison(weight.sum(), 3).item() == 2.0


def test_signals_reach_this_process():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        Faults.parse("term:phase=save:step=5").at("save", 5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
