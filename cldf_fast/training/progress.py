"""Progress of long work: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY = 15.0  # seconds, where the output is no terminal


class Progress:
    """Shows name, steps done, loss, speed and time left. Use as a context manager; quiet shows nothing."""

    def __init__(self, name: str, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self.name, self.total, self.first = name, total, done
        self.quiet = quiet
        self.console = Console(file=sys.stderr)
        self.start = self.last_line = time.perf_counter()
        self.bar = RichProgress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.live = not quiet and self.console.is_terminal
        self.task = self.bar.add_task(name, total=total, completed=done, status="")

    def __enter__(self) -> Progress:
        if self.live:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.bar.stop()

    def update(self, done: int, loss: float | None = None) -> None:
        """Report that `done` of the total are done."""
        if self.quiet:
            return
        now = time.perf_counter()
        speed = (done - self.first) / max(now - self.start, 1e-9)
        status = f"{speed:.1f}/s" if loss is None else f"loss {loss:.4f}  {speed:.2f} steps/s"
        if self.live:
            self.bar.update(self.task, completed=done, status=status)
        elif now - self.last_line > _LINE_EVERY or done == self.total:
            self.last_line = now
            left = (self.total - done) / max(speed, 1e-9)
            self.console.print(f"{self.name}: {done}/{self.total}  {status}  {left:.0f} s left", highlight=False)

    def note(self, text: str) -> None:
        """Print a line beside the bar."""
        if not self.quiet:
            self.console.print(text, highlight=False)
