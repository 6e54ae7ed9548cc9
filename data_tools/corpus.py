"""``data_tools corpus``: writes real text as normalised jsonl shards, one document for each line."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sysconfig
import textwrap
import tokenize as python_source
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.documents import read
from data_tools.sources import find_sources, spans
from megatron_lite.cli import several
from megatron_lite.data.files import storage_errors, sync
from megatron_lite.errors import ConfigError, DataError

_SPAN = 64 << 20
_FUNCTION_LINES = 30  # longer functions are left out of the instruction data


class Text(NamedTuple):
    """One document and its origin: a path, plus the line if the file holds several."""

    text: str
    path: str

    def fields(self) -> dict[str, Any]:
        """Its fields in the jsonl line."""
        return {"text": self.text, "path": self.path}


class Exchange(NamedTuple):
    """A question, its answer, and their origin."""

    text: str
    answer: str
    path: str

    def fields(self) -> dict[str, Any]:
        """Its fields in the jsonl line: a conversation of two messages."""
        messages = [{"role": "user", "content": self.text}, {"role": "assistant", "content": self.answer}]
        return {"messages": messages, "path": self.path}


def corpus(source: str, out: str, shards: int = 1, license: str = "", text_key: str = "text") -> None:
    """Write a corpus as jsonl shards in the folder OUT, one {"text", "path", "license"} a line.

    --source=python-stdlib is the Python standard library on this machine: some 30 MB of real text that needs no
    download. --source=python-stdlib-instructions is conversations, {"messages", …} a line: functions of it, and the
    docstrings that their authors wrote. Anything else names files: text, jsonl, jsonl.gz or parquet; a folder, a glob,
    or several with commas.
    Empty documents are left out. OUT appears when it is complete; one that an earlier run made is replaced.
    """
    if shards < 1:
        raise ConfigError(f"--shards={shards}: expected at least 1")
    stdlib = source in _STANDARD_LIBRARY
    name = source if stdlib else "corpus"
    documents = _STANDARD_LIBRARY[source]() if stdlib else texts(source, text_key)
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
            line = document.fields() | ({"license": license} if license else {})
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
    print(f"{several(count, 'document')}, {size:,} characters in {several(shards, 'shard')}: {folder}")


def standard_library() -> Iterator[Text]:
    """Every .py file of the running interpreter's standard library, sorted by path; site-packages is not part of it.

    Each file is decoded as its coding line says; the few test files with a wrong coding line are left out.
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


def docstrings() -> Iterator[Exchange]:
    """Every short, documented function of the standard library: its code is the question, its docstring the answer.

    The tests of the library are left out: they are half of its text and have few docstrings.
    """
    for file in standard_library():
        if "test" in file.path:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # test files contain invalid escapes on purpose
                tree = ast.parse(file.text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = file.text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or not (answer := ast.get_docstring(node)):
                continue
            (documentation, *rest), last = node.body, node.end_lineno or 0
            if not rest or last - node.lineno > _FUNCTION_LINES or rest[0].lineno <= (documentation.end_lineno or 0):
                continue
            code = lines[node.lineno - 1 : documentation.lineno - 1] + lines[documentation.end_lineno : last]
            question = f"Write the docstring of this function.\n\n{textwrap.dedent(''.join(code)).rstrip()}"
            yield Exchange(question, answer, f"{file.path}:{node.lineno}")


def texts(pattern: str, text_key: str = "text") -> Iterator[Text]:
    """The documents of all files that match ``pattern``, in order. Raises DataError at the first bad line."""
    for source in find_sources(pattern):
        line = 0
        for span in spans(source, _SPAN):
            start = line
            for record in read(span, text_key):
                line = start + record.line
                if record.error:
                    raise DataError(f"{source.path}:{line}: {record.error}")
                if record.content and not record.content.isspace():
                    yield Text(record.content, source.path if source.kind == "text" else f"{source.path}:{line}")


_STANDARD_LIBRARY: dict[str, Callable[[], Iterator[Text | Exchange]]] = {
    "python-stdlib": standard_library,
    "python-stdlib-instructions": docstrings,
}
