"""``data_tools corpus``: real text as normalised jsonl shards, one document a line."""

from __future__ import annotations

import io
import json
import shutil
import sysconfig
import tokenize as python_source
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from data_tools.documents import read
from data_tools.sources import find_sources, spans
from megatron_lite.data.files import storage_errors, sync
from megatron_lite.errors import ConfigError, DataError

_SPAN = 64 << 20


class Text(NamedTuple):
    """One document, and where it comes from: a path, with the line where the file holds many."""

    text: str
    path: str


def corpus(source: str, out: str, shards: int = 1, license: str = "", text_key: str = "text") -> None:
    """Write a corpus as jsonl shards in the folder OUT, one {"text", "path", "license"} a line.

    --source=python-stdlib is the Python standard library on this machine: some 30 MB of real text that needs no
    download. Anything else names files: text, jsonl, jsonl.gz or parquet; a folder, a glob, or several with commas.
    Empty documents are left out. OUT appears when it is complete; one that an earlier run made is replaced.
    """
    if shards < 1:
        raise ConfigError(f"--shards={shards}: expected at least 1")
    stdlib = source == "python-stdlib"
    name = "python-stdlib" if stdlib else "corpus"
    documents = standard_library() if stdlib else texts(source, text_key)
    license = license or ("PSF-2.0" if stdlib else "")
    folder, temporary = Path(out), Path(f"{out.rstrip('/')}.tmp")
    if not folder.name:
        raise ConfigError(f"--out={out}: expected the name of a folder")
    count = size = 0
    with storage_errors(folder), ExitStack() as stack:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--out={out}: a file; name a folder")
        if folder.exists() and not all(path.match("*-?????-of-?????.jsonl") for path in folder.iterdir()):
            raise ConfigError(f"--out={out}: a folder of other files; name a new one")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        paths = [temporary / f"{name}-{i:05d}-of-{shards:05d}.jsonl" for i in range(shards)]
        files = [stack.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in paths]
        for document in documents:
            line = {"text": document.text, "path": document.path} | ({"license": license} if license else {})
            files[count % shards].write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
            size += len(document.text)
        if not count:
            raise DataError(f"{source}: no documents")
        for file in files:
            file.close()
        for path in paths:
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync(folder.parent)
    print(f"{count:,} documents, {size:,} characters in {shards} shard{'s' * (shards > 1)}: {folder}")


def standard_library() -> Iterator[Text]:
    """Every .py file of the running interpreter's standard library, sorted by path; site-packages is not part of it.

    A file is decoded as its own coding line says; the few that test what happens with a wrong one are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] in ("site-packages", "dist-packages"):
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode(python_source.detect_encoding(io.BytesIO(raw).readline)[0])
            text.encode()
        except (SyntaxError, UnicodeError):
            continue
        if text and not text.isspace():
            yield Text(text, name.as_posix())


def texts(pattern: str, text_key: str = "text") -> Iterator[Text]:
    """The documents of all files that ``pattern`` means, in order. Raises DataError at the first bad line."""
    for source in find_sources(pattern):
        line = 0
        for span in spans(source, _SPAN):
            start = line
            for record in read(span, text_key):
                line = start + record.line
                if record.error:
                    raise DataError(f"{source.path}:{line}: {record.error}")
                if record.text and not record.text.isspace():
                    yield Text(record.text, source.path if source.kind == "text" else f"{source.path}:{line}")
