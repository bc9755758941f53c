"""What `Client` and `AsyncClient` share: everything except I/O."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

from mlx_serving.common import results
from mlx_serving.common.attempts import TAG_CHARS
from mlx_serving.common.errors import (
    CorruptJob,
    FieldError,
    InvalidJob,
    JobNotFound,
    ResultTimeout,
    StreamReset,
)
from mlx_serving.common.events import RESET, Cursor, decode
from mlx_serving.common.lifetimes import Lifetimes
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.protocol.stored_events import payloads
from mlx_serving.common.redis.connection import resolve
from mlx_serving.common.results import EventsGone, GenerationResult, Timings
from mlx_serving.common.signing import Signer
from mlx_serving.common.states import TERMINAL, JobState
from mlx_serving.producer.assembler import StreamAssembler
from mlx_serving.producer.envelope import seal
from mlx_serving.producer.patience import SILENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mlx_serving.common.events import Event
    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.protocol.calls import Call, EnqueueEntry, EnqueueReply
    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.redis.connection import Endpoint
    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.end_watch import EndWatch

    Reader = StreamAssembler | EndWatch
    JobLike = GenerationJob | Mapping[str, Any]

CANCELLED_BY_CLIENT: Final = "cancelled_by_client"
SUBMIT_BATCH: Final = 256  # jobs in a round trip of submit_many
SCRIPT_BATCH: Final = 32  # jobs in one script: a longer one would block other clients
_SNAPSHOT: Final = (JobField.STATE, JobField.SEQ, JobField.STREAM, JobField.NONCE)
PAGE_EVENTS: Final = 1000  # events in one read of a job's stream


class BaseClient:
    """Builds what is sent and reads what comes back.

    A client speaks to one Redis: that of ``model`` and ``tenant`` if the settings name
    one for them, else the common one.

    Args:
        url: Redis URL, instead of the one in the settings.
        settings: by default read from file and environment.
        model: the model whose Redis to use, for deployments with several.
        tenant: the tenant whose Redis to use.

    Raises:
        InvalidSettings: a setting or the URL is wrong.

    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        model: str | None = None,
        tenant: str | None = None,
    ) -> None:
        self.settings = _settings(url, settings)
        self.endpoint = resolve(self.settings, model, tenant)
        self.keys = self.endpoint.keys
        # Remembered: a batch asks it for each job.
        self._serves = lru_cache(maxsize=256)(partial(_is_at, self.endpoint, self.settings))
        jobs = self.settings.jobs
        self._signer = Signer(key.get_secret_value() for key in jobs.signing_keys)
        self._lifetimes = Lifetimes(jobs.queued_ttl, jobs.events_ttl, jobs.failed_ttl)

    def _seal(self, job: JobLike | None, fields: Mapping[str, Any]) -> EnqueueEntry:
        """Validate a job given as an object, a mapping or keywords, and seal it."""
        if job is not None and fields:
            raise TypeError("give a job or its fields as keywords, not both")
        # pydantic's models take a fifth of the import's time: the first job pays it.
        from mlx_serving.common.job.schema import GenerationJob

        if not isinstance(job, GenerationJob):
            job = GenerationJob.parse(dict(fields if job is None else _mapping(job)))
        if not self._serves(job.model, job.tenant):
            reason = "is served by another Redis than this client's: open a Client(model=…) for it"
            raise InvalidJob([FieldError("model", reason)])
        limit = self.settings.jobs.max_bytes
        return seal(job, max_payload_bytes=limit, signer=self._signer, lifetimes=self._lifetimes)

    def _seal_all(self, jobs: Iterable[JobLike]) -> list[EnqueueEntry]:
        """Seal every job, or raise the errors of all that are wrong, each under ``jobs[i].``."""
        entries: list[EnqueueEntry] = []
        errors: list[FieldError] = []
        for index, job in enumerate(jobs):
            try:
                entries.append(self._seal(job, {}))
            except InvalidJob as error:
                errors += [_under(f"jobs[{index}]", wrong) for wrong in error.errors]
        if errors:
            raise InvalidJob(errors)
        return entries

    def _queue_snapshot(self, pipe: Any, job_id: str, after_seq: int | None) -> None:  # noqa: ANN401 -- a sync or async pipeline
        """Queue a read of a job: first its control hash, so that the stream is at least as new.

        The stream is not read if `after_seq` is None.
        """
        pipe.hmget(self.keys.job(job_id), *_SNAPSHOT)
        if after_seq is not None:
            pipe.xrange(self.keys.events(job_id), f"({after_seq}-0", "+", count=PAGE_EVENTS)

    @staticmethod
    def _feed(reader: Reader, job_id: str, replies: Sequence[Any]) -> list[Event]:
        """Feed a reader what `_queue_snapshot` read; return the events that are ready.

        Raises:
            JobNotFound: there is no such job, or its result has expired.
            EventsGone: it ended, and events that the consumer lacks are no longer kept.
            CorruptJob: its control hash can't be read.

        """
        (state, seq, publishes, nonce), *read = replies
        if state is None:
            raise not_found(job_id)
        try:
            committed, now = max(0, int(seq or 0)), JobState(state.decode())
        except ValueError:
            raise CorruptJob(f"the control hash of job {job_id!r} can't be read") from None
        entries = read[0] if read else []
        if (
            isinstance(reader, StreamAssembler)
            and (now in TERMINAL and not entries)
            and committed > reader.replay_from
        ):
            tag = (nonce or b"").decode(errors="replace")[:TAG_CHARS]
            if reader.is_at(Cursor(committed, tag)):
                return []
            raise EventsGone(f"the events of job {job_id} are gone: it ended too long ago")
        return reader.replay(
            payloads(entries),
            committed=committed,
            over=now in TERMINAL,
            waiting=now is JobState.QUEUED,
            publishes=publishes != b"0",
            more=len(entries) == PAGE_EVENTS,
        )

    @staticmethod
    def _result(record: JobRecord, payloads: Sequence[bytes]) -> GenerationResult:
        """Read a result record; if no worker wrote one, build it from the events."""
        if record.result:
            return results.decode_result(record.result)
        timings = Timings(
            enqueued_ms=record.enqueued_ms or None,
            started_ms=record.started_ms or None,
            first_token_ms=record.first_token_ms or None,
            finished_ms=record.finished_ms or None,
        )
        events = map(decode, payloads)
        return results.assemble(record.job_id, events, state=record.state, timings=timings)


