"""Every error that mlx-serving raises on purpose.

* MlxServingError
  * InvalidJob            fields of a job are wrong; `.errors` names each one
    * UnknownModel        no alias in the settings names this model, or its files can't be loaded
      * ModelUnreachable  its files are on a hub that does not answer now
    * PayloadTooLarge     the job is larger than the limit on its bytes
    * ContextLengthExceeded  prompt and answer are longer than the model's context
    * InvalidSchema       a schema, regex or grammar that the worker can't enforce
    * IdempotencyConflict its idempotency key names a job with another payload
    * TenantRowsExceeded  its `n` is more rows than its tenant may run
  * CorruptJob            what Redis holds under a job's id is not a job of ours
    * ForeignFunction     it names a function, callback or webhook that is not ours
    * BadSignature        it is not signed by a key that this worker knows
  * CorruptEvent          an entry of a job's stream is not an event of ours
  * JobNotFound           no such job, its `result_ttl` is over, or it was forgotten
  * JobNotEnded           the job waits or runs, so it can't be forgotten
  * EventsGone            (in `results`) the job ended long ago; `.result` has its output
  * UnsuccessfulJob       (in `results`) the job ended, but did not finish; `.result` keeps its text
    * JobFailed
      * JobDead           it crashed the engine while it ran alone, or used up its attempts
    * JobCancelled
    * JobExpired
  * InvalidBatch          a bulk file can't be run as asked; `.errors` says why
  * BatchNotFound         no such batch, or not on this machine
  * ResultTimeout         the job did not end within the caller's timeout; it goes on
  * StreamGap             events of the job's stream are missing
  * StreamReset           the job began anew; its new text starts after `.cursor`
  * QueueFailure          Redis did not do what it was asked to
    * QueueUnavailable    it can't be reached, or can't answer now
      * RedisLoading      it reads its data from disk
      * RedisReadOnly     it is a replica, lacks replicas, or can't save
      * RedisFull         it has reached its `maxmemory`
      * RedisCrowded      it has as many clients as it takes
    * QueueRefused        it refuses the call, and would again
      * WrongCredentials  user or password
      * MissingPermission the user's ACL rules deny a command, key or channel
      * WrongDatabase     it has no database of this number
      * TlsFailed         a certificate is wrong, or one side alone speaks TLS
      * EvictingRedis     it deletes keys when it is full, and so jobs
      * UnsupportedRedis  a Redis Cluster, or a server that lacks what the scripts need
  * TenantLimited         the job's tenant has reached its limit of queued jobs
  * LeaseLost             another worker owns the job now
  * JobTooLarge           the job can never fit this device's KV budget
  * EngineError           the engine failed while it ran this job
  * InvalidSettings       a setting is wrong; `.errors` names each one
  * MissingDependency     a program or package that this call needs is not installed

Each class has a stable `code`, which results and events carry, and says whether the same call
may succeed later (`retryable`).
"""

from __future__ import annotations

# ruff: noqa: N818 -- named as what happened, as in JobNotFound; the base ends in Error
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class FieldError(NamedTuple):
    """One field that is wrong: its path (`messages[2].content`) and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        """`path: reason`, or the reason alone if it concerns the whole object."""
        return f"{self.path}: {self.reason}" if self.path else self.reason


class MlxServingError(Exception):
    """Something in mlx-serving went wrong."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None) -> None:
        """Take the class's docstring as the message if none is given."""
        self.message = message or summary(type(self))
        super().__init__(self.message)


