"""``mpirun … data_tools tokenize``: the bytes of one process, and one rank's trouble ends all ranks, in one line."""

import gzip
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_tools.encode import Options
from data_tools.sources import find_sources, units
from data_tools.tokenize import _UNIT_BYTES, _work
from megatron_lite.errors import StorageError
from tests.kit.corpora import data_tools, dataset_bytes, documents, ended, write_jsonl, write_tokenizer
from tests.kit.jobs import PYTHON, RunningJob, start_job
from tests.kit.optional import optional

optional("mpi4py", "mpi")
MPIRUN = shutil.which("mpirun", path=f"{Path(PYTHON).parent}:{os.environ['PATH']}")
if MPIRUN is None:
    pytest.skip("there is no mpirun (the mpi extra)", allow_module_level=True)
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # tests may run as root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four units of work: 13 MB of jsonl with three bad lines, and a small file of gzip and one of text."""
    folder = tmp_path_factory.mktemp("mpi")
    write_tokenizer(folder / "t.model", "unigram")
    lines = write_jsonl(folder / "a.jsonl", [text * 120 for text in documents(600)]).read_bytes().splitlines()
    lines[7], lines[300], lines[599] = b"[]", b"caf\xe9", b'{"text": '
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "in gzip"}).encode()))
    (folder / "c.txt").write_text("a text\n" * 10_000)
    assert len(list(units(find_sources(str(folder / "[abc].*")), _UNIT_BYTES))) == 4
    return folder


def arguments(folder: Path, name: str, *flags: str) -> list[str]:
    sources = f"{folder}/a.jsonl,{folder}/b.jsonl.gz,{folder}/c.txt"
    return ["tokenize", f"--input={sources}", f"--tokenizer={folder}/t.model", f"--out={folder}/{name}", *flags]


def mpirun(
    ranks: int, arguments: list[str], during: Callable[[RunningJob], object] = lambda job: None, timeout: float = 60
):
    argv = [str(MPIRUN), "--oversubscribe", "-n", str(ranks), PYTHON, "-m", "data_tools", *arguments]
    with start_job(argv, timeout=timeout, env=ROOT) as job:
        during(job)
        return ended(job)


def test_the_same_bytes_however_many_take_part(folder):
    skip = ("--on_error=skip", "--max_bad=3")
    for name, count in (("one", 1), ("two", 2)):
        data_tools(*arguments(folder, name, *skip, f"--workers={count}")).expect(exit_code=0)
    for name, ranks in (("ranks2", 2), ("ranks3", 3)):
        done = mpirun(ranks, arguments(folder, name, *skip)).expect(exit_code=0)
        assert done.stdout.count("tokens (uint16)") == 1, done.stdout
    for name in ("two", "ranks2", "ranks3"):
        assert dataset_bytes(folder / name) == dataset_bytes(folder / "one")
        for suffix in (".card.json", ".rejects.jsonl"):
            assert (folder / f"{name}{suffix}").read_bytes() == (folder / f"one{suffix}").read_bytes()
    card = json.loads((folder / "ranks3.card.json").read_text())
    assert (card["lines"], card["rejected"], card["documents"], card["empty"]) == (602, 3, 599, 0)
    assert len(list(folder.glob("ranks3.*"))) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({450: b"[]"}, r"a\.jsonl:451: expected an object, not a list"),  # in the part of rank 1
        ({450: b"[]", 3: b"{}"}, r"a\.jsonl:4: no key"),  # on both: the first in the order of the input
    ],
)
def test_a_bad_line_on_one_rank_ends_all(tmp_path, folder, lines, message):
    texts = write_jsonl(tmp_path / "a.jsonl", [text * 80 for text in documents(600)]).read_bytes().splitlines()
    for number, line in lines.items():
        texts[number] = line
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(texts))
    flags = ["tokenize", f"--input={tmp_path}/a.jsonl", f"--tokenizer={folder}/t.model", f"--out={tmp_path}/out"]
    done = mpirun(2, flags)
    done.expect(exit_code=3, stderr=rf"(?m)^error: {tmp_path}/{message}")
    assert done.stderr.count("error:") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("--input={}/none.jsonl", 3, "no file matches '{}/none.jsonl'"),
        ("--on_error=skipp", 2, r"--on_error=skipp: expected stop or skip \(did you mean 'skip'\?\)"),
        ("--out={}/t.model/out", 7, r"{}/t.model/out.tmp: Not a directory"),
    ],
)
def test_what_rank_0_alone_finds_out_ends_all(folder, flag, code, message):
    name = flag.split("=")[0]
    flags = [word for word in arguments(folder, "refused") if not word.startswith(f"{name}=")]
    done = mpirun(2, [*flags, flag.format(folder)], timeout=30)
    done.expect(exit_code=code, stderr=f"(?m)^error: {message.format(folder)}")
    assert done.stderr.count("error:") == 1
    assert not list(folder.glob("refused*"))


def test_a_killed_rank_ends_all(folder):
    def kill(job: RunningJob) -> None:
        while not list(folder.glob("killed.tmp/part*")):
            assert job.process.poll() is None and time.monotonic() < job.deadline, job.stderr
            time.sleep(0.01)
        ranks = [p for p in job.family() if p.environ().get("OMPI_COMM_WORLD_RANK") == "1"]
        psutil.Process(ranks[0].pid).kill()

    done = mpirun(2, arguments(folder, "killed", "--on_error=skip", "--max_bad=3"), during=kill, timeout=30)
    assert done.exit_code == 128 + 9, done
    assert not (folder / "killed.idx").exists()


def test_a_host_without_the_folder_is_named(tmp_path):
    with pytest.raises(
        StorageError, match=r"out\.tmp: not there on \S+; --out must be on storage that all hosts share"
    ):
        _work((0, []), tmp_path / "out.tmp", "t.model", Options())
