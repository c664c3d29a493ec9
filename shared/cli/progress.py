"""Progress of long steps: a bar on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

SECONDS_BETWEEN_LINES = 5.0


class StepProgress:
    """One step with a rate and the time left.

    Args:
        title: what is being done.
        unit: what is counted, in the plural.
        enabled: False prints nothing.
    """

    def __init__(
        self, title: str, unit: str = "", *, enabled: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._unit = unit
        self._clock = clock
        self._enabled = enabled
        self._start = self._last_line = clock()
        self._count = 0
        self.share = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._enabled and sys.stderr.isatty():
            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"),
                console=Console(file=sys.stderr), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self._title, total=1.0, detail="")
            self._bar.start()
        elif self._enabled:
            print(f"{self._title} …", file=sys.stderr, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._enabled and error is None:
            seconds = self._clock() - self._start
            amount = f"{self._count:,} {self._unit} in " if self._unit else ""
            print(f"{self._title}: {amount}{seconds:.1f} s", file=sys.stderr, flush=True)

    @property
    def elapsed(self) -> float:
        """Returns seconds since the step began."""
        return self._clock() - self._start

    def update(
        self, share: float, count: int | None = None, detail: str = "", left: float | None = None
    ) -> None:
        """Tells how far the step is.

        Args:
            share: done, in [0, 1]; 0 where unknown.
            count: units so far.
            detail: more to show.
            left: seconds left, where the work itself knows; else they follow from `share`.
        """
        self.share = share
        self._count = self._count if count is None else count
        now = self._clock()
        elapsed = now - self._start
        if left is None and share > 0.02 and elapsed > 1:
            left = elapsed * (1 - share) / share
        rate = f"{self._count / elapsed:,.0f} {self._unit}/s" if self._unit and elapsed > 0.5 else ""
        remaining = f"{left:.0f} s left" if left is not None else ""
        text = ", ".join(part for part in (detail, rate, remaining) if part)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=share, detail=text)
        elif self._enabled and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"{self._title}: {share:.0%} {text}", file=sys.stderr, flush=True)
