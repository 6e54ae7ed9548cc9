"""Progress: a bar on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

_EVERY = 10.0  # seconds between plain lines


class Progress:
    """``with Progress(total_bytes) as progress: progress.update(bytes, tokens)``; writes to stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.tokens = total, 0, 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = BarColumn(), DownloadColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
            self._bar = Progress("tokenize", *columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, speed="")
        return self

    def update(self, size: int, tokens: int) -> None:
        """``size`` more bytes have been read and ``tokens`` more written."""
        self.done += size
        self.tokens += tokens
        now = time.monotonic()
        speed = f"{self.tokens / max(now - self._start, 1e-3):,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=speed)
        elif now - self._last >= _EVERY:
            self._last = now
            share = self.done / max(self.total, 1)
            print(f"tokenize: {share:.0%} of {self.total:,} bytes, {self.tokens:,} tokens, {speed}", file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
