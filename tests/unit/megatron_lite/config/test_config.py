"""Configs: what is shipped parses, presets have their published sizes, a resolved config reads back as itself."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_lite.config import (
    ModelConfig,
    load_config,
    parse_config,
    parse_model,
    parse_peft,
    parse_yaml,
    read_yaml,
    to_yaml,
    yaml_text,
)
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import spec_of
from megatron_lite.errors import ConfigError
from megatron_lite.models.decoder import Decoder
from megatron_lite.peft.lora import LoRAConfig
from megatron_lite.planning.memory import checkpoint_bytes

CONFIGS = Path(__file__).resolve().parents[4] / "configs"
PUBLISHED = {  # parameters in millions and the vocabulary, from the models' papers and cards
    "gpt2-small": (124.4, 50257),
    "gpt2-xl": (1557.6, 50257),
    "llama-1b": (1235.8, 128256),
    "llama-7b": (6738.4, 32000),
    "llama-8b": (8030.3, 128256),
    "llama-70b": (70553.7, 128256),
}


def json_like(values):
    return st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3)


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.yaml")])
def test_what_is_shipped_parses_and_reads_back_as_itself(name, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {preset: tiny}")
    base = {"init.from": str(tmp_path)} if name == "lora" else {}  # whose sizes come with it
    config = load_config(name, {"model.vocab_size": "1000", **base})
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "resolved.yaml"), {}) == config


@pytest.mark.parametrize(
    ("key", "written"),
    [
        *(("time", text) for text in ("30", "4:00", "4:00:00", "04:00:00", "1-12", "1-12:30", "1-12:30:15", "0")),
        *(("time", text) for text in ("UNLIMITED", "infinite", "-1", "100:00:00", "90:00", "1:30:59")),
        *(("mem", "64"), ("mem", "64G"), ("mem", "0"), ("account", "12345"), ("account", "007"), ("qos", "1_000")),
        *(("constraint", "0x10"), ("partition", "2"), ("gres", "gpu:8"), ("array", "3"), ("array", "0-8:2,11%1")),
    ],
)
def test_what_slurm_is_asked_for_is_what_was_written(key, written, tmp_path):
    text = "model: {{vocab_size: 9}}\ndata: {{train: [{{path: x}}], seq_len: 8}}\nlaunch:\n  slurm:\n    {}\n"
    (tmp_path / "c.yaml").write_text(text.format(f"{key}: {written}\n    signal_seconds: 0"))
    in_yaml = load_config(str(tmp_path / "c.yaml"), {})
    (tmp_path / "c.yaml").write_text(text.format("signal_seconds: 0"))
    typed = load_config(str(tmp_path / "c.yaml"), {f"launch.slurm.{key}": written})
    assert getattr(in_yaml.launch.slurm, key) == getattr(typed.launch.slurm, key) == written
    (tmp_path / "resolved.yaml").write_text(to_yaml(in_yaml))
    assert load_config(str(tmp_path / "resolved.yaml"), {}) == in_yaml


def test_variables_and_resources_may_be_numbers():
    launch = {"env": {"OMP_NUM_THREADS": 8}, "k8s": {"resources": {"nvidia.com/gpu": 8}}}
    tree = {"model": {"vocab_size": 9}, "data": {"train": [{"path": "x"}], "seq_len": 8}}
    config = parse_config({**tree, "launch": launch}).launch
    assert (config.env, config.k8s.resources) == ({"OMP_NUM_THREADS": "8"}, {"nvidia.com/gpu": "8"})
    with pytest.raises(ConfigError, match=r"^launch\.env\.A: this is not a text: write it in quotes, not True"):
        parse_config({**tree, "launch": {"env": {"A": True}}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"time": "4h"}, "time: expected minutes, MM:SS, HH:MM:SS, D-HH, .* or UNLIMITED, not '4h'"),
        ({"time": "1:2:3:4"}, "time: expected minutes"),
        ({"time": ""}, "time: expected minutes"),
        ({"time": 1.5}, r"time: this is not a text: write it in quotes, not 1\.5"),
        ({"mem": True}, "mem: this is not a text: write it in quotes, not True"),
        ({"time": "1:00"}, r"slurm: signal_seconds=120 must be less than time=1:00 \(60 s\); lower it or raise time"),
        ({"time": 10, "signal_seconds": 600}, "slurm: signal_seconds=600 must be less than time=10"),
        ({"signal_seconds": 65536}, "signal_seconds: input should be less than 65536"),
        ({"array": "0-"}, "array: expected tasks as sbatch takes them: 0-4, .*, not '0-'"),
        ({"array": "0-4%0"}, "array: expected tasks"),
        ({"extra": ["mail-type=END"]}, "extra.0: expected an option, as in --name=value, not 'mail-type=END'"),
        ({"srun_extra": ["bind"]}, "srun_extra.0: expected an option"),
    ],
)
def test_what_slurm_would_refuse_or_misread_is_refused(section, message):
    data = {"train": [{"path": "x"}], "seq_len": 8}
    with pytest.raises(ConfigError, match=rf"^launch\.(slurm\.)?{message}"):
        parse_config({"model": {"vocab_size": 9}, "data": data, "launch": {"slurm": section}})


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    millions, vocabulary = PUBLISHED[name]
    config = ModelConfig(**read_yaml(CONFIGS / "models" / f"{name}.yaml"), vocab_size=vocabulary, vocab_multiple=1)
    with torch.device("meta"):
        model = Decoder(config, Axis("tp"), sp=False)
    count = sum(math.prod(spec_of(parameter).shape) for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    whole = parse_config({"model": config.model_dump(), "data": {"train": [{"path": "x"}], "seq_len": 64}})
    assert checkpoint_bytes(whole) == pytest.approx(12 * count, rel=0.01)  # weights and AdamW's moments, float32
    adapted = whole.model_copy(update={"peft": LoRAConfig(method="lora")})
    assert checkpoint_bytes(adapted) == 0  # next to nothing


def test_a_preset_gives_way_to_the_config_and_the_config_to_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {preset: tiny, num_layers: 3, ffn_size: 64}\ndata: {train: [{path: x}]}\n")
    model = load_config(str(tmp_path / "c.yaml"), {"model.vocab_size": "10", "model.ffn_size": "96"}).model
    tiny = read_yaml(CONFIGS / "models" / "tiny.yaml")
    assert (model.hidden_size, model.num_layers, model.ffn_size) == (tiny["hidden_size"], 3, 96)


def test_every_number_of_yaml_and_of_the_command_line_is_the_same_number():
    text = "model: {vocab_size: 1e2}\ndata: {train: [{path: x}]}\noptim: {lr: 1e-4, eps: 1E-08}\n"
    config = parse_config(parse_yaml(text, "c.yaml"))
    assert (config.model.vocab_size, config.optim.lr, config.optim.eps) == (100, 1e-4, 1e-8)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), json_like))
@example(
    ["1e-4", "no", "2026-11-24", "<<", "=", "~", "", ".5", "012", "4:00:00", "a: b", "# c", "\x85\n ", 1e-05, 1e22]
)
def test_what_is_written_as_yaml_is_read_back(value):
    assert yaml_text.load(yaml_text.dump({"key": [value, value]})) == {"key": [value, value]}


def test_sizes_that_follow_from_others_are_filled_in():
    llama, gpt2 = (ModelConfig(family=family, hidden_size=96, num_heads=6) for family in ("llama", "gpt2"))
    assert (llama.head_dim, llama.num_kv_heads, llama.ffn_size, llama.bias, llama.tie_embeddings) == (
        *(16, 6, 256, False, False),
    )
    assert (gpt2.ffn_size, gpt2.bias, gpt2.qkv_bias, gpt2.tie_embeddings) == (384, True, True, True)
    assert ModelConfig(vocab_size=101, vocab_multiple=8).padded_vocab_size == 104


def section(**keys):
    return parse_peft({"method": "lora", **keys}, "here")


MODEL = parse_model({"num_layers": 2}, "here")
UNLIKE = {  # there, here, and what is told
    "the same in other words": (
        section(targets=["blocks.*.attention.q", "v"], r=4, ranks={"v": 2}, dropout=0.1),
        section(targets=["v", "q"], r=2, ranks={"*.q": 4}, base_dtype="nf4"),
        [],
    ),
    "modules": (
        section(targets=["q", "down"]),
        section(targets=["q", "head"]),
        ["peft.targets: blocks.0-1 mlp.down only there", "peft.targets: head only here"],
    ),
    "ranks": (
        section(targets=["q", "v"], ranks={"blocks.1.*": 4}),
        section(targets=["q", "v"]),
        ["peft.r of blocks.1 attention.q, blocks.1 attention.v 4 there, 8 here"],
    ),
    "scale": (
        section(targets=["q"], rslora=True, alpha=3),
        section(targets=["q"]),
        ["peft.rslora True there, False here", "peft.alpha of blocks.0-1 attention.q 3.0 there, 16.0 here"],
    ),
    "method": (
        parse_peft({"method": "prefix"}, ""),
        section(),
        ["peft.method prefix there, lora here"],
    ),
    "a prefix": (
        parse_peft({"method": "prefix", "length": 3}, ""),
        parse_peft({"method": "prefix", "reparameterize": 9}, ""),
        ["peft.length 3 there, 16 here", "peft.reparameterize None there, 9 here"],
    ),
    "an adapter": (
        parse_peft({"method": "adapter", "placement": "parallel"}, ""),
        parse_peft({"method": "adapter", "base_dtype": "bfloat16"}, ""),
        ["peft.placement parallel there, houlsby here"],
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_adapters_that_are_not_alike(case):
    there, here, told = UNLIKE[case]
    assert here.differences(there, MODEL) == told
