"""The inspect command: its facts are those of the dataset, and nothing in a dataset can drive the terminal."""

import io
import math
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.inspect import inspect
from data_tools.tokenize import tokenize
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.errors import DataError
from tests.kit.corpora import documents, write_jsonl, write_tokenizer


def write(prefix: Path, lengths: list[int], token: int = 7) -> Path:
    with IndexedWriter(prefix, "uint16", durable=False) as writer:
        for length in lengths:
            writer.add_document(np.full(length, token))
    return prefix


def facts(output: str) -> dict[str, str]:
    head = output.split("\n\n")[0]
    return dict(re.split(r"  +| (?=\S+ nats)", line, maxsplit=1) for line in head.splitlines())


def bars(output: str) -> dict[tuple[int, int], int]:
    """The histogram: (from, to): documents."""
    rows = re.findall(r"^ +([\d,]+) +([\d,]+) +([\d,]+) +█* *$", output, re.MULTILINE)
    return {(a, b): n for a, b, n in ([int(x.replace(",", "")) for x in row] for row in rows)}


def test_the_facts_are_those_of_the_dataset(tmp_path, capsys):
    with IndexedWriter(tmp_path / "x", "int32", durable=False) as writer:
        writer.add_document([1, 1, 2, 2], [3, 1])
        writer.add_document([3, 3, 3, 3])
    inspect(f"{tmp_path}/x.bin")
    output = capsys.readouterr().out
    assert facts(output) == {
        "dataset": f"{tmp_path}/x",
        "tokens": "8 (int32)",
        "documents": "2",
        "sequences": "3",
        "unigram entropy": f"{1.5 * math.log(2):.3f} nats per token, the loss of knowing only frequencies",
        "fingerprint": IndexedDataset(tmp_path / "x").fingerprint(),
        "card": "none",
    }
    assert bars(output) == {(4, 7): 2}
    assert "shortest 4, median 4, longest 4" in output
    assert "no dataset card names the tokenizer: samples are token ids" in output
    assert output.endswith("\ndocument 0 (4 tokens)\n[1, 1, 2, 2]\n\ndocument 1 (4 tokens)\n[3, 3, 3, 3]\n")


@given(lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_the_histogram_counts_every_document_once(tmp_path_factory, lengths):
    prefix = write(tmp_path_factory.mktemp("inspect") / "x", lengths)
    with redirect_stdout(io.StringIO()) as output:
        inspect(str(prefix), samples=0)
    found = bars(output.getvalue())
    assert sum(found.values()) == len(lengths)
    for (first, last), count in found.items():
        assert count == sum(first <= length <= last for length in lengths)


def test_samples_are_decoded_and_spread_evenly(tmp_path, capsys):
    texts = documents(101)
    write_tokenizer(tmp_path / "t.model")
    tokenize(str(write_jsonl(tmp_path / "x.jsonl", texts)), f"{tmp_path}/t.model", f"{tmp_path}/out", workers=1)
    capsys.readouterr()
    inspect(f"{tmp_path}/out", samples=3)
    output = capsys.readouterr().out
    assert facts(output)["card"] == f"{tmp_path}/out.card.json"
    assert facts(output)["sources"] == "1 files"
    samples = re.split(r"\n\ndocument (\d+) \([\d,]+ tokens\)\n", output)
    assert samples[1::2] == ["0", "50", "100"]
    for number, text in zip(samples[1::2], samples[2::2], strict=True):
        assert len(text) > 15
        assert texts[int(number)].startswith(text.rstrip("\n"))

    (tmp_path / "t.model").rename(tmp_path / "moved.model")
    inspect(f"{tmp_path}/out", samples=1)
    assert "t.model is not there: samples are token ids" in capsys.readouterr().out
    write_tokenizer(tmp_path / "t.model", "unigram")
    inspect(f"{tmp_path}/out", samples=1)
    assert "t.model is not the tokenizer this dataset was made with" in capsys.readouterr().out
    inspect(f"{tmp_path}/out", samples=1, tokenizer=f"{tmp_path}/moved.model")
    assert texts[0][:15] in capsys.readouterr().out


def test_control_characters_are_shown_and_not_obeyed(tmp_path, capsys):
    write_tokenizer(tmp_path / "t.model")
    source = write_jsonl(tmp_path / "x.jsonl", ["\x1b]0;title\x07 \x1b[2J \x9b2J [red]no markup[/red] \u202e"])
    tokenize(str(source), f"{tmp_path}/t.model", f"{tmp_path}/out", workers=1)
    capsys.readouterr()
    inspect(f"{tmp_path}/out")
    output = capsys.readouterr().out
    assert not [c for c in output if not c.isprintable() and c not in "\n\t"]
    assert r"\x1b]0;title\x07 \x1b[2J \x9b2J [red]no markup[/red] \x202e" in output


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path):
    write_tokenizer(tmp_path / "t.model")
    prefix = write(tmp_path / "x", [3], token=400)
    with pytest.raises(DataError, match="token 400 is not in the tokenizer's vocabulary of 400"):
        inspect(str(prefix), tokenizer=f"{tmp_path}/t.model")


def test_a_damaged_entry_is_found_wherever_it_lies(tmp_path):
    prefix = write(tmp_path / "x", [3] * 100)
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    index[34 + 4 * 50] = 4  # the length of sequence 50
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"x\.idx: sequence 51 starts at byte 306"):
        inspect(str(prefix))
