"""Preprocessing that is interrupted, however and whenever, leaves nothing that looks complete."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, read_card
from tests.kit.corpora import data_tools, dataset_bytes, documents, ended, write_jsonl, write_tokenizer
from tests.kit.jobs import PYTHON, REPOSITORY, RunningJob, start_job

# Writes a new dataset over an old one and is gone, as by kill -9, at the n-th change of a name.
KILLED_WHILE_PUBLISHING = """
import os, sys
from pathlib import Path
from megatron_lite.data.indexed import IndexedWriter

def write(prefix, token):
    with IndexedWriter(prefix, "uint16", durable=False) as writer:
        writer.card = {"token": token}
        writer.add_document([token] * 9)

def counted(method):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os._exit(9)
        left -= 1
        return method(*args, **kwargs)
    return call

for moment in range(int(sys.argv[2])):
    left = 1000
    prefix = f"{sys.argv[1]}/out_{moment}"
    write(prefix, 1)
    if os.fork() == 0:
        Path.replace, Path.unlink, left = counted(Path.replace), counted(Path.unlink), moment
        write(prefix, 2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture
def arguments(tmp_path):
    """Some 13 MB: four units for two workers, a second or two of work."""
    write_jsonl(tmp_path / "x.jsonl", [text * 100 for text in documents(600)])
    model = write_tokenizer(tmp_path / "t.model")
    return ["tokenize", f"--input={tmp_path}/x.jsonl", f"--tokenizer={model}", f"--out={tmp_path}/out", "--workers=2"]


def wait_until_encoding(job: RunningJob, folder) -> None:
    while not list(folder.glob("out.tmp/part*")):
        assert job.process.poll() is None and time.monotonic() < job.deadline, job.stderr
        time.sleep(0.01)


def test_killed_at_random_times_then_run_again(arguments, tmp_path):
    began = time.monotonic()
    data_tools(*arguments).expect(exit_code=0)
    whole, wanted = time.monotonic() - began, dataset_bytes(tmp_path / "out")
    for path in tmp_path.glob("out*"):
        path.unlink()

    moments = random.Random(5)
    for _ in range(4):
        with start_job([PYTHON, "-m", "data_tools", *arguments], timeout=60) as job:
            time.sleep(moments.uniform(0.2, 0.9) * whole)
            job.process.send_signal(signal.SIGKILL)
            job.process.wait()
            job.wait_gone(5)  # the workers end with it
        assert not (tmp_path / "out.idx").exists() or dataset_bytes(tmp_path / "out") == wanted

    data_tools(*arguments).expect(exit_code=0)
    assert dataset_bytes(tmp_path / "out") == wanted
    names = sorted(path.name for path in tmp_path.glob("out*"))
    assert names == ["out.bin", "out.card.json", "out.idx"]


def test_killed_at_every_moment_of_publishing(tmp_path):
    argv = [sys.executable, "-c", KILLED_WHILE_PUBLISHING, str(tmp_path), "6"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.stdout.split() == ["9"] * 5 + ["0"], done.stderr  # two old names go, three new ones come
    for moment in range(6):
        prefix = tmp_path / f"out_{moment}"
        if (tmp_path / f"out_{moment}.idx").exists():  # what opens is whole, with its own card: the old one or the new
            token = {0: 1, 5: 2}[moment]
            assert IndexedDataset(prefix)[0].tolist() == [token] * 9
            assert read_card(prefix)["token"] == token
        with IndexedWriter(prefix, "uint16", durable=False) as writer:
            writer.add_document([3])
        assert {path.suffix for path in tmp_path.glob(f"out_{moment}.*")} == {".bin", ".idx"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_interrupted_politely(arguments, tmp_path, number, code):
    with start_job([PYTHON, "-m", "data_tools", *arguments], timeout=60) as job:
        wait_until_encoding(job, tmp_path)
        os.killpg(job.pid, number)  # as a terminal or a batch system does
        result = ended(job)
    result.expect(exit_code=code)
    assert not (tmp_path / "out.idx").exists()
    if number == signal.SIGINT:
        assert "interrupted" in result.stderr
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("after", [0.02, 0.05, 0.1])
def test_interrupted_while_workers_start(arguments, after):
    with start_job([PYTHON, "-m", "data_tools", *arguments], timeout=60) as job:
        while len(job.family()) < 4:  # the main process, the resource tracker and two workers, still importing
            assert job.process.poll() is None and time.monotonic() < job.deadline, job.stderr
            time.sleep(0.001)
        time.sleep(after)
        os.killpg(job.pid, signal.SIGINT)
        result = ended(job)
    result.expect(exit_code=130, stderr="^interrupted\n$")


def test_an_older_dataset_stays_until_the_new_one_is_complete(arguments, tmp_path):
    data_tools(*arguments).expect(exit_code=0)
    before = dataset_bytes(tmp_path / "out")
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    data_tools(*arguments).expect(exit_code=3, stderr=r"x\.jsonl:2: invalid JSON")
    assert dataset_bytes(tmp_path / "out") == before
    assert IndexedDataset(tmp_path / "out").num_documents == 600


def test_a_killed_worker_is_named_and_nothing_is_left(arguments, tmp_path):
    with start_job([PYTHON, "-m", "data_tools", *arguments], timeout=60) as job:
        wait_until_encoding(job, tmp_path)
        worker = next(p for p in job.process.children() if "spawn_main" in " ".join(p.cmdline()))
        worker.kill()
        ended(job).expect(exit_code=5, stderr="^error: a worker process was killed")
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_is_one_line_and_exit_code_7(arguments, tmp_path):
    # A process may write this much to one file, and no more: what a quota or a full disk does, without a mount.
    limited = (
        "import resource, signal, sys, runpy; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.argv[0] = 'data_tools';"
        "runpy.run_module('data_tools', run_name='__main__')"
    )
    with start_job([PYTHON, "-c", limited, *arguments[:-1], "--workers=1"], timeout=60) as job:
        ended(job).expect(exit_code=7, stderr=r"^error: .*out\.tmp.*: File too large\n$")
    assert not list(tmp_path.glob("out*"))
