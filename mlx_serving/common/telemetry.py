"""Logs: structlog over the standard library's logging, as JSON lines or for a console.

Prompts and outputs never reach a log: keys that name them are redacted at any depth, values that
hold jobs, events or results are replaced by their type's name, and tracebacks hold neither local
variables nor the messages of foreign exceptions. Text from others (ids, names) can neither begin
a line of the log nor send control characters to a terminal.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

import msgspec
import structlog
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from structlog.typing import EventDict, Processor, WrappedLogger

REDACTED: Final = "[redacted]"

PRIVATE_KEYS: Final = frozenset(
    {
        "prompt", "messages", "message_content", "content", "text", "texts", "token_ids", "tokens",
        "output", "outputs", "completion", "choices", "stop", "tools", "tool_calls", "arguments",
        "metadata", "job_data", "payload", "result", "wire", "logit_bias", "password", "secret",
        "authorization", "api_key", "url", "redis_url",
    }
)  # fmt: skip
"""Log keys whose values may hold what a user wrote, what a model wrote, or a secret."""

_CONTAINERS: Final = (dict, list, tuple, set, frozenset)
_MAX_DEPTH: Final = 4
_MAX_CHARS: Final = 2000


def configure_logging(
    *,
    log_format: Literal["json", "console"] = "console",
    level: str = "info",
    stream: TextIO | None = None,
) -> None:
    """Send structlog's and the standard library's records to `stream` (stderr) in one form.

    Call it once a process, from its entry point; importing mlx-serving configures nothing.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        format_error,
        redact,
        structlog.stdlib.PositionalArgumentsFormatter(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.addFilter(GuardArguments())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _renderer(log_format),
            ],
            foreign_pre_chain=shared,
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _renderer(log_format: str) -> Processor:
    if log_format == "json":
        return structlog.processors.JSONRenderer(serializer=_to_json)
    return structlog.dev.ConsoleRenderer(
        colors=False, exception_formatter=structlog.dev.plain_traceback
    )


def _to_json(value: object, **_: Any) -> str:
    return msgspec.json.encode(value, enc_hook=repr).decode()


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Logger of a module; usable before `configure_logging`, which it picks up later."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger


def says(logger: WrappedLogger, level: int) -> bool:
    """Whether records of this level are logged; if not, the caller need not gather their fields."""
    is_enabled = getattr(logger, "isEnabledFor", None)  # not every structlog configuration has it
    return is_enabled is None or bool(is_enabled(level))


@contextlib.contextmanager
def job_context(
    job_id: str, *, attempt: int | None = None, traceparent: str | None = None
) -> Iterator[None]:
    """Name the job (and attempt and trace) in every record logged inside."""
    fields: dict[str, object] = {"job_id": job_id}
    if attempt is not None:
        fields["attempt"] = attempt
    if traceparent is not None:
        fields["trace_id"] = trace_id(traceparent)
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def trace_id(traceparent: str) -> str:
    """Trace id (32 hex digits) of a W3C `traceparent`."""
    return traceparent.split("-")[1]


def format_error(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Structlog processor: `exc_info` as a traceback.

    Of an exception that is not ours only the type is shown: its message may hold a prompt. A
    caller that knows that it can't (a model failed to load) passes `show_words=True`.
    """
    show_words = bool(event.pop("show_words", False))
    error = _exception(event.pop("exc_info", None))
    if error is not None:
        lines = traceback.format_exception(error if show_words else _wordless(error))
        event["exception"] = "".join(lines).rstrip()
    return event


def _exception(exc_info: object) -> BaseException | None:
    if isinstance(exc_info, BaseException):
        return exc_info
    found = exc_info[1] if isinstance(exc_info, tuple) else sys.exc_info()[1] if exc_info else None
    return found if isinstance(found, BaseException) else None


def _wordless(error: BaseException) -> BaseException:
    """Copy an exception and its causes with types and frames, but only our own messages."""
    kind = type(error)
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    stand_in: type[BaseException] = type(kind.__name__, (Exception,), names)
    shown = stand_in(str(error)) if ours else stand_in()
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    shown.__cause__ = None if cause is None else _wordless(cause)
    return shown.with_traceback(error.__traceback__)


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Structlog processor: blank out what may hold a prompt, an output or a secret."""
    internal = {k: v for k, v in event.items() if k.startswith("_") or k == "exception"}
    shown = {key: value for key, value in event.items() if key not in internal}
    return {**_redacted_items(shown, 0), **internal}


def on_one_line(text: str) -> str:
    r"""Text that a log can hold: no line break, no terminal control (as `\x1b`), not too long."""
    text = text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}…"
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "backslashreplace").decode()


def _redacted_items(items: dict[Any, Any], depth: int) -> dict[Any, Any]:
    return {
        _redacted(key, depth): _redacted(value, depth) if _is_public(key, value) else REDACTED
        for key, value in items.items()
    }


def _is_public(key: object, value: object) -> bool:
    """Numbers may have a private name: `tokens=5` reveals nothing."""
    return isinstance(value, (int, float)) or str(key).lower() not in PRIVATE_KEYS


def _redacted(value: object, depth: int) -> object:
    if isinstance(value, (BaseModel, msgspec.Struct, bytes, bytearray)):
        return f"<{type(value).__name__}>"
    if isinstance(value, _CONTAINERS) and depth >= _MAX_DEPTH:
        return REDACTED
    if isinstance(value, str):
        return on_one_line(value)
    if isinstance(value, dict):
        return _redacted_items(value, depth + 1)
    if isinstance(value, _CONTAINERS):
        items = [_redacted(item, depth + 1) for item in value]
        # structlog's positional arguments have to stay a tuple.
        return tuple(items) if isinstance(value, tuple) else items
    return value


class GuardArguments(logging.Filter):
    """For records of other libraries: `%s` shows scalars, and only the type of anything else."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the arguments in place; keep the record."""
        if isinstance(record.args, tuple):
            record.args = tuple(map(_scalar, record.args))
        elif isinstance(record.args, dict):
            record.args = {key: _scalar(value) for key, value in record.args.items()}
        return True


def _scalar(value: object) -> object:
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, str):
        return on_one_line(value)
    keep = value is None or isinstance(value, (int, float, type))
    return value if keep else f"<{type(value).__name__}>"
