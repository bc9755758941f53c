"""Shows eight streams side by side: a live table on a terminal, else lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mlx_serving.cli.console import harmless

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.cli.demo.jobs import DemoJob
    from mlx_serving.cli.demo.measure import Track

REFRESHES_PER_SECOND: Final = 20
MARKS: Final = {True: ("right", "bold green"), False: ("WRONG", "bold red")}
LINE_CHARS: Final = 20  # a line for each delivery would be too many
WIDE: Final = 110  # columns from which on there is room for the sampling settings
WIDE_REST, NARROW_REST = 90, 46  # what all but the stream take, at their widest


class TableView:
    """Redraws a table of all streams."""

    def __init__(self, jobs: Sequence[DemoJob], tracks: Sequence[Track], console: Console) -> None:
        self._jobs, self._tracks, self._console = jobs, tracks, console
        self._verdicts: dict[int, bool] = {}
        self._live = Live(
            console=console,
            get_renderable=self._table,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.refresh()
        self._live.stop()

    def delivered(self, index: int, text: str) -> None:
        """Nothing to do: the next redraw shows it."""

    def ended(self, index: int, *, right: bool) -> None:
        """Mark a stream's end."""
        self._verdicts[index] = right

    def _table(self) -> Table:
        wide = self._console.width >= WIDE
        table = Table(expand=True, box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("task", no_wrap=True)
        if wide:
            table.add_column("sampling", no_wrap=True, style="dim")
        table.add_column("stream", ratio=1, no_wrap=True)
        table.add_column("tokens", justify="right", no_wrap=True)
        table.add_column("TTFT", justify="right", no_wrap=True)
        table.add_column("answer", no_wrap=True)
        for index, (job, track) in enumerate(zip(self._jobs, self._tracks, strict=True)):
            verdict, text = self._verdict(index, track), self._tail(track.text, wide=wide)
            sampling = [job.settings] if wide else []
            table.add_row(job.name, *sampling, text, str(track.tokens), _ms(track), verdict)
        return table

    def _tail(self, text: str, *, wide: bool) -> Text:
        """The newest part of a text, as much as fits in a row."""
        width = max(16, self._console.width - (WIDE_REST if wide else NARROW_REST))
        line = harmless(text).replace("\n", "⏎").replace("\t", " ")
        return Text(line if len(line) <= width else "…" + line[1 - width :])

    def _verdict(self, index: int, track: Track) -> Text:
        if index not in self._verdicts:
            return Text(track.state)
        word, style = MARKS[self._verdicts[index]]
        return Text(word, style)


class LineView:
    """Prints what streams gain as lines, in the order of arrival; for pipes, files and logs."""

    def __init__(self, jobs: Sequence[DemoJob], tracks: Sequence[Track]) -> None:
        self._jobs, self._tracks = jobs, tracks
        self._width = max(len(job.name) for job in jobs)
        self._waiting = [""] * len(jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def delivered(self, index: int, text: str) -> None:
        """Print what one stream gained, a few deliveries at a time."""
        self._waiting[index] += text
        if len(self._waiting[index]) >= LINE_CHARS:
            self._flush(index)

    def ended(self, index: int, *, right: bool) -> None:
        """Print a stream's end: the answer in full, and whether it is right."""
        self._flush(index)
        job, track = self._jobs[index], self._tracks[index]
        answer = track.text.replace("\n", "⏎")
        typer.echo(
            f"{job.name:<{self._width}} = {MARKS[right][0]} ({job.settings}; {track.tokens} "
            f"tokens, TTFT {_ms(track)}): {job.prompt!r} -> {answer!r}"
        )

    def _flush(self, index: int) -> None:
        line, self._waiting[index] = self._waiting[index].replace("\n", "⏎"), ""
        if line:
            typer.echo(f"{self._jobs[index].name:<{self._width}} | {line}")


def make_view(jobs: Sequence[DemoJob], tracks: Sequence[Track]) -> TableView | LineView:
    """Choose the view: a table for a terminal, else lines."""
    console = Console()
    return TableView(jobs, tracks, console) if console.is_terminal else LineView(jobs, tracks)


def _ms(track: Track) -> str:
    return "" if track.ttft_s is None else f"{track.ttft_s * 1000:.0f} ms"
