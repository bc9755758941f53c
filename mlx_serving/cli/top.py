"""`mlx-serving top`: the fleet, live."""

from __future__ import annotations

import os
import select
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mlx_serving.cli.options import AsJson, ForModel, RedisUrlOption, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving.cli.overview import Overview

END_KEYS: Final = b"qQ\x04"  # q, and Ctrl-D


def top(
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between looks.")
    ] = 2.0,
    count: Annotated[
        int, typer.Option(min=0, help="Looks after which to end; 0: until q or Ctrl-C.")
    ] = 0,
    as_json: AsJson = False,
    model: ForModel = None,
    redis_url: RedisUrlOption = None,
) -> None:
    """Show all workers and queues of a Redis, again and again, until q or Ctrl-C.

    On a terminal a table, else lines; with --json one object a line.
    """
    from mlx_serving.cli.overview import look
    from mlx_serving.common.redis.connection import connect, resolve
    from mlx_serving.common.redis.faults import fault_of
    from mlx_serving.common.redis.retrying import FAULTS

    endpoint = resolve(read_settings(redis_url), model)
    with connect(endpoint) as client:

        def read() -> Overview:
            try:
                return look(client, endpoint.keys)
            except FAULTS as error:
                raise fault_of(error) from error

        first = read()  # a Redis that was never there is an error, not a screen
        with suppress(KeyboardInterrupt, BrokenPipeError):
            if as_json or not sys.stdout.isatty():
                _print_on(first, read, interval, count, as_json=as_json)
            else:
                _show_on(first, read, interval, count)


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(UTC).strftime("%H:%M:%SZ")


def _looks(
    first: Overview, read: Callable[[], Overview], pause: Callable[[], bool], count: int
) -> Iterator[tuple[Overview, str]]:
    """Yield each overview, and what went wrong; while Redis is away, the last one again."""
    from mlx_serving.common.errors import QueueUnavailable

    overview, notice, looks = first, "", 1
    yield overview, notice
    while looks != count and not pause():
        looks += 1
        try:
            overview, notice = read(), ""
        except QueueUnavailable as error:
            notice = str(error)
        yield overview, notice


def _print_on(
    first: Overview, read: Callable[[], Overview], interval: float, count: int, *, as_json: bool
) -> None:
    import msgspec

    from mlx_serving.cli.top_view import FleetTotals, lines

    for overview, notice in _looks(first, read, lambda: _sleep(interval), count):
        if notice:
            typer.echo(f"{now()} {notice}", err=True)
        elif as_json:
            whole = {"at": now(), "totals": asdict(FleetTotals.of(overview))} | asdict(overview)
            typer.echo(msgspec.json.encode(whole).decode())
        else:
            for line in lines(overview, now()):
                typer.echo(line)


def _show_on(first: Overview, read: Callable[[], Overview], interval: float, count: int) -> None:
    from rich.console import Console
    from rich.live import Live

    from mlx_serving.cli.top_view import frame

    console = Console()
    live = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")
    with _keyboard() as wait_for_end, live:
        for overview, notice in _looks(first, read, lambda: wait_for_end(interval), count):
            live.update(frame(overview, now(), width=console.width, notice=notice), refresh=True)


@contextmanager
def _keyboard() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits so many seconds; True if one of `END_KEYS` was pressed."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)  # keys come at once and unseen; Ctrl-C is still a signal
    try:
        yield lambda seconds: _end_key_within(terminal, seconds)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _end_key_within(terminal: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            pressed = os.read(terminal, 64)
            if not pressed or any(key in END_KEYS for key in pressed):
                return True
    return False
