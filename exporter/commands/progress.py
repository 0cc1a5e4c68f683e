"""Shows a build's progress on stderr: bars on a terminal, one plain line per stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gemma4_export.exporter.build import Stage

_TITLES: dict[Stage, str] = {
    "download": "downloading",
    "trace": "tracing the graph",
    "weights": "writing weights",
    "package": "packaging",
}
_IN_BYTES: tuple[Stage, ...] = ("download", "weights")


class BuildProgress:
    """A callable for ``build_artifact(on_progress=…)``; a context manager around the build."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._started: dict[Stage, float] = {}
        self._tasks: dict[Stage, object] = {}

    def __enter__(self) -> BuildProgress:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[unit]}"))
            sizes = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, *sizes, console=self._console, transient=True)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: Stage, what: str, done: int, total: int) -> None:
        start = self._started.setdefault(stage, time.monotonic())
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(_TITLES[stage], total=total, unit=what)
            self._bars.update(self._tasks[stage], completed=done, unit=what)  # type: ignore[arg-type]
        if done >= total:
            seconds = time.monotonic() - start
            amount = (
                f", {total / 1e6:.1f} MB at {total / 1e6 / max(seconds, 1e-3):.0f} MB/s" if stage in _IN_BYTES else ""
            )
            self._console.print(f"{_TITLES[stage]}: {seconds:.1f} s{amount}", highlight=False)