def _is_at(endpoint: Endpoint, settings: Settings, model: str, tenant: str | None) -> bool:
    return resolve(settings, model, tenant) == endpoint


def batches(entries: Sequence[EnqueueEntry]) -> Iterable[list[Call[list[EnqueueReply]]]]:
    """Split jobs into the calls of one round trip each."""
    for start in range(0, len(entries), SUBMIT_BATCH):
        batch = entries[start : start + SUBMIT_BATCH]
        yield [
            calls.enqueue_many(batch[first : first + SCRIPT_BATCH])
            for first in range(0, len(batch), SCRIPT_BATCH)
        ]


def text_of(event: Event) -> str:
    """Text that an event adds to choice 0.

    Raises:
        StreamReset: the event takes earlier text back, which the caller already has.

    """
    if event.type == RESET:
        raise StreamReset(cursor=event.cursor)
    return event.text


def wait_s(reader: Reader, deadline_s: float | None, now_s: float) -> float:
    """Seconds to wait for the next message, at most until the deadline.

    Long waits differ by a fifth, so that readers that began together do not read together.

    Raises:
        ResultTimeout: the deadline has passed.

    """
    seconds = reader.patience_s
    if seconds > SILENCE_S:
        seconds *= random.uniform(0.8, 1.0)  # noqa: S311 -- jitter
    if deadline_s is None:
        return seconds
    if now_s >= deadline_s:
        raise ResultTimeout
    return min(seconds, deadline_s - now_s)


def not_found(job_id: str) -> JobNotFound:
    """Build the error for a job that does not exist."""
    return JobNotFound(f"there is no job {job_id!r}, or its result has expired")


def _settings(url: str | None, settings: Settings | None) -> Settings:
    # pydantic takes most of the import's time: only callers that read settings pay for it.
    from mlx_serving.common.settings import load_settings

    if settings is None:
        return load_settings() if url is None else load_settings(redis__url=url)
    return settings if url is None else settings.replace(redis__url=url)


def _mapping(job: object) -> Mapping[str, Any]:
    if not isinstance(job, Mapping):
        reason = f"a job is a GenerationJob or a mapping of its fields, not {type(job).__name__}"
        raise InvalidJob([FieldError("", reason)])
    return job


def check_id(job_id: object) -> str:
    """Return a job's id, checked.

    Raises:
        TypeError: it is not a string, and Redis would fail with a worse message.
        ValueError: it is no text that can be sent.

    """
    if not isinstance(job_id, str):
        raise TypeError(f"job_id: must be a string, not {type(job_id).__name__}")
    try:
        job_id.encode()
    except UnicodeEncodeError:
        raise ValueError(f"job_id: {job_id!r} can't be encoded as UTF-8") from None
    return job_id


def _under(parent: str, error: FieldError) -> FieldError:
    return FieldError(f"{parent}.{error.path}" if error.path else parent, error.reason)
