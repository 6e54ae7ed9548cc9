"""A hostile adapter, in the peft library's format or in ours, is one line that names what is wrong: no code runs,
nothing outside the folder is read, nothing huge is allocated, nothing is written."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lite import convert
from megatron_lite.errors import CheckpointError
from megatron_lite.inference.generate import generate_text
from megatron_lite.inference.requests import Request, Sampling
from tests.kit.adapters import decoder, saved
from tests.kit.hostile import FUZZ, malicious
from tests.kit.jobs import PYTHON, run_job
from tests.kit.tiny import tiny_config, tiny_data

LITE = [PYTHON, "-m", "megatron_lite"]
LORA = {"method": "lora", "targets": ["q", "v", "embedding"], "r": 2}
PREFIX = {"method": "prefix", "length": 3}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter of the peft library's, beside its base."""
    return sound(tmp_path, LORA)


def sound(tmp_path: Path, method: dict) -> Path:
    saved(tmp_path / "base", decoder("llama"), 1)
    saved(tmp_path / "ours", decoder("llama", method=method), 2, method)
    convert.export_peft(tmp_path / "ours", tmp_path / "theirs", None, trust=False)
    convert.import_peft(tmp_path / "theirs", tmp_path / "sound", tmp_path / "base", trust=False)
    return tmp_path / "theirs"


def settings(**changes):
    """Changes to the config."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**tree, **changes}))

    return change


def text(content: str):
    """Another config."""
    return lambda folder: (folder / CONFIG).write_bytes(content.encode("utf-8", "surrogatepass"))


def tensors(**changes):
    """Other tensors; None: not there."""

    def change(folder: Path) -> None:
        found = {**load_file(folder / WEIGHTS), **changes}
        (folder / WEIGHTS).unlink()
        save_file({name: t for name, t in found.items() if t is not None}, folder / WEIGHTS)

    return change


def header(edit):
    """Another header; the tensors' bytes stay."""

    def change(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        new = edit(raw[8 : 8 + size].decode()).encode()
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])

    return change


def reshaped(name: str, shape: list[int]):
    def edit(old: str) -> str:
        tree = json.loads(old)
        tree[name]["shape"] = shape
        return json.dumps(tree)

    return header(edit)


