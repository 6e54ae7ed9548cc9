"""What a user sees who mistypes or names what is not there: one clear line for each mistake, and the exit code."""

import gzip
import re
import sys
from pathlib import Path

import pytest

from data_tools import progress
from data_tools.__main__ import main
from data_tools.progress import Progress
from tests.kit.corpora import documents, write_jsonl, write_tokenizer
from tests.kit.jobs import PYTHON
from tests.kit.terminal import run_on_terminal

TOKENIZE = "tokenize --input=x.jsonl --tokenizer=t.model --out=o "
TOKENIZER = "tokenizer --input=x.jsonl --vocab_size=300 --out=o "
CORPUS = "corpus --source=x.jsonl --out=o "

MISTAKES = {
    # 2: the command line
    "toknize": (2, "unknown command 'toknize' (did you mean 'tokenize'?); there are: corpus, tokenizer, tokenize, ch"),
    "corpus --source=x.jsonl": (2, "missing OUT; see --help"),
    CORPUS + "--sahrds=2": (2, "unknown flag --sahrds (did you mean 'shards'?)"),
    CORPUS + "--shards=0": (2, "--shards=0: expected at least 1"),
    CORPUS + "--shards=two": (2, "--shards=two: expected int"),
    "corpus x.jsonl": (2, "missing OUT; see --help"),
    "corpus x.jsonl .": (2, "--out=.: expected the name of a folder"),
    "corpus x.jsonl x.jsonl": (2, "--out=x.jsonl: a file; name a folder"),
    "corpus x.jsonl full": (2, "--out=full: a folder of other files; name a new one"),
    TOKENIZER + "--vocabsize=9": (2, "unknown flag --vocabsize (did you mean 'vocab_size'?)"),
    TOKENIZER + "--model_type=bp": (2, "--model_type=bp: expected bpe or unigram (did you mean 'bpe'?)"),
    "tokenizer x.jsonl full/": (2, "--out=full/: expected a file name, to which .model is added"),
    "tokenizer x.jsonl o --vocab_size=20000": (2, "--vocab_size=20000: Vocabulary size too high (20000). Please set"),
    TOKENIZE + "--worker=2": (2, "unknown flag --worker (did you mean 'workers'?)"),
    TOKENIZE + "--append_eos=maybe": (2, "--append_eos=maybe: expected true or false"),
    TOKENIZE + "--add_bos=maybe": (2, "--add_bos=maybe: expected true, false or auto"),
    TOKENIZE + "--on_error=skipp": (2, "--on_error=skipp: expected stop or skip (did you mean 'skip'?)"),
    "tokenize x.jsonl t.modl o": (2, "--tokenizer=t.modl: no such file (did you mean 't.model'?)"),
    "tokenize x.jsonl gpt2 o": (2, "--tokenizer=gpt2: no such file; nothing is downloaded here; from the hub: hf"),
    "tokenize x.jsonl full o": (2, "--tokenizer=full: a folder without tokenizer.json or tokenizer.model"),
    "inspect": (2, "missing PREFIX; see --help"),
    "inspect o --sample=3": (2, "unknown flag --sample (did you mean 'samples'?)"),
    # 3: the data
    "corpus y.jsonl o": (3, "no file matches 'y.jsonl' (did you mean 'x.jsonl'?)"),
    "corpus *.jsn o": (3, "no file matches '*.jsn'"),
    "corpus empty o": (3, "empty: no files in this folder"),
    "corpus blank.txt o": (3, "blank.txt: no documents"),
    "tokenizer y.jsonl o": (3, "no file matches 'y.jsonl' (did you mean 'x.jsonl'?)"),
    "tokenizer blank.txt o": (3, "blank.txt: no documents"),
    "tokenize x.jsonl x.jsonl o": (3, "x.jsonl is not a sentencepiece model: "),
    "inspect none": (3, "none.idx: no such file"),
    "inspect x.jsonl": (3, "x.jsonl: no dataset, which is PREFIX.idx and PREFIX.bin; data_tools tokenize makes one"),
    "inspect bad": (3, "bad.idx: not a Megatron index (bad magic bytes)"),
    **{f"{command} o": (3, 'nokey.jsonl:2: no key "text" (--text_key); its keys are: "body"')
       for command in ("corpus nokey.jsonl", "tokenizer nokey.jsonl", "tokenize nokey.jsonl t.model")},
    **{f"{command} o": (3, "cut.jsonl.gz: damaged gzip file: ")
       for command in ("corpus cut.jsonl.gz", "tokenizer cut.jsonl.gz", "tokenize cut.jsonl.gz t.model")},
    **{f"{command} o": (3, "no.parquet: not a readable parquet file: ")
       for command in ("corpus no.parquet", "tokenizer no.parquet", "tokenize no.parquet t.model")},
    # 7: the disk
    "corpus x.jsonl x.jsonl/o": (7, "x.jsonl/o.tmp: Not a directory"),
    "tokenizer x.jsonl x.jsonl/o --vocab_size=300": (7, "x.jsonl/o.model.tmp: Not a directory"),
    "tokenize x.jsonl t.model x.jsonl/o": (7, "x.jsonl/o.tmp: Not a directory"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    write_jsonl(folder / "x.jsonl", documents(100))
    write_tokenizer(folder / "t.model")
    (folder / "nokey.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 99)[:30])
    (folder / "no.parquet").write_bytes(b"PAR1" * 9)
    (folder / "blank.txt").write_text(" \n")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("x")
    for suffix in (".bin", ".idx"):
        (folder / f"bad{suffix}").write_bytes(b"x" * 100)
    return folder


@pytest.mark.parametrize(("typed", "code", "line"), [(k, *v) for k, v in MISTAKES.items()], ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_an_exit_code(folder, monkeypatch, capsys, typed, code, line):
    if "parquet" in typed:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed (the parquet extra)")
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["data_tools", *typed.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr()
    assert (caught.value.code, told.out) == (code, "")
    assert told.err.startswith(f"error: {line}")
    assert told.err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before  # nothing half-made


@pytest.mark.parametrize("command", ["corpus", "tokenizer", "tokenize", "inspect"])
def test_help_names_every_flag_with_its_default(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data_tools", command, "--help"])
    main()
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m data_tools {command} ")
    assert "default" in told
    assert max(map(len, told.splitlines())) <= 120


def test_a_terminal_shows_a_bar(folder, tmp_path):
    flags = [f"--input={folder}/x.jsonl", f"--tokenizer={folder}/t.model", f"--out={tmp_path}/out", "--workers=1"]
    shown = run_on_terminal([PYTHON, "-m", "data_tools", "tokenize", *flags], [], timeout=30)
    assert shown.exit_code == 0, shown
    assert "100 documents" in shown.stdout
    assert "tokens/s" in shown.stdout


def test_elsewhere_progress_is_a_plain_line_now_and_then(monkeypatch, capsys):
    with Progress(1000) as told:
        told.update(100, 10)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "_EVERY", 0.0)
        told.update(150, 20)
    assert re.fullmatch(r"tokenize: 25% of 1,000 bytes, 30 tokens, [\d,]+ tokens/s\n", capsys.readouterr().err)
