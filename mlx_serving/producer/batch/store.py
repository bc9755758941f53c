"""Reads and deletes many jobs at once in Redis, for the collector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from redis.exceptions import ResponseError

from mlx_serving.common import results
from mlx_serving.common.errors import CorruptEvent, CorruptJob
from mlx_serving.common.events import decode
from mlx_serving.common.protocol import calls, ended_calls
from mlx_serving.common.protocol.client import Protocol, parse_record
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.protocol.stored_events import payloads
from mlx_serving.common.redis.connection import connect
from mlx_serving.common.redis.retrying import answered
from mlx_serving.common.results import GenerationResult, Timings
from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.redis.connection import Endpoint

T = TypeVar("T")

SCRIPT_JOBS: Final = 32  # jobs in one script: a longer one would block other clients
CANCELLED_BY_BATCH: Final = "cancelled_by_batch"
DEADLINE: Final = "deadline_exceeded"
"""Reasons to cancel a job; by the second one it ends as expired."""


class JobStore:
    """Reads and ends jobs by the hundred, one round trip a call.

    Raises:
        QueueUnavailable: from every call, if Redis is away; it may be made again.

    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._keys = endpoint.keys
        self._redis = connect(endpoint)
        self._protocol = Protocol(self._redis, self._keys)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def states(self, job_ids: Sequence[str]) -> list[str | None]:
        """State of each job as its control hash has it; None if there is no such job.

        A key of another type counts as failed; `results` says why.
        """
        found = self._pipelined(
            lambda pipe: [pipe.hget(self._keys.job(i), JobField.STATE) for i in job_ids]
        )
        return [_state(state) for state in found]

    def results(self, job_ids: Sequence[str]) -> list[GenerationResult | None]:
        """Result record of each ended job; None if the job is gone."""
        raw = self._pipelined(lambda pipe: [pipe.hgetall(self._keys.job(i)) for i in job_ids])
        return [self._result(*pair) for pair in zip(job_ids, raw, strict=True)]

    def cancel(self, job_ids: Sequence[str], reason: str) -> None:
        """Cancel each; idempotent."""
        wanted = [calls.cancel(job_id, reason) for job_id in job_ids]
        answered(lambda: self._protocol.run_many(wanted))

    def forget(self, job_ids: Sequence[str]) -> None:
        """Delete ended jobs whose results are on disk, before their `result_ttl` does."""
        wanted = [
            ended_calls.forget(job_ids[at : at + SCRIPT_JOBS])
            for at in range(0, len(job_ids), SCRIPT_JOBS)
        ]
        answered(lambda: self._protocol.run_many(wanted))

    def _result(self, job_id: str, raw: Any) -> GenerationResult | None:  # noqa: ANN401 -- redis-py's union
        try:
            _check(job_id, raw)
            record = parse_record(job_id, raw)
            return None if record is None else self._read(record)
        except (CorruptJob, CorruptEvent) as error:
            info = results.error_info(error)
            return GenerationResult(id=job_id, state=JobState.FAILED, error=info)

    def _read(self, record: JobRecord) -> GenerationResult:
        if record.result:
            return results.decode_result(record.result)
        key = self._keys.events(record.job_id)
        (entries,) = self._pipelined(lambda pipe: pipe.xrange(key, "-", "+"))
        _check(record.job_id, entries)
        timings = Timings(record.enqueued_ms or None, finished_ms=record.finished_ms or None)
        events = map(decode, payloads(entries))
        return results.assemble(record.job_id, events, state=record.state, timings=timings)

    def _pipelined(self, send: Callable[[Any], object]) -> list[Any]:
        """Run a pipeline; the error of a key of another type is returned, all others are raised."""

        def run() -> list[Any]:
            with self._redis.pipeline(transaction=False) as pipe:
                send(pipe)
                answers = pipe.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception) and not _is_foreign(answer):
                    raise answer
            return answers

        return answered(run)


def _is_foreign(answer: object) -> bool:
    """Whether Redis answered that a key holds another type."""
    return isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")


def _state(answer: Any) -> str | None:  # noqa: ANN401 -- redis-py's union
    if _is_foreign(answer):
        return JobState.FAILED.value
    return None if answer is None else str(answer.decode(errors="replace"))


def _check(job_id: str, answer: object) -> None:
    if _is_foreign(answer):
        raise CorruptJob(f"what Redis holds under job {job_id!r} can't be read")
