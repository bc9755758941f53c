"""Lines of bulk files: what is run, what is ignored, what is refused and by which name."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.common.errors import InvalidBatch
from mlx_serving.common.job.checks import UNSUPPORTED
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.producer.batch.body import IGNORED, NEUTRAL
from mlx_serving.producer.batch.lines import BadLine, LineReader, RequestLine, custom_id_of
from mlx_serving.producer.batch.objects import CHAT, COMPLETIONS
from mlx_serving.producer.batch.options import BatchOptions

BATCH = "batch_0123456789abcdef"
MESSAGES = [{"role": "user", "content": "count from 1 to 3"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tally", "messages": MESSAGES} | fields


def openai_line(url: str = CHAT, *, custom_id: Any = "a", **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body(**fields)}


def read(line: Any, number: int = 7, **options: Any) -> RequestLine | BadLine:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    return LineReader(BATCH, BatchOptions.build(**options)).read(raw, number)


def good(line: Any, number: int = 7, **options: Any) -> RequestLine:
    found = read(line, number, **options)
    assert isinstance(found, RequestLine), found
    return found


def wrong(line: Any, **options: Any) -> dict[str | None, str]:
    found = read(line, **options)
    assert isinstance(found, BadLine), found
    assert all(error.line == 7 for error in found.errors)
    return {error.param: error.message for error in found.errors}


class TestOpenAI:
    def test_a_chat_line_is_a_bulk_job(self) -> None:
        request = good(openai_line(temperature=0.5, seed=3, n=1))
        assert (request.custom_id, request.url, request.line) == ("a", CHAT, 7)
        assert request.job.template_messages() == MESSAGES
        assert (request.job.temperature, request.job.seed) == (0.5, 3)
        assert (request.job.lane, request.job.stream) == ("bulk", False)

    @pytest.mark.parametrize("prompt", ["again", ["again"]])
    def test_a_completion_line(self, prompt: Any) -> None:
        line = openai_line(COMPLETIONS, messages=None, prompt=prompt, best_of=1, echo=False)
        assert good(line).job.prompt == "again"

    def test_a_line_is_the_same_job_however_often_it_is_read(self) -> None:
        first, again, other = good(openai_line()), good(openai_line()), good(openai_line(), 8)
        assert first.job == again.job
        assert first.job.job_id() == again.job.job_id() != other.job.job_id()
        assert first.job.seed not in {None, other.job.seed}
        assert LineReader(BATCH, BatchOptions()).job_id(7) == first.job.job_id()

    def test_max_completion_tokens_is_max_tokens(self) -> None:
        assert good(openai_line(max_completion_tokens=9), max_tokens=5).job.max_tokens == 9
        assert good(openai_line(max_tokens=9), max_tokens=5).job.max_tokens == 9
        assert good(openai_line(), max_tokens=5, temperature=0).job.max_tokens == 5

    def test_foreign_models_are_mapped(self) -> None:
        line = openai_line(model="gpt-4o-mini")
        assert good(line, model_map={"gpt-4o-mini": "tally"}).job.model == "tally"
        assert good(line).job.model == "gpt-4o-mini"

    @pytest.mark.parametrize("field", sorted(IGNORED))
    def test_what_changes_nothing_is_named_and_ignored(self, field: str) -> None:
        some: dict[str, Any] = {field: {"a": "b"}}
        none: dict[str, Any] = {field: None}
        assert good(openai_line(**some)).ignored == (field,)
        assert good(openai_line(**none)).ignored == ()

    def test_nulls_and_an_sdks_empty_fields_say_nothing(self) -> None:
        turn: dict[str, Any] = {"role": "assistant", "content": "3", "refusal": None}
        turn |= {"annotations": [], "tool_calls": None, "audio": None}
        line = openai_line(messages=[*MESSAGES, turn, *MESSAGES], logit_bias=None, tools=None)
        assert len(good(line).job.messages or ()) == 3

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"reasoning_effort": "low"}, "body.reasoning_effort"),
            ({"parallel_tool_calls": False}, "body.parallel_tool_calls"),
            ({"best_of": 3}, "body.best_of"),
            ({"temperature": 9}, "body.temperature"),
            ({"lane": "interactive"}, "body.lane"),
            ({"idempotency_key": "x"}, "body.idempotency_key"),
            ({"messages": [{"role": "user"}]}, "body.messages[0].content"),
            ({"messages": [*MESSAGES, {"role": "user", "content": 1}]}, "body.messages[1].content"),
            ({"model": None}, "body.model"),
            ({"prompt": "x"}, "body.prompt"),
        ],
    )
    def test_anything_else_is_an_error_with_its_path(
        self, fields: dict[str, Any], param: str
    ) -> None:
        assert list(wrong(openai_line(**fields))) == [param]

    def test_what_the_engine_can_not_do_is_refused_by_its_path(self) -> None:
        fields = [row.field for row in UNSUPPORTED if row.field == "adapter"]
        assert fields
        assert list(wrong(openai_line(adapter="x"))) == ["body.adapter"]

    def test_all_that_is_wrong_with_a_line_is_named(self) -> None:
        line = openai_line(custom_id="") | {"method": "GET", "url": "/v1/embeddings", "id": 1}
        assert list(wrong(line)) == ["id", "custom_id", "method", "url"]
        line = openai_line(temperature=9, top_p=0)
        assert list(wrong(line)) == ["body.temperature", "body.top_p"]
        found = read(line)
        assert isinstance(found, BadLine)
        assert (found.custom_id, found.summary.param, found.summary.line) == (
            "a", "body.temperature", 7,
        )  # fmt: skip
        assert "body.top_p" in found.summary.message

    @pytest.mark.parametrize("raw", [b"{", b"[1]", b"7", b"\xff", b"null", b"[" * 2000])
    def test_what_is_no_request_is_named_and_raises_nothing(self, raw: bytes) -> None:
        found = read(raw)
        assert isinstance(found, BadLine)
        assert found.errors[0].code == "invalid_json_line"

    def test_errors_never_repeat_a_prompt(self) -> None:
        found = read(openai_line(messages=[{"role": "user", "content": ["SECRET"]}]))
        assert isinstance(found, BadLine)
        assert "SECRET" not in str(found.errors)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [*GenerationJob.model_fields, *IGNORED, *NEUTRAL, "role", "content", "prompt"]
)


# A loaded machine may take its time.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class TestAnything:
    @unhurried
    @given(st.fixed_dictionaries({}, optional=dict.fromkeys(
        ("custom_id", "method", "url", "prompt", "body"), VALUES)))  # fmt: skip
    def test_no_line_raises(self, line: Any) -> None:
        assert isinstance(read(line), RequestLine | BadLine)

    @unhurried
    @given(st.dictionaries(NAMES, VALUES, max_size=5), st.sampled_from([CHAT, COMPLETIONS]))
    def test_no_body_raises_and_a_bad_one_is_named(self, fields: Any, url: str) -> None:
        line = {"custom_id": "a", "method": "POST", "url": url, "body": fields}
        found = read(line, model="tally")
        if isinstance(found, BadLine):
            assert all(str(error.param).startswith("body") for error in found.errors)

    @unhurried
    @given(st.binary(max_size=40))
    def test_no_bytes_raise(self, raw: bytes) -> None:
        assert isinstance(read(raw), RequestLine | BadLine)


class TestPlainPrompts:
    @pytest.mark.parametrize("line", ["count", {"prompt": "count"}])
    def test_a_prompt_is_a_chat_message(self, line: Any) -> None:
        request = good(line, model="tally")
        assert request.job.template_messages() == [{"role": "user", "content": "count"}]
        assert (request.custom_id, request.url) == ("line-7", CHAT)

    def test_raw_goes_on_as_it_is(self) -> None:
        request = good("count", model="tally", raw=True)
        assert (request.job.prompt, request.url) == ("count", COMPLETIONS)

    def test_a_prompt_may_have_a_name_and_settings(self) -> None:
        line = {"prompt": "x", "custom_id": "mine", "model": "tally", "temperature": 0, "user": "u"}
        request = good(line)
        assert (request.custom_id, request.job.temperature) == ("mine", 0)
        assert request.ignored == ("user",)
        assert custom_id_of(json.dumps(line).encode(), 7) == "mine"
        assert custom_id_of(b'"x"', 7) == "line-7"

    def test_a_prompt_without_a_model_is_an_error(self) -> None:
        assert list(wrong("count")) == ["model"]

    @pytest.mark.parametrize(
        ("line", "param"),
        [
            ({"prompt": 7, "model": "tally"}, "prompt"),
            ({"prompt": "x", "messages": MESSAGES, "model": "tally"}, "messages"),
            ({"prompt": "x", "model": "tally", "top_p": 7}, "top_p"),
            ({"prompt": "x", "model": "tally", "custom_id": 7}, "custom_id"),
            ({"prompt": "x", "model": "tally", "foreign": 7}, "foreign"),
        ],
    )
    def test_wrong_ones_are_named(self, line: Any, param: str) -> None:
        assert list(wrong(line)) == [param]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"completion_window": "soon"}, "completion_window"),
            ({"completion_window": "31d"}, "completion_window"),
            ({"model": "a:b"}, "model"),
            ({"model_map": {"x": ""}}, "model_map.x"),
            ({"depth": 0}, "depth"),
            ({"order": "random"}, "order"),
            ({"speed": 1}, "speed"),
            ({"max_tokens": "9"}, "max_tokens"),
        ],
    )
    def test_wrong_ones_are_named(self, options: dict[str, Any], named: str) -> None:
        with pytest.raises(InvalidBatch, match=named):
            BatchOptions.build(**options)

    @pytest.mark.parametrize(
        ("window", "seconds"), [("24h", 86_400), ("90m", 5400), ("2d", 172_800)]
    )
    def test_a_window_in_seconds(self, window: str, seconds: int) -> None:
        assert BatchOptions.build(completion_window=window).window_seconds == seconds
