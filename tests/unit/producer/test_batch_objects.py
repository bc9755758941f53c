"""What bulk files say is what the `openai` package's own types read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import Batch as OpenAIBatch
from openai.types import BatchError, Completion
from openai.types.chat import ChatCompletion

from mlx_serving.common.events import Usage
from mlx_serving.common.results import ChoiceResult, GenerationResult, Timings
from mlx_serving.common.states import JobState
from mlx_serving.producer.batch.folder import BatchFolder
from mlx_serving.producer.batch.index import LinePlace
from mlx_serving.producer.batch.objects import (
    CHAT,
    COMPLETIONS,
    Batch,
    ErrorList,
    LineError,
    RequestCounts,
)
from mlx_serving.producer.batch.records import body_of
from mlx_serving.producer.batch.results import Results
from mlx_serving.producer.batch.window import SubmittedLine

BATCH = "batch_0123456789abcdef"
STATUSES = (
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
    "cancelled",
)  # fmt: skip

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOKEN = {"token": "3", "logprob": -0.1, "bytes": [51], "top_logprobs": [
    {"token": "3", "logprob": -0.1, "bytes": [51]}, {"token": "4", "logprob": -2.5, "bytes": [52]},
]}  # fmt: skip


def strictly(kind: Any, data: Any) -> Any:
    """Parse with the package's model as pydantic would, without its leniency."""
    return kind.model_validate(data, strict=True)


def result(*choices: Any) -> GenerationResult:
    timings = Timings(1000, finished_ms=1_700_000_000_123)
    return GenerationResult(
        id="f" * 32,
        state=JobState.FINISHED,
        choices=list(choices),
        usage=Usage.of(11, 5, 8),
        timings=timings,
    )


CHOICE = ChoiceResult(index=0, text="1 2 3", token_ids=[1, 2, 3], finish_reason="stop")


@dataclass
class RichChoice:
    """A choice that has more than today's results do."""

    index: int = 0
    text: str = "1 2 3"
    finish_reason: str | None = "stop"
    tool_calls: Any = None
    logprobs: Any = None


@pytest.mark.parametrize("status", STATUSES)
def test_the_batch_object_in_every_status(status: Any) -> None:
    error = LineError(code="invalid_request", message="m", param="body.top_p", line=3)
    batch = Batch(
        id=BATCH, input_file_id="/in.jsonl", created_at=1, request_counts=RequestCounts(3, 1, 1),
        errors=ErrorList([error]), metadata={"a": "b"},
    )  # fmt: skip
    batch.move(status, 7.9)
    batch.usage.add(11, 5, 8)
    read = strictly(OpenAIBatch, msgspec.json.decode(msgspec.json.encode(batch)))
    assert (read.status, read.object) == (status, "batch")
    assert read.request_counts.model_dump() == {"total": 3, "completed": 1, "failed": 1}
    assert (read.usage.input_tokens, read.usage.output_tokens, read.usage.total_tokens) == (
        11,
        5,
        16,
    )
    assert read.usage.input_tokens_details.cached_tokens == 8
    assert read.errors.data[0].model_dump() == {
        "code": "invalid_request", "line": 3, "message": "m", "param": "body.top_p",
    }  # fmt: skip
    assert read.model_extra == {}
    if status != "validating":
        assert getattr(read, f"{status}_at") == 7


def test_a_chat_answer() -> None:
    body = body_of(result(CHOICE), url=CHAT, model="tally")
    read = strictly(ChatCompletion, body)
    assert read.choices[0].message.content == "1 2 3"
    assert read.choices[0].finish_reason == "stop"
    assert (read.created, read.model) == (1_700_000_000, "tally")
    assert read.usage.prompt_tokens_details.cached_tokens == 8


def test_a_plain_answer() -> None:
    body = body_of(result(CHOICE), url=COMPLETIONS, model="tally")
    read = strictly(Completion, body)
    assert (read.choices[0].text, read.choices[0].finish_reason) == ("1 2 3", "stop")


def test_all_choices_are_there() -> None:
    second = ChoiceResult(index=1, text="b", finish_reason="length")
    read = strictly(ChatCompletion, body_of(result(CHOICE, second), url=CHAT, model="m"))
    assert [(c.index, c.finish_reason) for c in read.choices] == [(0, "stop"), (1, "length")]


TERSE = {"token": "3", "logprob": -0.1, "top_logprobs": [
    {"token": "3", "logprob": -0.1}, {"token": "4", "logprob": -2.5},
]}  # fmt: skip


@pytest.mark.parametrize("logprobs", [{"content": [TOKEN]}, [TOKEN], {"content": [TERSE]}])
def test_log_probabilities_where_the_result_has_them(logprobs: Any) -> None:
    rich = result(RichChoice(logprobs=logprobs))
    read = strictly(ChatCompletion, body_of(rich, url=CHAT, model="m"))
    assert read.choices[0].logprobs.model_dump() == {"content": [TOKEN], "refusal": None}
    plain = strictly(Completion, body_of(rich, url=COMPLETIONS, model="m")).choices[0].logprobs
    assert (plain.tokens, plain.token_logprobs, plain.text_offset) == (["3"], [-0.1], [0])
    assert plain.top_logprobs == [{"3": -0.1, "4": -2.5}]


def test_tool_calls_where_the_result_has_them() -> None:
    rich = RichChoice(text="", tool_calls=[CALL], finish_reason="tool_calls")
    read = strictly(ChatCompletion, body_of(result(rich), url=CHAT, model="m"))
    assert read.choices[0].message.tool_calls[0].function.name == "f"
    assert read.choices[0].message.content is None


def test_a_result_with_little_in_it() -> None:
    bare = GenerationResult(id="x", state=JobState.FINISHED, choices=[ChoiceResult(index=0)])
    read = strictly(ChatCompletion, body_of(bare, url=CHAT, model="m"))
    assert (read.usage, read.choices[0].message.content) == (None, "")


def test_output_and_error_lines(tmp_path: Path) -> None:
    folder = BatchFolder.create(tmp_path / "batch")
    results = Results(folder, BATCH)
    going = SubmittedLine(LinePlace(4, 0, 1), "f" * 32, "mine", CHAT, "tally", ("store", "user"))
    results.finished(going, result(CHOICE))
    wrong = LineError(code="batch_expired", message="late", param="body.n", line=5)
    results.failed_line(5, "other", wrong)
    results.close()
    output = json.loads(folder.output.read_text())
    assert set(output) == {"id", "custom_id", "response", "error", "mlx_serving"}
    assert (output["custom_id"], output["error"]) == ("mine", None)
    assert output["response"]["status_code"] == 200
    assert strictly(ChatCompletion, output["response"]["body"]).usage.total_tokens == 16
    assert output["mlx_serving"] == {"line": 4, "job": "f" * 32, "ignored": ["store", "user"]}
    error = json.loads(folder.errors.read_text())
    assert (error["custom_id"], error["response"]) == ("other", None)
    read = strictly(BatchError, error["error"])
    assert (read.code, read.line, read.param) == ("batch_expired", 5, "body.n")
