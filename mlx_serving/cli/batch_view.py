"""What `batch` shows: lines being checked, a batch in short, its progress."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Self

from mlx_serving.cli.console import harmless, note
from mlx_serving.common.errors import QueueUnavailable
from mlx_serving.producer.batch.objects import Batch
from mlx_serving.producer.batch.registry import ALIVE_SECONDS, Report

if TYPE_CHECKING:
    from mlx_serving.producer.batch.api import Batches
    from mlx_serving.producer.batch.folder import BatchState

REFRESH_SECONDS: Final = 0.5
LINE_SECONDS: Final = 10.0  # between two lines if stderr is not a terminal
AWAY_SECONDS: Final = 2.0  # between two tries while Redis is away
IDLE_SECONDS: Final = 15.0  # in which a worker should have taken the first lines
RATE_SECONDS: Final = 30.0  # over which the rate is measured
SHOWN_ERRORS: Final = 5


class Reading:
    """Counts lines on stderr while a file is checked; silent if stderr is not a terminal."""

    def __enter__(self) -> Self:
        self._shown = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")

    def show(self, lines: int) -> None:
        """Show how many lines were read."""
        if sys.stderr.isatty():
            self._shown = True
            sys.stderr.write(f"\r{lines:,} lines checked")
            sys.stderr.flush()


def describe(state: BatchState, *, known: set[str]) -> None:
    """Say what was found in a file, and what needs a look before the night."""
    batch, counts = state.batch, state.batch.request_counts
    note(f"{counts.total:,} lines, {counts.failed:,} refused; status {batch.status}")
    for section in state.sections:
        note(f"  {section.count:,} for model {section.model}")
        if section.model not in known:
            note(
                f"    the settings here have no alias {section.model!r}: it runs where a worker "
                f"serves that name (--model-map {section.model}=… maps it to another)"
            )
    if state.ignored:
        named = ", ".join(f"{name} ({count:,})" for name, count in state.ignored.items())
        note(f"  without effect and ignored: {named}")
    shown = (batch.errors.data if batch.errors else [])[:SHOWN_ERRORS]
    for error in shown:
        where = f"line {error.line}: " if error.line else ""
        param = f"{error.param}: " if error.param else ""
        note(f"  {where}{harmless(param + error.message)}")
    if counts.failed > len(shown):
        note("  … all of them: mlx-serving batch errors")
    if not batch.ended:
        note(f"It runs in the background until {_time(batch.expires_at)}: mlx-serving batch watch")


def state_of(report: Report) -> str:
    """Status, and whether a runner is at work on it."""
    status = report.batch.status
    return status if report.batch.ended or report.running else f"{status}, no runner"


def report_rows(report: Report) -> list[tuple[str, object]]:
    """A batch in short: names and values."""
    batch, counts = report.batch, report.batch.request_counts
    rows = [
        ("id", batch.id),
        ("status", state_of(report)),
        ("problem", report.problem),
        ("lines", counts.total),
        ("completed", counts.completed),
        ("failed", counts.failed),
        ("in Redis", f"{report.in_flight} ({report.waiting} waiting)" if report.in_flight else ""),
        ("prompt tokens", batch.usage.input_tokens),
        ("of these cached", batch.usage.input_tokens_details.cached_tokens),
        ("completion tokens", batch.usage.output_tokens),
        ("created", _time(batch.created_at)),
        ("expires", _time(batch.expires_at)),
        ("input", batch.input_file_id),
        ("folder", report.folder),
        ("host", report.host),
    ]
    return [row for row in rows if row[1] not in {"", None}]


class Pace:
    """Rate of ended lines over the last half minute, and the time left at that rate."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def mark(self, now_s: float, ended: int) -> None:
        """Note how many lines have ended by now."""
        self._marks = [m for m in self._marks if now_s - m[0] <= RATE_SECONDS]
        self._marks.append((now_s, ended))

    @property
    def per_second(self) -> float:
        """Lines a second; 0 before two marks."""
        (then, before), (now, after) = self._marks[0], self._marks[-1]
        return (after - before) / (now - then) if now > then else 0.0

    def left(self, lines: int) -> str:
        """Time that this many lines take, as h:mm:ss."""
        if self.per_second <= 0:
            return "-:--:--"
        seconds = int(lines / self.per_second)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def watch_batch(batches: Batches, batch_id: str) -> Batch:
    """Show a batch's progress until its end: a bar on a terminal, else lines."""
    pace = Pace()
    with _Bar() if sys.stderr.isatty() else _Lines() as shown:
        while True:
            try:
                report = batches.report(batch_id)
            except QueueUnavailable as error:  # the runner waits for Redis too
                shown.say(" ".join(str(error).split()))
                time.sleep(AWAY_SECONDS)
                continue
            counts = report.batch.request_counts
            pace.mark(time.monotonic(), counts.completed + counts.failed)
            shown.show(report, _text(report, pace))
            if report.batch.ended:
                return report.batch
            time.sleep(REFRESH_SECONDS)


def _text(report: Report, pace: Pace) -> str:
    counts = report.batch.request_counts
    parts = [
        f"{counts.completed:,} of {counts.total:,}",
        f"{counts.failed:,} failed",
        f"{pace.per_second:,.1f} lines/s",
        f"{pace.left(counts.open)} left",
        state_of(report),
    ]
    return " · ".join([*parts, *_hints(report)])


def _hints(report: Report) -> list[str]:
    """Reasons why nothing happens, for the person who waits."""
    if report.batch.ended:
        return []
    if report.problem:
        return [f"stopped: {report.problem}"]
    if not report.running:
        resume = f"`mlx-serving batch resume` on {report.host}"
        return [f"no report for over {ALIVE_SECONDS:.0f} s: {resume}"]
    since_s = report.at_ms / 1000 - (report.batch.in_progress_at or 0)
    if report.in_flight and report.waiting == report.in_flight and since_s > IDLE_SECONDS:
        return ["no worker takes any of these"]
    return []


class _Lines:
    """A line every ten seconds, and one at the end."""

    def __enter__(self) -> Self:
        self._said_s = -LINE_SECONDS
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, report: Report, text: str) -> None:
        """Show the progress."""
        if report.batch.ended:
            note(text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a text, unless one was printed a moment ago."""
        if time.monotonic() - self._said_s >= LINE_SECONDS:
            self._said_s = time.monotonic()
            note(text)


class _Bar:
    """A progress bar of rich's."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, report: Report, text: str) -> None:
        """Show the progress."""
        counts = report.batch.request_counts
        self._progress.update(
            self._task,
            total=counts.total or 1,
            completed=counts.completed + counts.failed,
            description=text,
        )

    def say(self, text: str) -> None:
        """Show a text beside the bar."""
        self._progress.update(self._task, description=text)


def _time(seconds: int | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
