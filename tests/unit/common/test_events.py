"""Events: compact, and read by whoever is older or newer."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.common.attempts import Attempt, new_nonce
from mlx_serving.common.errors import CorruptEvent
from mlx_serving.common.events import (
    BEGINNING,
    ChoiceDelta,
    Cursor,
    ErrorInfo,
    Event,
    Usage,
    attempt_event,
    decode,
    encode,
    end_event,
    reset_event,
    tokens_event,
)

TAG = "0f1e2d3c"
PLAIN = tokens_event(attempt=1, tag=TAG, seq=2, choices=[ChoiceDelta(0, "3", [9])])


def test_absent_fields_are_omitted_and_the_version_is_not() -> None:
    assert encode(PLAIN) == (
        b'{"v":1,"attempt":1,"tag":"0f1e2d3c","seq":2,"type":"tokens",'
        b'"choices":[{"index":0,"text":"3","token_ids":[9]}]}'
    )


def test_an_ordinary_event_costs_at_most_100_bytes_and_its_text() -> None:
    """Without the tag, which the stream keeps in 9 bytes: see `test_protocol_footprint.py`."""
    event = tokens_event(attempt=1, tag=TAG, seq=999, choices=[ChoiceDelta(0, "abc", [15_100])])
    assert len(encode(event)) - len(f'"tag":"{TAG}",') <= 100 + len("abc")


def test_a_tag_is_never_omitted_so_that_every_event_has_the_same_opening() -> None:
    assert encode(reset_event()) == b'{"v":1,"attempt":0,"tag":"","seq":0,"type":"reset"}'


class TestCursor:
    def test_an_event_gives_it_and_it_reads_back(self) -> None:
        assert PLAIN.cursor == "2-0f1e2d3c"
        tag = Attempt("a", 1, new_nonce()).tag
        assert Cursor.parse(str(Cursor(2, tag)), "after") == Cursor(2, tag)
        assert Cursor.parse(PLAIN.cursor, "after") == Cursor(2, TAG)

    def test_a_reset_of_the_reader_s_leads_to_the_beginning(self) -> None:
        assert reset_event().cursor == ""
        assert Cursor.parse("", "after") == Cursor(0, "") == BEGINNING

    @pytest.mark.parametrize("given", [17, 0, True, None, b"2-0f1e2d3c", Cursor(2, TAG)])
    def test_what_is_no_string_is_refused_by_name(self, given: object) -> None:
        """A plain seq does not say whose event it counts."""
        with pytest.raises(TypeError, match=r"^last_event_id: .* not \w+$"):
            Cursor.parse(given, "last_event_id")

    @pytest.mark.parametrize(
        "given",
        [
            "17", "-4", "0-0f1e2d3c", "00-0f1e2d3c", "02-0f1e2d3c", "-2-0f1e2d3c", "2-",
            "2-0f1e2d3", "2-0f1e2d3c5", "2-0F1E2D3C", "2-0f1e2d3g", " 2-0f1e2d3c", "2-0f1e2d3c\n",
            "2_0f1e2d3c", "٢-0f1e2d3c", "9" * 16 + "-0f1e2d3c", "2-0f1e2d3c-1", "x" * 10_000, "\0",
            "None",
        ],
    )  # fmt: skip
    def test_what_no_event_gave_is_refused_by_name(self, given: str) -> None:
        with pytest.raises(ValueError, match=r"^after: must be an event's cursor") as caught:
            Cursor.parse(given, "after")
        assert len(str(caught.value)) < 200


def test_the_attempt_event_names_its_start() -> None:
    event = attempt_event(
        attempt=2, tag=TAG, seq=7, worker="w", model="m", model_revision="r", tokenizer_hash="h"
    )
    assert (event.type, event.start_seq, event.seq) == ("attempt", 7, 7)


def test_usage_adds_up_and_shows_the_cache_only_when_it_served() -> None:
    assert msgspec.to_builtins(Usage.of(3, 4)) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
    }
    details = Usage.of(3, 4, cached_tokens=2).prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == 2


def test_unknown_fields_are_ignored() -> None:
    data = b'{"v":1,"attempt":1,"seq":2,"type":"tokens","choices":[{"index":0,"new":1}],"x":{}}'
    assert decode(data) == tokens_event(attempt=1, seq=2, choices=[ChoiceDelta(0)])


def test_an_unknown_type_keeps_its_seq_whatever_its_fields_hold() -> None:
    data = b'{"v":2,"attempt":3,"tag":"0f1e2d3c","seq":4,"type":"audio","choices":"AAAA"}'
    assert decode(data) == Event(v=2, attempt=3, tag=TAG, seq=4, type="audio")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"v":1}',
        b'{"v":1,"attempt":1,"seq":"2","type":"tokens"}',
        b'{"v":1,"attempt":1,"seq":2,"type":"tokens","choices":"AAAA"}',
        b'{"v":1,"attempt":1,"seq":2,"type":"tokens","choices":[{"index":0,"text":"\xff"}]}',
        b'{"v":1,"attempt":1,"seq":2,"type":"x","y":' + b"[" * 100_000,
    ],
)
def test_what_is_no_event_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptEvent):
        decode(data)


texts = st.text(st.characters(exclude_categories=["Cs"]))
deltas = st.builds(
    ChoiceDelta,
    index=st.integers(0, 127),
    text=texts,
    token_ids=st.lists(st.integers(0, 2**20)),
    finish_reason=st.none() | st.sampled_from(["stop", "length", "error"]),
)
events = st.builds(
    Event,
    attempt=st.integers(1, 100),
    tag=texts,
    seq=st.integers(1, 2**53),
    type=texts,
    choices=st.lists(deltas, max_size=3),
    usage=st.none() | st.builds(Usage.of, st.integers(0, 99), st.integers(0, 99)),
    error=st.none() | st.builds(ErrorInfo, texts, texts, st.booleans()),
)


@given(events)
def test_what_is_encoded_is_decoded_equal(event: Event) -> None:
    assert decode(encode(event)) == event


def test_the_end_event_has_state_usage_and_error() -> None:
    event = end_event(
        attempt=1, tag=TAG, seq=5, state="failed", error=ErrorInfo("engine_error", "oops")
    )
    assert encode(event) == (
        b'{"v":1,"attempt":1,"tag":"0f1e2d3c","seq":5,"type":"end","state":"failed",'
        b'"error":{"code":"engine_error","message":"oops","retryable":false}}'
    )


def test_text_is_the_first_choices() -> None:
    event = tokens_event(attempt=1, seq=1, choices=[ChoiceDelta(1, "b"), ChoiceDelta(0, "a")])
    assert event.text == "a"
