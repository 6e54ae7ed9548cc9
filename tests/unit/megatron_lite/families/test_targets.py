"""What users call the linears of a model, and what they are told when there is none of that name."""

import subprocess
import sys

import pytest

from megatron_lite.config import parse_config
from megatron_lite.errors import ConfigError
from megatron_lite.families import targets
from megatron_lite.peft import METHODS


def config(peft, **model):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 12, "max_seq_len": 64}
    tree = {"model": {**sizes, **model}, "data": {"train": [{"path": "x"}], "seq_len": 32}, "peft": peft}
    return parse_config(tree)


def matched(patterns, **model):
    asked = config({"method": "lora", "targets": patterns}, **model)
    return asked.peft.matched(asked.model)


def test_short_names_globs_and_everything():
    assert matched(["q", "head"]) == [f"blocks.{i}.attention.q" for i in range(12)] + ["head"]
    assert matched(["blocks.[0-1].mlp.*"]) == [f"blocks.{i}.mlp.{x}" for i in (0, 1) for x in ("gate", "up", "down")]
    assert len(matched(["*"])) == 12 * 7 + 2
    assert len(matched(["up"], family="gpt2")) == 12
    default = config({"method": "lora"}, family="gpt2")  # which has no gate
    assert len(default.peft.matched(default.model)) == 12 * 6


def test_the_first_pattern_that_matches_gives_r_and_alpha():
    lora = config({"method": "lora", "ranks": {"blocks.0.*": 2, "q": 4}, "alphas": {"q": 8}, "alpha": 32, "r": 16}).peft
    names = ("blocks.0.attention.q", "blocks.1.attention.q", "blocks.1.mlp.up")
    assert [lora.rank_of(name) for name in names] == [2, 4, 16]
    assert [lora.scale_of(name) for name in names] == [4.0, 2.0, 2.0]
    assert lora.model_copy(update={"rslora": True}).scale_of(names[2]) == 8.0


@pytest.mark.parametrize(
    ("peft", "model", "told"),
    [
        (
            {"targets": ["qq", "q"]},
            {},
            r"peft\.targets: 'qq' matches no module \(did you mean 'q'\?\); there are embedding",
        ),
        (
            {"targets": ["gate"]},
            {"family": "gpt2"},
            r"peft\.targets: 'gate' matches no module.*; there are embedding, q, k",
        ),
        ({"targets": ["blocks.12.*"]}, {}, r"'blocks\.12\.\*' matches no module"),
        (
            {"targets": ["q"], "ranks": {"k": 4}},
            {},
            r"peft\.ranks: 'k' matches no module; there are q, or full names",
        ),
        (
            {"targets": ["head"]},
            {"tie_embeddings": True},
            r"peft\.targets: head: with model\.tie_embeddings embedding and head share one tensor",
        ),
        ({"targets": ["head"], "dora": True}, {}, r"peft\.dora: head: only linears inside the blocks"),
        ({"method": "prefix", "length": 40}, {}, r"peft\.length=40 \+ data\.seq_len=32 = 72 positions exceed"),
        ({"method": "adapter", "sise": 8}, {}, r"peft\.sise: unknown key \(did you mean 'size'\?\); known: base_dtype"),
        ({"method": "lroa"}, {}, rf"peft\.method: expected {', '.join(METHODS)}, not 'lroa' \(did you mean 'lora'\?\)"),
        ({"method": "lora", "dropout": 1}, {}, r"peft\.dropout: input should be less than 1"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(peft, model, told):
    with pytest.raises(ConfigError, match=told):
        config({"method": "lora", **peft}, **model)


def test_a_missing_method_is_asked_for():
    with pytest.raises(ConfigError, match=rf"^peft\.method: missing; one of {', '.join(METHODS)}$"):
        config({"r": 8})


def test_no_torch_is_needed_to_say_so():
    code = "import sys, megatron_lite.config, megatron_lite.families.targets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_log_names_each_kind_once():
    names = [f"blocks.{i}.attention.q" for i in (0, 1, 2, 5)] + ["head"]
    assert targets.summary(names) == ["blocks.0-2,5 attention.q", "head"]