class _FieldErrors(Exception):
    """Base of errors that name each wrong field, option or setting."""

    def __init__(self, errors: Iterable[FieldError | tuple[str, str]] | str | None = None) -> None:
        """Keep each one in `.errors`; the message lists them as `path: reason`."""
        self.errors = field_errors(errors)
        super().__init__("; ".join(map(str, self.errors)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the field errors, so that the copy has them too."""
        return type(self), (self.errors,)


class InvalidJob(_FieldErrors, MlxServingError):
    """The job has fields that are wrong."""

    code = "invalid_job"

    def __init__(
        self,
        errors: Iterable[FieldError | tuple[str, str]] | str | None = None,
        *,
        job_ids: Iterable[str | None] = (),
    ) -> None:
        """Keep each wrong field.

        `job_ids`: empty if nothing was enqueued; else, if Redis refused some of the jobs, in their
        order the id of each that was enqueued and None for each that was not.
        """
        super().__init__(errors)
        self.job_ids = tuple(job_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the ids, which `Exception` would leave out."""
        return partial(type(self), self.errors, job_ids=self.job_ids), ()


class UnknownModel(InvalidJob):
    """No worker serves this model: it is neither an alias nor a name in the settings."""

    code = "unknown_model"


class ModelUnreachable(UnknownModel):
    """The model's files are on a hub that does not answer now."""

    code = "model_unreachable"
    retryable = True


class PayloadTooLarge(InvalidJob):
    """The job holds more bytes than the queue accepts."""

    code = "payload_too_large"


class ContextLengthExceeded(InvalidJob):
    """The prompt, or the prompt with `max_tokens`, is longer than the model's context."""

    code = "context_length_exceeded"


class InvalidSchema(InvalidJob):
    """The worker can't enforce this schema, regex or grammar."""

    code = "invalid_schema"


class IdempotencyConflict(InvalidJob):
    """The job's idempotency key names a job with another payload."""

    code = "idempotency_key_reused"


class TenantRowsExceeded(InvalidJob):
    """The job has more rows than its tenant may run at once."""

    code = "tenant_rows_exceeded"


class CorruptJob(MlxServingError):
    """What Redis holds under this job's id is not a job that this code can read."""

    code = "corrupt_job"


class ForeignFunction(CorruptJob):
    """The job names a function, callback or webhook that is not on the allow-list."""

    code = "foreign_function"


class BadSignature(CorruptJob):
    """The job is not signed by a key that this worker knows."""

    code = "bad_signature"


class CorruptEvent(MlxServingError):
    """An entry of this job's stream is not an event that this code can read."""

    code = "corrupt_event"


class JobNotFound(MlxServingError):
    """There is no such job, or its result has expired."""

    code = "job_not_found"


class JobNotEnded(MlxServingError):
    """The job waits or runs; only a job that ended can be forgotten."""

    code = "job_not_ended"


class InvalidBatch(_FieldErrors, MlxServingError):
    """The bulk file can't be run as asked."""

    code = "invalid_batch"


class BatchNotFound(MlxServingError):
    """There is no such batch here."""

    code = "batch_not_found"


class ResultTimeout(MlxServingError):
    """The job had not ended when the time to wait for it was over; it goes on."""

    code = "result_timeout"
    retryable = True


class StreamGap(MlxServingError):
    """Events of this job are missing: the stream was trimmed, expired or lost."""

    code = "stream_gap"


class StreamReset(MlxServingError):
    """The job began anew (another model, or Redis lost events): its text so far is void."""

    code = "stream_reset"

    def __init__(self, message: str | None = None, *, cursor: str = "") -> None:
        """Carry the reset's cursor: what is streamed after it is the whole new text."""
        self.cursor = cursor
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the cursor, which `Exception` would leave out."""
        return _rebuild_reset, (self.message, self.cursor)


class QueueFailure(MlxServingError):
    """Redis did not do what it was asked to."""

    code = "queue_failure"


class QueueUnavailable(QueueFailure):
    """Redis is not available: check that it runs and that redis.url names it."""

    code = "queue_unavailable"
    retryable = True


class RedisLoading(QueueUnavailable):
    """Redis has just started and reads its data from disk: try again when it has."""

    code = "redis_loading"


class RedisReadOnly(QueueUnavailable):
    """Redis takes no writes now: it is a replica, lacks replicas, or can't save to its disk."""

    code = "redis_read_only"


class RedisFull(QueueUnavailable):
    """Redis's memory is full: wait for jobs to end and expire, or raise its maxmemory."""

    code = "redis_full"


class RedisCrowded(QueueUnavailable):
    """Redis takes no more clients: close some, or raise its maxclients."""

    code = "redis_max_clients"


class QueueRefused(QueueFailure):
    """Redis refuses this call, and would again."""

    code = "queue_refused"


class WrongCredentials(QueueRefused):
    """Redis refuses our user or password: check redis.url and redis.password."""

    code = "redis_wrong_password"


class MissingPermission(QueueRefused):
    """Redis denies this to our user: give it the rules of its role in ops/redis/users.acl."""

    code = "redis_no_permission"


class WrongDatabase(QueueRefused):
    """Redis has no database of this number: check the end of redis.url."""

    code = "redis_wrong_database"


class TlsFailed(QueueRefused):
    """No TLS connection to Redis: check rediss:// in redis.url, and the certificates."""

    code = "redis_tls"


class EvictingRedis(QueueRefused):
    """Redis deletes keys when it is full, and so jobs: set its maxmemory-policy to noeviction."""

    code = "redis_evicts"


class UnsupportedRedis(QueueRefused):
    """This server can't hold a queue: use one Redis or Valkey that is not a Cluster."""

    code = "redis_unsupported"


class TenantLimited(MlxServingError):
    """The tenant has reached its limit of queued jobs."""

    code = "tenant_limited"
    retryable = True

    def __init__(
        self,
        message: str | None = None,
        *,
        tenant: str = "",
        limit: int = 0,
        queued: int = 0,
        job_ids: Iterable[str | None] = (),
    ) -> None:
        """Carry the tenant, its limit, and how many jobs it had queued.

        `job_ids`, if several jobs were submitted: in their order, the id of each that was
        enqueued and None for each that was not.
        """
        self.tenant, self.limit, self.queued = tenant, limit, queued
        self.job_ids = tuple(job_ids)
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with all that it carries, which `Exception` would leave out."""
        carried = {name: getattr(self, name) for name in ("tenant", "limit", "queued", "job_ids")}
        return partial(type(self), self.message, **carried), ()


class LeaseLost(MlxServingError):
    """Another worker owns the job now, so nothing more may be written for it here."""

    code = "lease_lost"


class JobTooLarge(MlxServingError):
    """The job's prompt and max_tokens can never fit this device's KV budget."""

    code = "job_too_large"


class EngineError(MlxServingError):
    """The engine failed while it ran this job."""

    code = "engine_error"
    retryable = True


class InvalidSettings(_FieldErrors, MlxServingError):
    """A setting is wrong."""

    code = "invalid_settings"


class MissingDependency(MlxServingError):
    """A program or package that this needs is not installed."""

    code = "missing_dependency"


def field_errors(errors: Iterable[FieldError | tuple[str, str]] | str | None) -> list[FieldError]:
    """Field errors from pairs; a plain string concerns the whole object."""
    if isinstance(errors, str):
        return [FieldError("", errors)]
    return [FieldError(*error) for error in errors or ()]


def summary(kind: type[MlxServingError]) -> str:
    """First line of the class's docstring without its full stop; under `-OO`, the code."""
    return (kind.__doc__ or kind.code).strip().splitlines()[0].rstrip(".")


def _rebuild_reset(message: str, cursor: str) -> StreamReset:
    return StreamReset(message, cursor=cursor)
