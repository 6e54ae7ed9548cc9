"""A damaged or hostile tokenizer.model is one line and an exit code, never a crash of the process."""

import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from megatron_lite import convert
from megatron_lite.config import parse_model
from megatron_lite.families.huggingface import config_json, tensor_parts
from tests.kit.corpora import data_tools, documents, write_jsonl, write_tokenizer
from tests.kit.jobs import PYTHON, REPOSITORY, run_job

LOAD_ALL = """
import sys
from pathlib import Path
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import MegatronLiteError
refused = 0
for path in sorted(Path(sys.argv[1]).glob("*.model")):
    try:
        model = load_tokenizer(path)
    except MegatronLiteError as error:
        assert "\\n" not in str(error) and path.name in str(error)
        refused += 1
    else:
        text = "def main(args):\\n    return 'naïve' \U0001f600"
        model.decode(model.encode_documents([text.encode()])[0].tolist())
        model.decode(model.encode_spans(text).tokens.tolist())
        model.decode(list(range(model.vocab_size)))
print(refused)
"""


def test_500_mutations_load_or_are_refused(tmp_path):
    original = write_tokenizer(tmp_path / "t.model").read_bytes()
    (tmp_path / "t.model").unlink()
    rng = random.Random(1)
    for i in range(500):
        data = bytearray(original)
        if i % 5 == 0:
            data = data[: rng.randrange(len(data))]
        elif i % 5 == 1:
            start = rng.randrange(len(data))
            data[start : start + rng.randrange(1, 200)] = rng.randbytes(rng.randrange(1, 200))
        else:  # one bit may change a score or a letter of a piece, and the model loads; four rarely leave it readable
            for _ in range(1 << i % 5 - 2):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / f"{i:03d}.model").write_bytes(data)
    argv = [sys.executable, "-c", LOAD_ALL, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert 300 < int(done.stdout) < 480  # neither everything nor nothing: the other models were put to use


def test_one_that_travels_with_a_checkpoint(tmp_path):
    """Changed in place, its digest tells; in a folder that has none, it is one line all the same."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_size": 32, "num_layers": 1, "num_heads": 2}
    model = parse_model(sizes, "here")
    tensors = {p.name: torch.rand(p.stored) for parts in tensor_parts(model).values() for p in parts}
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(model, "float32", {})))
    write_tokenizer(folder / "tokenizer.model")
    convert.import_hf(folder, tmp_path / "ours", 1, 128)
    copy = tmp_path / "ours" / "step_00000000" / "tokenizer.model"
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (folder / "tokenizer.model").write_bytes(content[: len(content) // 2] + b"\xff" * 100)
    for path, told in (
        (tmp_path / "ours", "tokenizer.model is damaged"),
        (folder, "its tokenizer is not a sentencepiece model: .+"),
    ):
        result = run_job([PYTHON, "-m", "megatron_lite", "generate", str(path), "--prompt=x"], timeout=60)
        result.expect(exit_code=4, stderr=rf"\Aerror: {tmp_path}\S+: .*{told}")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"not a model", b"\xff" * 1000, b"\x80\x02]q\x00."], ids=lambda b: b[:9]
)
def test_the_command_says_it_in_one_line(tmp_path, content):
    (tmp_path / "bad.model").write_bytes(content)
    data = write_jsonl(tmp_path / "x.jsonl", documents(3))
    result = data_tools("tokenize", f"--input={data}", f"--tokenizer={tmp_path}/bad.model", f"--out={tmp_path}/out")
    result.expect(exit_code=3, stderr=r"\Aerror: .*/bad\.model is not a sentencepiece model: .+\n\Z")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
