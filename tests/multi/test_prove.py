"""The ``prove`` command's own path, with a bug planted in the second layout."""

import pytest

from megatron_lite.proof.prove import LayoutsDifferError, prove
from megatron_lite.proof.side import parse_side
from tests.kit.parity import Layout
from tests.kit.tiny import tiny_data


def no_sum(trainer):
    """One MLP passes on its partial sum: its all-reduce is missing."""
    down = trainer.model.blocks[1].mlp.down
    down.forward = lambda x, seed: x @ down.weight.t()


def test_a_missing_all_reduce_is_named(tmp_path, capsys):
    config = Layout().config(str(tiny_data(tmp_path)), {})
    sides = [parse_side(text, config, "float64") for text in ("tp=1", "tp=2")]
    with pytest.raises(
        LayoutsDifferError, match=r"first at step 1 in the block outputs of blocks\.1: relative diff"
    ) as e:
        prove(sides, steps=1, timeout=60, prepare_b=no_sum)
    assert e.value.exit_code == 1
    assert "DIFFERS" in capsys.readouterr().out


def no_sum_of_b(trainer):
    """LoRA's replicated factor of a row-parallel linear keeps the gradient of this rank's tokens."""
    trainer.model.blocks[1].mlp.down.replicated = lambda parameter: parameter


def test_a_missing_sum_of_a_lora_factor_is_named(tmp_path, capsys):
    config = Layout().config(str(tiny_data(tmp_path)), {"peft": {"method": "lora"}})
    sides = [parse_side(text, config, "float64") for text in ("tp=1", "tp=2,sp=true")]
    wanted = r"first at step 1 in the gradients of blocks\.1\.mlp\.down\.lora_down_b: relative diff"
    with pytest.raises(LayoutsDifferError, match=wanted):
        prove(sides, steps=1, timeout=60, prepare_b=no_sum_of_b)
    assert "block outputs" in capsys.readouterr().out
