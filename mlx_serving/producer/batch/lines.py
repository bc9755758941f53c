"""Reads a line of a bulk file: OpenAI's Batch form, or a plain prompt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mlx_serving.common import limits
from mlx_serving.common.errors import FieldError, InvalidJob
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.producer.batch.body import job_fields
from mlx_serving.producer.batch.objects import CHAT, COMPLETIONS, ENDPOINTS, LineError

if TYPE_CHECKING:
    from mlx_serving.producer.batch.options import BatchOptions

CUSTOM_ID_CHARS: Final = 512
LINE_BYTES: Final = 4 * limits.PAYLOAD_BYTES  # JSON may escape each byte of a text
_FORM: Final = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A line that can be run. `ignored` names the body's fields that change nothing."""

    line: int
    custom_id: str
    url: str
    job: GenerationJob
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that can't be run, with an error a wrong field; `custom_id` is None if unreadable."""

    line: int
    custom_id: str | None
    errors: tuple[LineError, ...]

    @property
    def summary(self) -> LineError:
        """All of its errors in one."""
        first = self.errors[0]
        texts = [f"{e.param}: {e.message}" if e.param else e.message for e in self.errors]
        return LineError(
            code=first.code, message="; ".join(texts), param=first.param, line=self.line
        )


class LineReader:
    """Reads the lines of one batch.

    A line's job is the same however often it is read: its idempotency key is the batch's id and
    the line's number, and a seed that the line leaves out is derived from these.
    """

    def __init__(self, batch_id: str, options: BatchOptions) -> None:
        self._batch_id = batch_id
        self._options = options
        given = {"max_tokens": options.max_tokens, "temperature": options.temperature}
        self._defaults = {name: value for name, value in given.items() if value is not None}

    def key(self, line: int) -> str:
        """Idempotency key of a line's job."""
        return f"{self._batch_id}:{line}"

    def job_id(self, line: int) -> str:
        """Id of a line's job, which `GenerationJob` derives from its key."""
        key, tenant = self.key(line), self._options.tenant
        return GenerationJob.model_construct(idempotency_key=key, tenant=tenant).job_id()

    def read(self, raw: bytes, line: int) -> RequestLine | BadLine:
        """Read a line; what is wrong with it is returned, never raised."""
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _bad(line, None, "invalid_json_line", [FieldError("", f"is not JSON: {error}")])
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            reason = "must be an object or a string"
            return _bad(line, None, "invalid_json_line", [FieldError("", reason)])
        if "prompt" in value and not {"body", "url", "method"} & value.keys():
            return self._plain(value, line)
        return self._form(value, line)

    def _form(self, value: dict[str, Any], line: int) -> RequestLine | BadLine:
        """Read OpenAI's form: custom_id, method, url, body."""
        custom_id = value.get("custom_id")
        errors = [*_form_errors(value)]
        if errors:
            known = custom_id if isinstance(custom_id, str) else None
            return _bad(line, known, "invalid_request", errors)
        return self._request(line, value["custom_id"], value["url"], value["body"], "body")

    def _plain(self, value: dict[str, Any], line: int) -> RequestLine | BadLine:
        """Read a plain prompt; any field of a body may stand beside it."""
        body = dict(value)
        custom_id = body.pop("custom_id", f"line-{line}")
        if errors := [*_custom_id_errors(custom_id)]:
            return _bad(line, None, "invalid_request", errors)
        if self._options.raw:
            return self._request(line, custom_id, COMPLETIONS, body, "")
        prompt = body.pop("prompt")
        errors = []
        if not isinstance(prompt, str):
            errors.append(FieldError("prompt", "must be a string"))
        if "messages" in body:
            errors.append(FieldError("messages", "give messages or a prompt, not both"))
        if errors:
            return _bad(line, custom_id, "invalid_request", errors)
        body["messages"] = [{"role": "user", "content": prompt}]
        return self._request(line, custom_id, CHAT, body, "")

    def _request(
        self, line: int, custom_id: str, url: str, body: dict[str, Any], path: str
    ) -> RequestLine | BadLine:
        fields, ignored, errors = job_fields(body, url)
        if not errors:
            try:
                job = GenerationJob.parse(self._with_defaults(fields, line))
            except InvalidJob as error:
                errors = error.errors
            else:
                return RequestLine(line, custom_id, url, job, ignored)
        errors = [FieldError(_joined(path, error.path), error.reason) for error in errors]
        return _bad(line, custom_id, "invalid_request", errors)

    def _with_defaults(self, fields: dict[str, Any], line: int) -> dict[str, Any]:
        options = self._options
        model = fields.get("model", options.model)
        if isinstance(model, str):
            model = options.model_map.get(model, model)
        named = {"max_tokens", "max_completion_tokens"} & fields.keys()
        defaults = {k: v for k, v in self._defaults.items() if not (k == "max_tokens" and named)}
        digest = hashlib.sha256(self.key(line).encode()).digest()
        return {
            "seed": int.from_bytes(digest[:8]), **defaults, **fields,
            **({"model": model} if model is not None else {}),
            "lane": "bulk", "stream": False, "result_ttl": options.result_ttl,
            "idempotency_key": self.key(line), "tenant": options.tenant,
        }  # fmt: skip


def custom_id_of(raw: bytes, line: int) -> str | None:
    """Custom id of a line that was read before; None if it isn't JSON."""
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    return custom_id if isinstance(custom_id, str) else f"line-{line}"


def _form_errors(value: dict[str, Any]) -> list[FieldError]:
    errors = [FieldError(name, "is not a known field") for name in sorted(value.keys() - _FORM)]
    errors += _custom_id_errors(value.get("custom_id"))
    if value.get("method") != "POST":
        errors.append(FieldError("method", 'must be "POST"'))
    if value.get("url") not in ENDPOINTS:
        errors.append(FieldError("url", f"must be {' or '.join(ENDPOINTS)}"))
    if not isinstance(value.get("body"), dict):
        errors.append(FieldError("body", "must be an object"))
    return errors


def _custom_id_errors(custom_id: object) -> list[FieldError]:
    if not isinstance(custom_id, str) or not custom_id:
        return [FieldError("custom_id", "must be a string that is not empty")]
    if len(custom_id) > CUSTOM_ID_CHARS:
        return [FieldError("custom_id", f"has more than {CUSTOM_ID_CHARS} characters")]
    return []


def _joined(parent: str, path: str) -> str:
    return f"{parent}.{path}" if parent and path else parent or path


def _bad(line: int, custom_id: str | None, code: str, errors: list[FieldError]) -> BadLine:
    return BadLine(
        line,
        custom_id,
        tuple(
            LineError(code=code, message=e.reason, param=e.path or None, line=line) for e in errors
        ),
    )
