"""A hostile Hugging Face folder is an error that names what is wrong: no code runs, nothing outside the
folder is read, nothing huge is allocated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.config import parse_model
from megatron_lite.convert import load_model
from megatron_lite.errors import CheckpointError
from megatron_lite.families.huggingface import tensor_parts
from tests.kit.hostile import FUZZ
from tests.kit.jobs import PYTHON, REPOSITORY, run_job

CONFIG = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
FILE = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound one."""
    path = tmp_path / "model"
    path.mkdir()
    section = {"vocab_size": 64, "hidden_size": 16, "ffn_size": 32, "num_layers": 1, "num_heads": 2}
    parts = tensor_parts(parse_model(section, "here"))
    tensors = {part.name: torch.rand(part.stored) for some in parts.values() for part in some}
    save_file(tensors, path / FILE)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, FILE)}))
    (path / "config.json").write_text(json.dumps(CONFIG))
    load_model(HuggingFaceSource(path))
    return path


def index(folder: Path, file: str) -> None:
    path = folder / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    tree["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(tree))


def leave(folder: Path) -> None:
    (folder.parent / "secret").write_bytes((folder / FILE).read_bytes())
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(folder.parent / "secret")


def header(folder: Path, edit) -> None:
    raw = (folder / FILE).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = edit(raw[8 : 8 + size].decode())
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text.encode() + raw[8 + size :])


def first_shape(text: str) -> str:
    tree = json.loads(text)
    tree["lm_head.weight"]["shape"] = [2**60, 16]
    return json.dumps(tree)


ATTACKS = {
    "the index leaves the folder": (lambda f: index(f, "../../etc/passwd"), "is not the name of a file in it"),
    "the index is absolute": (lambda f: index(f, "/etc/passwd"), "is not the name of a file in it"),
    "the index names nothing": (lambda f: index(f, "gone.safetensors"), r"gone\.safetensors is missing"),
    "the index is no map": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "weight_map: expected file names by tensor",
    ),
    "a link leaves the folder": (leave, r"leads out of the folder, to \S+secret"),
    "2^60 rows": (lambda f: header(f, first_shape), "safetensors"),
    "a header of 1 GB": (
        lambda f: (f / FILE).write_bytes((1 << 30).to_bytes(8, "little") + b"{" * 1000),
        "a header of 1073741824 bytes is not that of a safetensors file",
    ),
    "duplicate tensors": (
        lambda f: header(f, lambda text: text.replace('{"', '{"lm_head.weight":{},"', 1)),
        "duplicate key 'lm_head.weight'",
    ),
    "NaN": (
        lambda f: (f / "config.json").write_text(json.dumps({**CONFIG, "rms_norm_eps": float("nan")})),
        "NaN is not",
    ),
    "duplicate fields": (
        lambda f: (f / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}'),
        "duplicate key 'vocab_size'",
    ),
    "an array": (lambda f: (f / "config.json").write_text("[]"), "expected an object, found list"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "nested too deeply"),
    "a pickle": (
        lambda f: [p.unlink() for p in f.glob("model*")] and (f / "pytorch_model.bin").write_bytes(b"\x80\x02."),
        r"pytorch_model\.bin is pickled, which is never opened",
    ),
    "code": (lambda f: (f / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {}})), "auto_map names code"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_named(folder, attack):
    change, said = ATTACKS[attack]
    change(folder)
    with pytest.raises(CheckpointError, match=said):
        HuggingFaceSource(folder)


def test_the_commands_say_it_in_one_line(folder, tmp_path):
    index(folder, "../../etc/passwd")
    for argv in (
        ["ckpt", "import_hf", str(folder), str(tmp_path / "out")],
        ["ckpt", "inspect", str(folder)],
        ["generate", str(folder)],
    ):
        done = run_job([PYTHON, "-m", "megatron_lite", *argv], timeout=60)
        done.expect(exit_code=4, stderr=r"\Aerror: \S+: '../../etc/passwd' is not the name of a file in it\n\Z")
    assert not (tmp_path / "out").exists()


def test_the_hub_cache_is_read_through_its_links(folder):
    blobs, snapshot = folder.parent / "hub" / "blobs", folder.parent / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    load_model(HuggingFaceSource(snapshot))


def test_400_mutations_load_or_are_refused(folder):
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(folder), "400"], capture_output=True, text=True, timeout=110, cwd=REPOSITORY
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert 150 < int(done.stdout) < 400
