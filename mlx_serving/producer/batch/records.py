"""Lines of the result files in OpenAI's form, built from our result records."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mlx_serving.producer.batch.objects import CHAT, LineError

if TYPE_CHECKING:
    from mlx_serving.common.events import Usage
    from mlx_serving.common.results import ChoiceResult, GenerationResult

_ID: Final = re.compile(r"batch_req_([0-9a-f]+)_(\d+)")


class Extra(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Our own addition to OpenAI's fields: the line, its job, the fields that were ignored."""

    line: int
    job: str | None = None
    ignored: tuple[str, ...] = ()


class Response(msgspec.Struct, frozen=True):
    """The response that OpenAI's API would have given."""

    status_code: int
    request_id: str
    body: dict[str, Any]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the output file (`response` set) or of the error file (`error` set)."""

    id: str
    custom_id: str | None
    response: Response | None = None
    error: LineError | None = None
    mlx_serving: Extra


def record_id(batch_id: str, line: int) -> str:
    """Id of a result line; the number of the input line in it makes the file its own journal."""
    return f"batch_req_{batch_id.rpartition('_')[2]}_{line}"


def line_of(record: str, batch_id: str) -> int | None:
    """Input line of a result line; None if it belongs to another batch."""
    match = _ID.fullmatch(record)
    if match is None or match[1] != batch_id.rpartition("_")[2]:
        return None
    return int(match[2])


def body_of(result: GenerationResult, *, url: str, model: str) -> dict[str, Any]:
    """The completion object of a result, with all its choices.

    A choice's tool calls, log probabilities and reasoning are included if it has them.
    """
    timings = result.timings
    chat = url == CHAT
    to_choice = _chat_choice if chat else _text_choice
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{result.id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": (timings.finished_ms or timings.enqueued_ms or 0) // 1000,
        "model": model,
        "choices": [to_choice(choice) for choice in result.choices],
    }
    return body if result.usage is None else body | {"usage": _usage(result.usage)}


def _chat_choice(choice: ChoiceResult) -> dict[str, Any]:
    calls = _part(choice, "tool_calls")
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if calls:
        message |= {"content": choice.text or None, "tool_calls": calls}
    if reasoning := _part(choice, "reasoning"):
        message["reasoning_content"] = reasoning
    return {
        "index": choice.index,
        "message": message,
        "logprobs": _logprobs(choice),
        "finish_reason": choice.finish_reason or "stop",
    }


def _text_choice(choice: ChoiceResult) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": _text_logprobs(_logprobs(choice)),
        "finish_reason": choice.finish_reason or "stop",
    }


def _part(choice: ChoiceResult, name: str) -> Any:  # noqa: ANN401 -- any part of a result
    """An optional part of a choice as plain data; None if it is absent or empty."""
    value = getattr(choice, name, None)
    return msgspec.to_builtins(value) if value else None


def _logprobs(choice: ChoiceResult) -> dict[str, Any] | None:
    """Log probabilities in the chat API's form."""
    value = _part(choice, "logprobs")
    if value is None:
        return None
    content = value if isinstance(value, list) else value.get("content", [])
    return {"content": [_token(entry) for entry in content], "refusal": None}


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    """One position, with what results leave out: bytes equal to the token's UTF-8, empty lists."""
    tops = [_with_bytes(top) for top in entry.get("top_logprobs") or ()]
    return _with_bytes(entry) | {"top_logprobs": tops}


def _with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    raw = entry.get("bytes")
    return entry | {"bytes": list(entry["token"].encode()) if raw is None else raw}


def _text_logprobs(logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Turn the chat API's form of log probabilities into that of completions."""
    if logprobs is None:
        return None
    content = logprobs["content"]
    return {
        "tokens": [token["token"] for token in content],
        "token_logprobs": [token["logprob"] for token in content],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in content
        ],
        "text_offset": _offsets([token["token"] for token in content]),
    }


def _offsets(tokens: list[str]) -> list[int]:
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return offsets


def _usage(usage: Usage) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(usage)
    return plain
