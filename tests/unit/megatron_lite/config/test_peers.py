"""What others call our keys: every answer is a key that there is, with a value that it takes."""

import re

import pytest

from megatron_lite.config import Config, load_config, parse_config
from megatron_lite.config.peers import _OTHERWISE, _THEIRS, _VALUES, keys, meant, meant_value
from megatron_lite.errors import ConfigError

PATHS = {*Config.model_fields, *keys(Config)}
BASE = {"model": {"vocab_size": 100}, "data": {"train": [{"path": "x"}]}, "init": {"from": "x"}}


def test_the_keys_are_those_of_the_config():
    dumped = parse_config({**BASE, "peft": {"method": "lora"}}).model_dump(mode="json")
    assert {f"{name}.{key}" for name, section in dumped.items() for key in section} <= PATHS
    assert {"train.profile.steps", "launch.ssh.port", "peft.reparameterize", "checkpoint.async"} <= PATHS


@pytest.mark.parametrize("ours", _THEIRS)
def test_every_answer_is_a_key_with_a_value_that_it_takes(ours):
    path, equals, value = ours.partition("=")
    assert path in PATHS
    if equals:
        section, key = path.split(".")
        peft = {"method": "lora"} if section == "peft" else {}
        parse_config({**BASE, section: {**BASE.get(section, {}), **peft, key: value}})


@pytest.mark.parametrize("told", _OTHERWISE.values())
def test_every_explanation_names_keys_that_there_are(told):
    assert set(re.findall(rf"\b(?:{'|'.join(Config.model_fields)})\.[a-z_.]*[a-z]", told)) <= PATHS


@pytest.mark.parametrize("told", _VALUES)
def test_so_do_those_for_values(told):
    assert set(re.findall(r"\b\w+\.\w+", told)) <= PATHS
    assert all(meant_value(name.upper()) == f" ({told})" for name in _VALUES[told].split())


def test_a_name_has_one_meaning_and_none_that_it_has_here():
    names = [name for theirs in (*_THEIRS.values(), *_OTHERWISE) for name in theirs.split()]
    assert len(names) == len(set(names))
    assert all(name not in {*PATHS, *Config.model_fields} and name == name.lower() for name in names)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("learning_rate", "is optim.lr here"),
        ("per-device-train-batch-size", "is train.micro_batch_size here"),
        ("tensor_model_parallel_size", "is parallel.tp here"),
        ("lora_target", "is peft.targets here"),
        ("cutoff_len", "is data.seq_len here"),
        ("seq_len", "is data.seq_len here"),
        ("from", "is init.from here"),
        ("warmup_ratio", "given in steps: optim.warmup_steps"),
    ],
)
def test_answers(name, told):
    assert meant(name) == f" ({told})"
    assert meant("nobodys_name") == ""


def test_in_any_section_and_inside_peft(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {vocab_size: 9, lr: 1}\ndata: {train: [{path: x, lora-rank: 1}]}\n")
    flags = {"peft.method": "lora", "peft.lora_alpha": "3", "training.steps": "3", "launch.slurm.max_steps": "3"}
    with pytest.raises(ConfigError) as refused:
        load_config(str(tmp_path / "c.yaml"), flags)
    assert re.findall(r"^(\S+): unknown key \(is (\S+) here\)", str(refused.value), re.MULTILINE) == [
        ("model.lr", "optim.lr"),
        ("data.train.0.lora-rank", "peft.r"),
        ("peft.lora_alpha", "peft.alpha"),
        ("launch.slurm.max_steps", "train.steps"),
        ("training", "train"),
    ]
