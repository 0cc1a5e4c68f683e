"""Shows a build's progress on stderr: bars on a terminal, one plain line per stage elsewhere, with --quiet nothing."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gemma4_export.configs.command_line import shows_progress
from gemma4_export.exporter.build import Stage

_TITLES: dict[Stage, str] = {
    "download": "downloading",
    "trace": "tracing the graph",
    "weights": "writing weights",
    "oracle": "recording the oracle",
    "package": "packaging",
    "engines": "compiling engines",
}
_IN_BYTES: tuple[Stage, ...] = ("download", "weights")


class BuildProgress:
    """A callable for ``build_artifact(on_progress=…)``; a context manager around the build."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, quiet=not shows_progress())
        self._bars: Progress | None = None
        self._started: dict[Stage, float] = {}
        self._tasks: dict[Stage, TaskID] = {}
        self._finished: set[Stage] = set()
        self._is_interrupted = False
        self._is_watching = False

    def __enter__(self) -> BuildProgress:
        # Ctrl-C that lands in a weakref's callback or a destructor is printed and dropped by Python; torch's tracing
        # runs many of those. The flag ends the build at its next step.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
            self._is_watching = True
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
        if self._is_watching:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._is_interrupted and kind is None:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._is_interrupted = True
        signal.default_int_handler(number, frame)

    def say(self, text: str) -> None:
        """One line that stays, nothing for an empty ``text``."""
        if text:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __call__(self, stage: Stage, what: str, done: int, total: int) -> None:
        """Show ``done`` of ``total``; a stage that is done twice is reported once.

        Raises:
            KeyboardInterrupt: a Ctrl-C came since the last call and was lost on its way.
        """
        if self._is_interrupted:
            raise KeyboardInterrupt
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
