"""Stops a worker for good at a chosen point, so that a kill falls exactly there."""

from __future__ import annotations

import time
from typing import Any

FROZEN = "frozen at"  # in the worker's log


def freeze(where: str) -> None:
    """Stop the first job for good: `claim` (before it is read), `prefill:N` (as its Nth chunk
    begins), or `tokens:N` (once N of its tokens are handed to the publisher)."""
    what, _, count = where.partition(":")
    {"claim": _claim, "prefill": _prefill, "tokens": _tokens}[what](where, int(count or 0))


def _stop(where: str) -> None:
    print(FROZEN, where, flush=True)  # noqa: T201 -- the test reads it
    time.sleep(3600)


def is_job(request_id: str) -> bool:
    """Whether this is a job's, and not one of the engine's own warm-up."""
    return ":" in request_id


def _claim(where: str, _: int) -> None:
    from mlx_serving.worker.dispatcher import Dispatcher

    Dispatcher._prepare = lambda *_: _stop(where)  # type: ignore[assignment, method-assign]


def _prefill(where: str, count: int) -> None:
    from mlx_serving.worker.engine.prefilling import Prefilling

    chunks = iter(range(1, 1 << 30))
    prefill = Prefilling._try_prefill

    def stopping(prefilling: Prefilling, chunk: Any) -> Any:
        if is_job(chunk.rows[0].request.id) and next(chunks) == count:
            _stop(where)
        return prefill(prefilling, chunk)

    Prefilling._try_prefill = stopping  # type: ignore[assignment, method-assign]


def _tokens(where: str, count: int) -> None:
    from mlx_serving.worker.engine.engine import Engine

    step = Engine.step
    told = [0]

    def stopping(engine: Engine) -> Any:
        if told[0] >= count:
            _stop(where)
        outputs = step(engine)
        told[0] += sum(len(o.token_ids) for o in outputs if is_job(o.request_id))
        return outputs

    Engine.step = stopping  # type: ignore[assignment, method-assign]