def raw(edit):
    """Other bytes of the tensors' file."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(edit((folder / WEIGHTS).read_bytes()))

    return change


def linked(name: str, target: str):
    def change(folder: Path) -> None:
        (folder.parent / "secret").write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def enormous(rank: int):
    """A terabyte that takes no room on the disk."""

    def change(folder: Path) -> None:
        names = {f"{Q}.lora_A.weight": [rank, 32], f"{Q}.lora_B.weight": [32, rank]}
        tree, end = {}, 0
        for name, shape in names.items():
            tree[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * 32 * rank]}
        start = json.dumps(tree).encode()
        with (folder / WEIGHTS).open("wb") as file:
            file.write(len(start).to_bytes(8, "little") + start)
            file.truncate(8 + len(start) + end)
        settings(r=rank)(folder)

    return change


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


A, B, NAN = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", float("nan")
ATTACKS = {
    "no JSON": (text("{'r': 8}"), CONFIG),
    "an array": (text("[]"), "expected an object, found list"),
    "nested": (text("[" * 100_000), "nested too deeply"),
    "nested fields": (text('{"r":' * 50_000 + "1" + "}" * 50_000), "nested too deeply"),
    "a field twice": (text('{"peft_type": "LORA", "r": 1, "r": 2}'), "duplicate key 'r'"),
    "another encoding": (text("\ud800"), CONFIG),
    "no method": (text("{}"), "peft_type=None: only LORA, PREFIX_TUNING"),
    "a method in a list": (settings(peft_type=["LORA"]), r"peft_type=\['LORA'\]: only"),
    "another method": (settings(peft_type="IA3\x1b[31m\n"), r"peft_type='IA3\\x1b\[31m\\n': only"),
    "a field of its own": (settings(run_this="rm -rf"), "run_this='rm -rf': not supported"),
    "a long field": (settings(run_this="x" * 100_000), "run_this='xxx"),
    "a field that writes": (settings(**{"\x1b[2J\nerror: none": 1}), r"json: \\x1b\[2J\\nerror: none=1: not supported"),
    "code": (settings(auto_mapping={"parent_library": "os"}, custom_modules=["x"]), "custom_modules=.*not supported"),
    "no rank": (settings(r=None), r"peft\.r"),
    "a rank of 2^60": (settings(r=2**60), r"peft\.r: "),
    "a rank below 1": (settings(r=-4), r"peft\.r: "),
    "a rank that is text": (settings(r="x" * 100_000), r"peft\.r: "),
    "a rank that is true": (settings(r=True), r"peft\.r: "),
    "a rank that is an object": (settings(r={"a": 1}), r"peft\.r: "),
    "an infinite alpha": (text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}'), r"peft\.alpha: "),
    "an alpha that is no number": (text('{"peft_type": "LORA", "lora_alpha": NaN}'), "NaN is not a number"),
    "an alpha that is text": (settings(lora_alpha="x"), r"peft\.alpha: "),
    "an alpha that is a list": (settings(lora_alpha=[1]), r"peft\.alpha: "),
    "a dropout of 2": (settings(lora_dropout=2), r"peft\.dropout: "),
    "a dropout that is text": (settings(lora_dropout="often"), r"peft\.dropout: "),
    "patterns in a list": (settings(alpha_pattern=["q_proj"]), r"alpha_pattern: expected "),
    "patterns that are text": (settings(alpha_pattern="q_proj"), r"alpha_pattern: expected "),
    "a pattern without an end": (settings(alpha_pattern={"(a+)+$": 3}), "only module names are supported"),
    "an alpha of a pattern": (settings(alpha_pattern={"q_proj": [3]}), r"peft\.alphas\."),
    "a path as a module": (settings(alpha_pattern={"../../etc/passwd": 3}), "only module names are supported"),
    "a magnitude that is missing": (settings(use_dora=True), "peft.dora: embedding: only linears inside"),
    "a config that is a link": (linked(CONFIG, "../secret"), r"leads out of the folder, to \S+secret"),
    "a config that leads to itself": (linked(CONFIG, CONFIG), CONFIG),
    "weights that are a link": (linked(WEIGHTS, "../secret"), r"leads out of the folder, to \S+secret"),
    "weights that lead to themselves": (linked(WEIGHTS, WEIGHTS), WEIGHTS),
    "weights at an absolute place": (linked(WEIGHTS, "/etc/passwd"), "leads out of the folder, to /etc/passwd"),
    "weights that are a pipe": (pipe, "not a regular file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"{WEIGHTS} is missing"),
    "a tensor of another shape": (tensors(**{A: torch.zeros(2, 31)}), r"should be \(2, 32\), is \(2, 31\)"),
    "a tensor of another rank": (
        tensors(**{A: torch.zeros(3, 32)}),
        "lora_A.weight has rank 3, r and rank_pattern give 2",
    ),
    "a tensor without rows": (tensors(**{A: torch.zeros(0, 32), B: torch.zeros(32, 0)}), r"peft\.ranks\."),
    "a tensor with one dim": (tensors(**{A: torch.zeros(64)}), f"no use for.*{A}|should be"),
    "a tensor missing": (tensors(**{B: None}), r"lora_B\.weight should be \(32, 2\), is None"),
    "a tensor more": (tensors(**{"../../etc/passwd": torch.zeros(1)}), "no use for '../../etc/passwd'"),
    "a name that writes": (tensors(**{"\x1b[2J\nerror: none": torch.zeros(1)}), r"no use for '\\x1b\[2J\\nerror"),
    "a long name": (tensors(**{"x" * 100_000: torch.zeros(1)}), "no use for 'xxx"),
    "whole numbers": (tensors(**{A: torch.zeros(2, 32, dtype=torch.int64)}), "int64: quantised weights are not read"),
    "8 bits": (tensors(**{A: torch.zeros(2, 32).to(torch.float8_e4m3fn)}), "float8_e4m3fn"),
    "complex numbers": (header(lambda t: t.replace('"F32"', '"C64"', 1)), WEIGHTS),
    "NaN": (tensors(**{A: torch.full((2, 32), NAN)}), rf"{A} holds numbers that are not finite"),
    "infinity": (tensors(**{B: torch.full((32, 2), -1e39, dtype=torch.float64).float()}), "that are not finite"),
    "2^60 rows": (reshaped(A, [2**60, 32]), WEIGHTS),
    "negative rows": (reshaped(A, [-2, -32]), WEIGHTS),
    "a tensor twice": (header(lambda t: t.replace("{", f'{{"{A}":{{}},', 1)), "duplicate key"),
    "a header of 1 GB": (raw(lambda b: (1 << 30).to_bytes(8, "little") + b"{" * 99), "a header of 1073741824 bytes"),
    "a header of 2^63": (raw(lambda b: b"\xff" * 8 + b[8:]), "a header of 18446744073709551615 bytes"),
    "a header that is none": (header(lambda t: "[]"), WEIGHTS),
    "a header of nonsense": (header(lambda t: json.dumps({A: 5})), WEIGHTS),
    "the end is missing": (raw(lambda b: b[:-1]), WEIGHTS),
    "the header is cut off": (raw(lambda b: b[:100]), WEIGHTS),
    "empty": (raw(lambda b: b""), WEIGHTS),
    "a terabyte": (enormous(1 << 32), r"peft\.r|disk full"),
    "a large rank": (enormous(1 << 27), r"peft\.r|disk full"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_import_is_named_and_leaves_nothing(folder, attack):
    change, said = ATTACKS[attack]
    change(folder)
    refused(folder, said)


def refused(folder: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        convert.import_peft(folder, folder.parent / "out", folder.parent / "base", trust=False)
    line = str(error.value)
    assert str(folder) in line
    assert line.isprintable() and len(line) < 1000
    assert not (folder.parent / "out").exists()


ON_PREFIXES = {
    "no length": (settings(num_virtual_tokens=None), r"peft\.length"),
    "a length of 2^60": (settings(num_virtual_tokens=2**60), r"peft\.length"),
    "no room": (settings(num_virtual_tokens=32), r"peft\.length=32 .* exceed"),
    "another length": (settings(num_virtual_tokens=4), r"prompt_embeddings should be \(4, "),
    "another model": (
        settings(num_layers=3, token_dim=[1]),
        r"not for this model: num_layers=3, not 2; token_dim=\[1\]",
    ),
    "NaN": (tensors(prompt_embeddings=torch.full((3, 32), NAN)), "not finite"),
    "another tensor": (tensors(prompt_embeddings=None, prompt=torch.zeros(1)), "prompt_embeddings should be"),
}


@pytest.mark.parametrize("attack", ON_PREFIXES)
def test_an_attack_with_a_prefix(tmp_path, attack):
    folder = sound(tmp_path, PREFIX)
    change, said = ON_PREFIXES[attack]
    change(folder)
    refused(folder, said)


# Ours


def forge(step: Path, name: str, content: bytes | None = None, **entries: dict) -> None:
    """Other content of a file, or other tensors, in a checkpoint of ours, which is signed again."""
    if content is not None:
        (step / name).write_bytes(content)
    tree = json.loads((step / "manifest.json").read_bytes())
    tree["files"][name] = {"size": (step / name).stat().st_size, "sha256": sha256((step / name).read_bytes())}
    tree["tensors"] |= entries
    del tree["sha256"]
    signed = json.dumps(tree, sort_keys=True, separators=(",", ":")).removesuffix("}").encode()
    (step / "manifest.json").write_bytes(signed + b',"sha256":"%s"}\n' % sha256(signed).encode())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def config(**sections):
    """Other sections of the config that lies in a checkpoint."""

    def change(step: Path) -> None:
        tree = json.loads((step / "config.yaml").read_bytes())
        forge(step, "config.yaml", json.dumps({**tree, **sections}).encode())

    return change


def shard(**changes):
    """Other tensors in the file of a checkpoint, and in its manifest."""

    def change(step: Path) -> None:
        (path,) = step.glob("*.safetensors")
        found = {**load_file(path), **changes}
        path.unlink()
        save_file(found, path)
        kinds = {torch.float64: "F64", torch.int64: "I64"}
        entries = {
            name: {
                "dtype": kinds[tensor.dtype],
                "shape": list(tensor.shape),
                "boxes": [{"file": path.name, "offset": [0] * tensor.dim(), "shape": list(tensor.shape)}],
            }
            for name, tensor in changes.items()
        }
        forge(step, path.name, **entries)

    return change


V = "model.blocks.0.attention.qkv.lora_v_a"
FORGED = {
    "a config of nonsense": (lambda s: forge(s, "config.yaml", b"{]"), "config.yaml"),
    "a method of nonsense": (config(peft=["lora"]), r"config\.yaml: peft: "),
    "another method": (config(peft={"method": "prefix", "length": 3}), "not the adapter that its config.yaml"),
    "an absurd length": (config(peft={"method": "prefix", "length": 2**47}), r"config\.yaml: peft\.length: "),
    "an absurd size": (config(peft={"method": "adapter", "size": 2**47}), r"config\.yaml: peft\.size: "),
    "a large size": (config(peft={"method": "adapter", "size": 2**16}), "not the adapter that its config.yaml"),
    "an absurd rank": (config(peft={**LORA, "r": 2**60}), r"config\.yaml: peft\.r: "),
    "a large rank": (config(peft={**LORA, "r": 2**16}), r"lora_\w+ is torch\.float64 .*, its config\.yaml implies \(6"),
    "a module that is not there": (config(peft={**LORA, "targets": ["q", "v"]}), "no use for model.embedding.lora_"),
    "a base that is a number": (config(init={"from": 5}), r"init\.from: expected a string, found int"),
    "a base in a list": (config(init=["from"]), r"init\.from: expected a string, found list"),
    "a base elsewhere": (config(init={"from": "/etc/passwd"}), r"/etc/passwd"),
    "a precision of its own": (config(train={"precision": "__class__"}), r"train\.precision: expected float32, "),
    "NaN": (shard(**{V: torch.full((2, 32), NAN, dtype=torch.float64)}), rf"{V} holds numbers that are not finite"),
    "another shape": (shard(**{V: torch.zeros(2, 31, dtype=torch.float64)}), rf"{V} is torch\.float64 \(2, 31\), "),
    "whole numbers": (shard(**{V: torch.zeros(2, 32, dtype=torch.int64)}), rf"{V} is torch\.int64 \(2, 32\), "),
    "a tensor more": (shard(**{"model.norm.weight": torch.zeros(32, dtype=torch.float64)}), "no use for model.norm.we"),
    "a file elsewhere": (
        lambda s: forge(
            s,
            "config.yaml",
            **{V: {"dtype": "F64", "shape": [1], "boxes": [{"file": "../../secret", "offset": [0], "shape": [1]}]}},
        ),
        r"manifest\.json: tensors\.\S+\.file: ",
    ),
}


@pytest.mark.parametrize("attack", FORGED)
def test_a_forged_adapter_of_ours_is_refused_by_everything_that_takes_one(tmp_path, attack):
    sound(tmp_path, LORA)
    step, (change, said) = next((tmp_path / "ours").glob("step_*")), FORGED[attack]
    change(step)
    for entry in (
        lambda: convert.merge_adapter(step, tmp_path / "out", None, "ours", "stored", unmerge=False, trust=False),
        lambda: convert.export_peft(step, tmp_path / "out", None, trust=False),
        lambda: list(generate_text(step, [Request("", None)], Sampling(max_new_tokens=1))),
    ):
        with pytest.raises(CheckpointError, match=said) as error:
            entry()
        assert str(error.value).isprintable() and len(str(error.value)) < 1000
        assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path):
    sound(tmp_path, LORA)
    saved(tmp_path / "other", decoder("llama", seed=7), 1)
    adapter, other, out = tmp_path / "ours", tmp_path / "other", tmp_path / "out"
    said = r"was trained on a base of fingerprint \w{12}, but \S+other\S* has \w{12}: give the base it belongs to"
    for entry in (
        lambda: convert.merge_adapter(adapter, out, other, "ours", "stored", unmerge=False, trust=False),
        lambda: list(generate_text(adapter, [Request("", None)], Sampling(max_new_tokens=1), base=other)),
        lambda: list(generate_text(other, [Request("", "a")], Sampling(), adapters={"a": adapter})),
    ):
        with pytest.raises(CheckpointError, match=said):
            entry()
    assert not out.exists()


def test_the_commands_say_it_in_one_line(folder, tmp_path):
    ours, out = tmp_path / "ours", tmp_path / "out"
    tensors(**{A: torch.full((2, 32), NAN)})(folder)
    shard(**{V: torch.full((2, 32), NAN, dtype=torch.float64)})(next(ours.glob("step_*")))
    for said, *argv in (
        (f"{A} holds numbers that are not finite", "ckpt", "import_peft", folder, out, f"--base={tmp_path}/base"),
        (f"{V} holds numbers that are not finite", "ckpt", "merge_adapter", ours, out),
        (f"{V} holds numbers that are not finite", "generate", tmp_path / "base", f"--adapters=a={ours}"),
    ):
        done = run_job([*LITE, *map(str, argv)], timeout=60)
        done.expect(exit_code=4, stderr=rf"\Aerror: \S+: {re.escape(said)}\n\Z")
    assert not out.exists()


@pytest.mark.timeout(200)
def test_a_run_that_was_forged_is_not_resumed(tmp_path):
    tiny_config(tmp_path, tiny_data(tmp_path), train__steps=1, optim__warmup_steps=1)
    argv = [*LITE, "train", f"{tmp_path}/tiny.yaml"]
    tuned = [*argv, "--peft.method=lora", f"--init.from={tmp_path}/base"]
    run_job([*argv, "--run.name=base"], timeout=60).expect(0)
    run_job([*tuned, "--run.name=run"], timeout=60).expect(0)
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    state = json.loads((step / "state.json").read_text())
    forge(step, "state.json", json.dumps({**state, "train": {**state["train"], "step": "1"}}).encode())
    done = run_job([*tuned, "--run.name=again", f"--checkpoint.resume={step}"], timeout=60)
    done.expect(4, stderr=r"\Aerror: \S+state\.json: train: expected step, updates, samples, skipped, found .*\n\Z")
    assert not list((tmp_path / "again" / "checkpoints").glob("step_*"))


THEIRS = "is an adapter of the peft library; convert it with ckpt import_peft"
PICKLED = {
    "import_peft": ("ckpt import_peft {}/theirs {}/out --base={}/base", "is a pickle, which may run code"),
    "merge_adapter": ("ckpt merge_adapter {}/theirs {}/out", THEIRS),
    "generate": ("generate {}/base --adapters=a={}/theirs", THEIRS),
}


@pytest.mark.parametrize("command", PICKLED)
def test_a_pickle_is_never_opened(folder, tmp_path, command):
    """Row 31."""
    line, said = PICKLED[command]
    malicious(folder / "adapter_model.bin", tmp_path / "canary")
    malicious(folder / "training_args.bin", tmp_path / "canary", raw=True)
    (folder / WEIGHTS).unlink()
    argv = [word.format(tmp_path) for word in line.split()]
    run_job([*LITE, *argv], timeout=60).expect(exit_code=4, stderr=rf"\Aerror: \S+ .*{said}.*\n\Z")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


def test_a_pickle_beside_weights_is_left_alone(folder, tmp_path):
    malicious(folder / "adapter_model.bin", tmp_path / "canary")
    malicious(folder / "optimizer.pt", tmp_path / "canary", raw=True)
    convert.import_peft(folder, tmp_path / "out", tmp_path / "base", trust=False)
    assert not (tmp_path / "canary").exists()


OPEN = """from megatron_lite.checkpoint.opening import open_peft, open_source
        adapter = open_peft(folder, open_source(Path(sys.argv[3])))
        for name, info in adapter.tensors.items():
            adapter.read(name, Tile(torch.empty(info.shape), (0, 0)))"""


def test_300_mutations_load_or_are_refused(folder, tmp_path):
    script = "import torch\nfrom megatron_lite.distributed.shard import Tile\n" + FUZZ.replace(
        "load_model(HuggingFaceSource(folder))", OPEN
    )
    argv = [PYTHON, "-c", script, str(folder), "300", str(tmp_path / "base")]
    done = run_job(argv, timeout=110).expect(0)
    assert 100 < int(done.stdout) < 300
