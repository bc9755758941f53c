"""Durable text-generation jobs on Redis and RQ, run as one continuous batch on MLX.

    from mlx_serving import Client

    with Client() as client:
        job = client.submit(model="tally", prompt="count from 3 to 12")
        for text in job.text():
            print(text, end="", flush=True)

Names are imported when they are first used, so that a producer pays for nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mlx_serving.common.errors import (
        BatchNotFound,
        CorruptEvent,
        CorruptJob,
        EngineError,
        FieldError,
        ForeignFunction,
        IdempotencyConflict,
        InvalidBatch,
        InvalidJob,
        InvalidSettings,
        JobNotEnded,
        JobNotFound,
        JobTooLarge,
        LeaseLost,
        MissingDependency,
        MlxServingError,
        PayloadTooLarge,
        QueueFailure,
        QueueRefused,
        QueueUnavailable,
        ResultTimeout,
        StreamGap,
        StreamReset,
        TenantLimited,
        UnknownModel,
    )
    from mlx_serving.common.events import ChoiceDelta, ErrorInfo, Event, Usage
    from mlx_serving.common.job.messages import Message, TextPart, Tool, ToolCall
    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.common.results import (
        ChoiceResult,
        EventsGone,
        GenerationResult,
        JobCancelled,
        JobDead,
        JobExpired,
        JobFailed,
        Timings,
        UnsuccessfulJob,
    )
    from mlx_serving.common.settings import Settings, load_settings
    from mlx_serving.common.states import JobState
    from mlx_serving.producer.async_client import AsyncClient
    from mlx_serving.producer.client import Client

__version__: Final = "0.1.0"

__all__ = [
    "AsyncClient",
    "BatchNotFound",
    "ChoiceDelta",
    "ChoiceResult",
    "Client",
    "CorruptEvent",
    "CorruptJob",
    "EngineError",
    "ErrorInfo",
    "Event",
    "EventsGone",
    "FieldError",
    "ForeignFunction",
    "GenerationJob",
    "GenerationResult",
    "IdempotencyConflict",
    "InvalidBatch",
    "InvalidJob",
    "InvalidSettings",
    "JobCancelled",
    "JobDead",
    "JobExpired",
    "JobFailed",
    "JobNotEnded",
    "JobNotFound",
    "JobState",
    "JobTooLarge",
    "LeaseLost",
    "LocalRedis",
    "Message",
    "MissingDependency",
    "MlxServingError",
    "PayloadTooLarge",
    "QueueFailure",
    "QueueRefused",
    "QueueUnavailable",
    "ResultTimeout",
    "Settings",
    "StreamGap",
    "StreamReset",
    "TenantLimited",
    "TextPart",
    "Timings",
    "Tool",
    "ToolCall",
    "UnknownModel",
    "UnsuccessfulJob",
    "Usage",
    "__version__",
    "load_settings",
]

_ELSEWHERE: Final = {
    "AsyncClient": "producer.async_client",
    "Client": "producer.client",
    "ChoiceDelta": "common.events",
    "ErrorInfo": "common.events",
    "Event": "common.events",
    "Usage": "common.events",
    "GenerationJob": "common.job.schema",
    "LocalRedis": "common.redis.local",
    "Message": "common.job.messages",
    "TextPart": "common.job.messages",
    "Tool": "common.job.messages",
    "ToolCall": "common.job.messages",
    "ChoiceResult": "common.results",
    "EventsGone": "common.results",
    "GenerationResult": "common.results",
    "JobCancelled": "common.results",
    "JobDead": "common.results",
    "JobExpired": "common.results",
    "JobFailed": "common.results",
    "Timings": "common.results",
    "UnsuccessfulJob": "common.results",
    "Settings": "common.settings",
    "load_settings": "common.settings",
    "JobState": "common.states",
}
"""The module of each public name; those that are not listed are in `common.errors`."""


def __getattr__(name: str) -> object:
    """Import a public name on its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_ELSEWHERE.get(name, 'common.errors')}")
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
