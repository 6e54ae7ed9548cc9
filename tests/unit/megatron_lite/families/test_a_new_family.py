"""One file and one line make a family (``tests/kit/plain.py``): whatever depends on a model's shape derives from it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_lite
from megatron_lite.families import FAMILIES
from tests.kit.tiny import tiny_config, tiny_data

PROGRAM = """
import json, sys
from pathlib import Path
import tests.kit.plain
from megatron_lite.config import load_config, parse_model
from megatron_lite.errors import MegatronLiteError
from megatron_lite.families import targets
from megatron_lite.planning import checks, memory

config = Path(sys.argv[1])
run, tuned, out = (config.parent / name for name in ("run", "tuned", "out"))
checked = load_config(str(config), {})
model = checked.model

def error(call, *args):
    try:
        call(*args)
    except MegatronLiteError as error:
        return str(error)

def by_hand(weights, tokens, eps):
    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"])

    def normed(name, x):
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], eps)

    x = weights["embedding.weight"][tokens] + weights["positions.weight"][: tokens.shape[1]]
    for i in range(2):
        qkv = linear(f"blocks.{i}.attention.qkv", normed(f"blocks.{i}.attention_norm", x))
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in qkv.chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(f"blocks.{i}.attention.out", heads)
        up = linear(f"blocks.{i}.mlp.up", normed(f"blocks.{i}.mlp_norm", x))
        x = x + linear(f"blocks.{i}.mlp.down", F.gelu(up, approximate="tanh"))
    return linear("head", normed("norm", x))

found = {"section": model.model_dump(include={"ffn_size", "bias", "qkv_bias", "tie_embeddings", "num_kv_heads"})}
found["unknown"] = error(parse_model, {"family": "plane", "vocab_size": 64}, "here")
found["degrees"] = checks.degrees_that_fit(model, 8)
found["not packed"] = checks.packing_mistakes(model, 1, "nf4")
found["bytes"] = memory.checkpoint_bytes(checked)
found["names"] = targets.linear_names(model)
found["torch"] = "torch" in sys.modules

import torch
import torch.nn.functional as F
from megatron_lite import convert
from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.checkpoint.formats.megatron_args import from_args
from megatron_lite.checkpoint.tensor_file import TensorFile
from megatron_lite.training.report import flops_per_token
from tests.kit.alone import run_alone

found["flops"] = [flops_per_token(model, 32), flops_per_token(model, 32, frozen=True)]
trained, _ = run_alone(config)
weights = dict(trained.trainer.model.named_parameters())
found["elements"] = sum(weight.numel() for weight in weights.values())
tokens = torch.arange(12).unsqueeze(0) * 7 % 64
with torch.no_grad():
    logits, want = trained.trainer.model(tokens), by_hand(weights, tokens, model.norm_eps)[:, -1]
    found["gap"] = ((logits[:, :64] - want[:, :64]).abs().max() / want.abs().max()).item()
convert.export_hf(run, out, "stored", 1 << 30, trust=False)
found["config.json"] = json.loads((out / "config.json").read_text())
found["exported"] = {n: list(i.shape) for n, i in TensorFile(out / "model.safetensors").tensors.items()}
convert.import_hf(out, config.parent / "again", 1, 128)
convert.diff(run, config.parent / "again", 0.0, trust=False)
flags = ("run.name=tuned", f"init.from={out}", "peft.method=lora", "train.steps=2")
found["adapted"] = sorted(n for n in run_alone(config, *flags)[0].trainer.engine.pieces() if n.endswith("_b"))
convert.merge_adapter(tuned, config.parent / "merged", None, "ours", "stored", unmerge=False, trust=False)
sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "padded_vocab_size": 128}
args = {**sizes, "normalization": "RMSNorm", "bias_gelu_fusion": True}
found["megatron"] = from_args(args, Path("there"), None)[0]["family"]
print()
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process says that has the family."""
    folder = tmp_path_factory.mktemp("plain")
    changes = {"model__family": "plain", "model__init_std": 0.3, "train__steps": 1, "optim__warmup_steps": 0}
    config = tiny_config(folder, tiny_data(folder), **changes)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_config_knows_its_name_and_defaults_without_torch(found):
    assert not found["torch"]
    sizes = {"num_kv_heads": 4, "ffn_size": 96, "bias": False, "qkv_bias": False, "tie_embeddings": False}
    assert found["section"] == sizes
    told = "model.family: expected 'llama', 'gpt2' or 'plain', not 'plane' (did you mean 'plain'?)"
    assert found["unknown"] == f"here: {told}"


def test_sizes_and_costs_derive_from_its_linears(found):
    block = 3 * 32 * 32 + 32 * 32 + 96 * 32 + 32 * 96  # q, k, v; o; up, without a gate; down
    outside = 32 * (128 + 128 + 32)  # embedding, head, positions
    assert found["elements"] == 2 * block + outside + 5 * 32
    assert found["bytes"] == (2 * block + outside) * 3 * 4  # weights and two moments
    weights, scores = 2 * block + 64 * 32, 6 * 2 * 32 * 32
    assert found["flops"] == [6 * weights + scores, 4 * weights + scores]
    assert found["degrees"] == [1, 2, 4]
    odd = [line.split()[1] for line in found["not packed"]]
    assert odd == ["attention.qkv", "attention.o", "mlp.up", "mlp.down"]


def test_its_block_computes_what_its_switches_say(found):
    assert found["gap"] < 1e-5


def test_adapters_know_its_linears(found):
    inside = [*(f"attention.{x}" for x in "qkvo"), "mlp.up", "mlp.down"]
    assert found["names"] == ["embedding", *(f"blocks.{i}.{name}" for i in (0, 1) for name in inside), "head"]
    held = {"qkv": "qkv", "out": "o"}
    adapted = [f"attention.{linear}.lora_{x}_b" for linear, parts in held.items() for x in parts]
    adapted += ["mlp.up.lora_up_b", "mlp.down.lora_down_b"]
    assert found["adapted"] == sorted(f"model.blocks.{i}.{name}" for i in (0, 1) for name in adapted)


def test_it_is_exported_under_its_names_and_found_by_them(found):
    sizes = {"vocab_size": 64, "width": 32, "depth": 2, "heads": 4, "kv_heads": 4, "ffn": 96, "length": 32}
    config = {"architectures": ["PlainForCausalLM"], "model_type": "plain", "act": "gelu_tanh", **sizes}
    assert config.items() <= found["config.json"].items()
    block = {"norm_1": [32], "norm_2": [32], **{x: [32, 32] for x in "qkvo"}, "fc_1": [96, 32], "fc_2": [32, 96]}
    outside = {"plain.words": [64, 32], "plain.places": [32, 32], "plain.last_norm": [32], "lm_head": [64, 32]}
    modules = outside | {f"plain.layers.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()}
    assert found["exported"] == {f"{name}.weight": shape for name, shape in modules.items()}
    assert found["megatron"] == "plain"


def test_nothing_else_asks_for_a_family_by_its_name():
    package = Path(megatron_lite.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.parent.name != "families" and path != package / "config" / "model.py":  # the default
            named = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            assert not [node.lineno for node in named if node.value in FAMILIES], path
