"""Shows a build's progress on stderr: bars on a terminal, one plain line per stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gemma4_export.exporter.build import Stage

_TITLES: dict[Stage, str] = {
    "download": "downloading",
    "trace": "tracing the graph",
    "weights": "writing weights",
    "oracle": "recording the oracle",
    "package": "packaging",
}
_IN_BYTES: tuple[Stage, ...] = ("download", "weights")


class BuildProgress:
    """A callable for ``build_artifact(on_progress=…)``; a context manager around the build."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._started: dict[Stage, float] = {}
        self._tasks: dict[Stage, TaskID] = {}
        self._finished: set[Stage] = set()

    def __enter__(self) -> BuildProgress:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
            self._bars = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """One line that stays, nothing for an empty ``text``."""
        if text:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __call__(self, stage: Stage, what: str, done: int, total: int) -> None:
        """Show ``done`` of ``total``; a stage that is done twice is reported once."""
        seconds = time.monotonic() - self._started.setdefault(stage, time.monotonic())
        speed = f"{done / 1e6 / max(seconds, 1e-3):.0f} MB/s"
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(_TITLES[stage], total=total, detail="")
            sizes = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {speed}, " if stage in _IN_BYTES else ""
            self._bars.update(self._tasks[stage], completed=done, detail=sizes + what)
        if done >= total and stage not in self._finished:
            self._finished.add(stage)
            amount = f", {total / 1e6:.1f} MB at {speed}" if stage in _IN_BYTES else ""
            self._console.print(f"{_TITLES[stage]}: {seconds:.1f} s{amount}", highlight=False)
