"""What `top` shows of a fleet: as a terminal has it, and as lines."""

from __future__ import annotations

import pytest
from rich.console import Console

from mlx_serving.cli.overview import Overview, QueueView
from mlx_serving.cli.top import _looks
from mlx_serving.cli.top_view import FleetTotals, frame, lease_of, lines, models_of, span, state_of
from mlx_serving.common.errors import QueueUnavailable
from mlx_serving.common.worker_record import WorkerRecord


def worker(name: str, model: str = "tally", **fields: object) -> WorkerRecord:
    given = {
        "revision": "r", "device": "gpu: Apple M4 Max", "acceleration": "", "held": 13,
        "kv_tokens_capacity": 1000, "pid": 1, "state": "serving", "rows": 12, "batch_rows": 64,
        "kv_tokens_used": 450, "tokens_per_second": 812.5, "lease_age_ms": 300,
        "memory_bytes": 64 << 30, "protocol": 2, "version": "0.1.0", "resident": (model,),
    }  # fmt: skip
    return WorkerRecord(name=name, model=model, **(given | fields))  # type: ignore[arg-type]


FLEET = Overview(
    [QueueView("tally:bulk", 3210, 10, 3220, 4000.0), QueueView("big:default", 0, 0, 0, None)],
    [
        worker("studio"),
        worker("laptop", state="paused", reasons=("on_battery", "hot"), rows=0, held=0,
               kv_tokens_used=0, tokens_per_second=0.0, lease_age_ms=None),
        worker("mini", "big", lease_failing=True, lease_age_ms=9000, tokens_per_second=20.0),
    ],
)  # fmt: skip


def shown(width: int, overview: Overview = FLEET, notice: str = "") -> str:
    console = Console(width=width, force_terminal=True)
    with console.capture() as capture:
        console.print(frame(overview, "12:00:00Z", width=width, notice=notice))
    return capture.get()


def test_a_line_a_worker_with_what_it_does() -> None:
    text = shown(140)
    (line,) = [line for line in text.splitlines() if "studio" in line]
    for word in ("tally", "serving", "12/64", "45%", "812.5", "0.3 s", "Apple M4 Max", "64 GiB"):
        assert word in line
    (paused,) = [line for line in text.splitlines() if "laptop" in line]
    assert "paused: on_battery, hot" in paused


def test_a_worker_with_several_models_shows_which_are_in_memory() -> None:
    several = worker("studio", "tally,big,third", resident=("big",), loading="third",
                     unloadable=("tally: FileNotFoundError: gone",))  # fmt: skip
    fleet = Overview([], [several])
    assert models_of(several) == "big (tally) third…"
    assert "studio can't load tally: FileNotFoundError: gone" in shown(140, fleet)
    assert "studio can't load tally: FileNotFoundError: gone" in list(lines(fleet, "t"))
    assert several.able == ["big", "third"]


def test_totals_and_queues() -> None:
    text = shown(140)
    assert "3 workers, rows 24/192, 3,210 queued, 10 running, 832.5 tokens/s" in text
    (line,) = [line for line in text.splitlines() if "bulk" in line]
    assert [word in line for word in ("tally", "3,210", "10", "67 min")] == [True] * 4


def test_workers_of_a_model_stand_together() -> None:
    order = [name for line in lines(FLEET, "t") for name in ("mini", "laptop", "studio")
             if line.startswith(f"worker {name} ")]  # fmt: skip
    assert order == ["mini", "laptop", "studio"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    from rich.text import Text

    longest = max(len(Text.from_ansi(line).plain) for line in shown(width).splitlines())
    assert longest <= width


def test_a_name_can_not_drive_the_terminal() -> None:
    text = shown(140, Overview([], [worker("evil\x1b]0;owned\x07", device="\x1b[2J")]))
    assert "\x1b]0" not in text
    assert "\x1b[2J" not in text


def test_what_went_wrong_is_said_and_what_was_read_stands() -> None:
    text = shown(140, notice="Redis does not answer")
    assert "Redis does not answer" in text
    assert "studio" in text


def test_rq_that_is_suspended_is_said() -> None:
    overview = Overview(suspended=True)
    assert "rq resume" in shown(140, overview)
    assert next(lines(overview, "t")).endswith("SUSPENDED")


def test_a_lease_that_fails_is_said() -> None:
    assert [lease_of(w) for w in FLEET.workers] == ["0.3 s", "", "9.0 s failing"]
    assert next(state_of(w) for w in FLEET.workers) == "serving"


def test_totals_of_nothing() -> None:
    assert FleetTotals.of(Overview()) == FleetTotals(0, 0, 0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.25, "0.2 s"), (12.0, "12 s"), (300.0, "5 min"), (10_000.0, "2.8 h")],
)
def test_spans_are_for_people(seconds: float | None, text: str) -> None:
    assert span(seconds) == text


def test_a_redis_that_went_away_leaves_the_last_picture() -> None:
    answers: list[Overview | QueueUnavailable] = [QueueUnavailable("gone"), FLEET]

    def read() -> Overview:
        answer = answers.pop(0)
        if isinstance(answer, QueueUnavailable):
            raise answer
        return answer

    first = Overview()
    seen = list(_looks(first, read, lambda: False, 3))
    assert [(overview is first, bool(notice)) for overview, notice in seen] == [
        (True, False), (True, True), (False, False),
    ]  # fmt: skip


def test_a_key_ends_it() -> None:
    assert len(list(_looks(FLEET, lambda: FLEET, lambda: True, 0))) == 1
