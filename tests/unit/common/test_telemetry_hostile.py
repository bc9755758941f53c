"""Logs hold no foreign exception's words, and nothing that others wrote forges a line."""

from __future__ import annotations

import json
import logging
from io import StringIO
from typing import TYPE_CHECKING

import pytest
import structlog

from mlx_serving.common.errors import EngineError
from mlx_serving.common.telemetry import configure_logging, get_logger, on_one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

HUSH = "hush-hush"
FORGED = 'a\n2026-01-01 [info] forged="yes"'
CONTROL = ["\x1b[2J", "\x07", "\x9b1m", "\r", "\x0b", "\x85", "\u2028", "\u202e", "\ud800", "\0"]


@pytest.fixture(params=["json", "console"])
def log(request: pytest.FixtureRequest) -> Iterator[StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = StringIO()
    configure_logging(log_format=request.param, level="debug", stream=stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def failing(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        failing(RuntimeError(f"a prompt like {HUSH}")),
        failing(KeyError(HUSH)),
        failing(EngineError("ours"), failing(ValueError(HUSH))),
        failing(ValueError("x"), failing(KeyError(HUSH))),
        failing(UnicodeDecodeError("utf-8", HUSH.encode(), 0, 1, HUSH)),
    ],
    ids=repr,
)
def test_a_foreign_exceptions_words_are_not_shown_and_its_type_and_frames_are(
    log: StringIO, error: BaseException
) -> None:
    get_logger("t").error("failed", exc_info=error)
    logging.getLogger("other").error("failed", exc_info=error)
    logging.getLogger("other").error("failed: %s", error)
    logged = log.getvalue()
    assert HUSH not in logged
    assert logged.count(f"{type(error).__name__}") >= 2
    assert "in failing" in logged


def test_our_own_errors_keep_their_words(log: StringIO) -> None:
    get_logger("t").error("failed", exc_info=failing(EngineError("the model is gone")))
    assert "the model is gone" in log.getvalue()


def test_words_are_shown_where_a_caller_knows_better(log: StringIO) -> None:
    error = failing(ValueError("Model type x not supported"))
    get_logger("t").error("failed", exc_info=error, show_words=True)
    logged = log.getvalue()
    assert "Model type x not supported" in logged
    assert "show_words" not in logged


@pytest.mark.parametrize("text", [FORGED, *(f"a{control}b" for control in CONTROL)], ids=ascii)
def test_what_others_wrote_stays_on_its_line_and_off_the_terminal(log: StringIO, text: str) -> None:
    get_logger("t").warning("dropped", jobs=[text], job=text, nested={text: text})
    logging.getLogger("other").warning("dropped %s", text)
    lines = log.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_format_strings_are_only_text(log: StringIO) -> None:
    get_logger("t").warning("dropped", job="%s%n{0.__class__}{job}")
    logging.getLogger("other").warning("dropped %s", "%s%n{0}")
    assert "%s%n{0.__class__}{job}" in log.getvalue()


def test_a_long_text_is_cut(log: StringIO) -> None:
    get_logger("t").warning("dropped", job="a" * 1_000_000)
    assert len(log.getvalue()) < 4000
    assert on_one_line("short") == "short"


def test_json_stays_json(log: StringIO) -> None:
    configure_logging(log_format="json", stream=log)
    get_logger("t").warning("dropped", job=FORGED)
    assert json.loads(log.getvalue())["job"] == FORGED.replace("\n", "\\n")
