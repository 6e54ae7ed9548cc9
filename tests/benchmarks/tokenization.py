"""CPU time of ``data_tools tokenize`` against a bare sentencepiece loop over the same texts; two workers against one.

    python tests/benchmarks/tokenization.py [--vocab_size=32000] [--model_types=bpe,unigram] [--rounds=5]

The text is Python's standard library. The bare loop hands lists of whole documents to sentencepiece on one thread and
drops the result. "Encoding" counts that loop alone, against all that the command does from its first look at the flags
to the synced dataset: reading and checking the lines, encoding, writing, hashing. "Process" counts whole processes with
start-up; the bare one reads the lines with ``json.loads``. Each contender is a process of its own; they take turns, and
a ratio is the median over the rounds. (This file must not be called tokenize.py: it would hide Python's own module.)
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import json, sys, time
from sentencepiece import SentencePieceProcessor
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
model = SentencePieceProcessor(model_file=sys.argv[2])
began = time.process_time()
for i in range(0, len(texts), 100):
    model.encode(texts[i : i + 100], out_type=eval(sys.argv[4]), num_threads=1, add_eos=True)
print(time.process_time() - began)
"""
OURS = """
import sys, time
from data_tools.tokenize import tokenize
began = time.process_time()
tokenize(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]))
print(time.process_time() - began)
"""
CONTENDERS = {  # name: program, its last argument, and whom to divide by
    "bare, lists": (BARE, "int", "bare, lists"),
    "bare, numpy": (BARE, "'numpy'", "bare, lists"),
    "tokenize": (OURS, "1", "bare, lists"),
    "two workers": (OURS, "2", "tokenize"),
}


def measure(program: str, *args: object) -> tuple[float, float, float]:
    """CPU seconds that the program counts itself, those of its whole process and its workers, and wall seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    argv = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(done.stdout.splitlines()[-1]), whole, time.perf_counter() - began


def compare(corpus: Path, model: Path, out: Path, rounds: int) -> None:
    """Print the table for one tokenizer."""
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, (program, last, _) in CONTENDERS.items():
            taken[name].append(measure(program, corpus, model, out, last))
    size = corpus.stat().st_size / 1e6
    print(f"\n{model.stem}, {size:.1f} MB of jsonl, {rounds} rounds")
    print(f"{'':<14}{'encoding':>18}{'':8}{'process':>18}{'':8}{'wall':>18}")
    for name, (_, _, reference) in CONTENDERS.items():
        columns = []
        for mine, base in zip(zip(*taken[name], strict=True), zip(*taken[reference], strict=True), strict=True):
            ratio = statistics.median(b / m for b, m in zip(base, mine, strict=True))
            columns.append(f"{size / statistics.median(mine):11.2f} MB/s {ratio:6.3f}×")
        if name == "two workers":
            columns[0] = " " * len(columns[0])  # the CPU time of its workers is not in it
        print(f"{name:<14}{'  '.join(columns)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--model_types", default="bpe,unigram")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_tools = [sys.executable, "-m", "data_tools"]
        subprocess.run([*data_tools, "corpus", "python-stdlib", f"{folder}/corpus"], check=True)
        (corpus,) = Path(folder, "corpus").iterdir()
        for kind in options.model_types.split(","):
            flags = [f"--vocab_size={options.vocab_size}", f"--model_type={kind}"]
            subprocess.run([*data_tools, "tokenizer", str(corpus), f"{folder}/{kind}", *flags], check=True)
            compare(corpus, Path(folder, f"{kind}.model"), Path(folder, "out"), options.rounds)


if __name__ == "__main__":
    main()
