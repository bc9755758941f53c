"""Runs the protocol's calls on a Redis connection, blocking or async."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from redis import exceptions

from mlx_serving.common.errors import CorruptJob
from mlx_serving.common.protocol import quarantine
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.protocol.scripts import NAMES, script_text
from mlx_serving.common.protocol.stored_events import payloads
from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import redis
    import redis.asyncio
    from redis.commands.core import AsyncScript, Script

    from mlx_serving.common.protocol.calls import Call
    from mlx_serving.common.protocol.keys import Keys

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The control hash, read. Times are ms of Redis TIME (0: not yet)."""

    job_id: str
    state: JobState
    queue: str
    epoch: int
    owner: str
    seq: int
    attempts: int
    losses: int  # attempts whose worker was lost and has not come back
    stream: bool
    cancel_reason: str
    enqueued_ms: int
    started_ms: int
    first_token_ms: int
    finished_ms: int
    deadline_ms: int
    error_code: str
    message: str
    result: bytes  # the result record, JSON; empty if the job ended without a worker


def parse_record(job_id: str, raw: Any) -> JobRecord | None:  # noqa: ANN401 -- redis-py's union
    """Read a control hash as HGETALL returns it; None if there is none.

    Raises:
        CorruptJob: it does not read as one of ours.

    """
    if not raw or JobField.STATE.encode() not in raw:
        return None
    try:
        return _parse_record(job_id, raw)
    except (ValueError, OverflowError):
        raise CorruptJob(f"the control hash of job {job_id!r} can't be read") from None


def _odd(job_id: str, error: exceptions.ResponseError) -> Exception:
    """The error to raise: ours if the key has another type, else Redis's own."""
    if not quarantine.is_wrong_type(error):
        return error
    return CorruptJob(f"the control hash of job {job_id!r} can't be read")


def _parse_record(job_id: str, raw: dict[bytes, bytes]) -> JobRecord:
    def text(field: JobField) -> str:
        return raw.get(field.encode(), b"").decode(errors="replace")

    def number(field: JobField) -> int:
        return int(float(raw.get(field.encode()) or 0))

    return JobRecord(
        job_id=job_id,
        state=JobState(text(JobField.STATE)),
        queue=text(JobField.QUEUE),
        epoch=number(JobField.EPOCH),
        owner=text(JobField.OWNER),
        seq=number(JobField.SEQ),
        attempts=number(JobField.CRASHES),
        losses=len(text(JobField.LOSSES).split()),
        stream=number(JobField.STREAM) != 0,
        cancel_reason=text(JobField.CANCEL_REASON),
        enqueued_ms=number(JobField.ENQUEUED_MS),
        started_ms=number(JobField.STARTED_MS),
        first_token_ms=number(JobField.FIRST_TOKEN_MS),
        finished_ms=number(JobField.FINISHED_MS),
        deadline_ms=number(JobField.DEADLINE_MS),
        error_code=text(JobField.ERROR_CODE),
        message=text(JobField.MESSAGE),
        result=raw.get(JobField.RESULT.encode(), b""),
    )


class _Base:
    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self._prefixes: list[Any] = [keys.prefix, keys.rq_prefix]

    def _parsed(self, call: Call[T], raw: Any) -> T:  # noqa: ANN401 -- redis-py's union
        reply, moved = quarantine.split(raw)
        for each in moved:
            self._note_quarantined(each)
        return call.parse(reply)

    def _note_quarantined(self, moved: quarantine.QuarantinedKey) -> None:
        import structlog  # a producer's import is to cost little, and this is rare

        log = structlog.get_logger(__name__)
        log.warning("key_quarantined", key=moved.key, type=moved.kind, place=moved.place)

    def _range_arguments(self, job_id: str, after_seq: int) -> tuple[str, str, str]:
        return self.keys.events(job_id), f"({after_seq}-0", "+"


class Protocol(_Base):
    """The protocol over a blocking connection (``decode_responses=False``).

    Raises:
        redis.RedisError: from every method, if Redis fails; each call may then be sent again.
    """

    def __init__(self, redis: redis.Redis, keys: Keys) -> None:
        super().__init__(keys)
        self.redis = redis
        self._scripts: dict[str, Script] = {n: redis.register_script(script_text(n)) for n in NAMES}

    def run(self, call: Call[T]) -> T:
        """Run one call."""
        return self._parsed(call, self._scripts[call.script](args=self._prefixes + call.arguments))

    def send(self, call: Call[T]) -> Callable[[float | None], T]:
        """Send one call on a connection of its own, and return what reads its reply, once.

        Redis works on it meanwhile. What goes wrong, the sending included, is raised by the
        reading, which waits as long as any call does, or so many seconds.
        """
        pool, script = self.redis.connection_pool, self._scripts[call.script]
        connection: Any = None
        failure: exceptions.RedisError | None = None
        try:
            connection = pool.get_connection()
            connection.send_command("EVALSHA", script.sha, 0, *self._prefixes, *call.arguments)
        except exceptions.RedisError as error:
            failure = error

        def receive(timeout: float | None = None) -> T:
            try:
                if failure is not None:
                    raise failure
                wait = {} if timeout is None else {"timeout": timeout}
                return self._parsed(call, connection.read_response(**wait))
            except exceptions.NoScriptError:  # a Redis that does not know it ran nothing
                return Protocol.run(self, call)
            finally:
                if connection is not None:
                    pool.release(connection)

        return receive

    def run_many(self, calls: Sequence[Call[T]]) -> list[T]:
        """Run calls in one round trip, outside a transaction: each is atomic by itself."""
        with self.redis.pipeline(transaction=False) as pipe:
            for call in calls:
                self._scripts[call.script](args=self._prefixes + call.arguments, client=pipe)
            return [self._parsed(c, r) for c, r in zip(calls, pipe.execute(), strict=True)]

    def record(self, job_id: str) -> JobRecord | None:
        """The control hash, or None for an unknown job. Raises CorruptJob if it can't be read."""
        try:
            return parse_record(job_id, self.redis.hgetall(self.keys.job(job_id)))
        except exceptions.ResponseError as error:
            raise _odd(job_id, error) from error

    def read_events(self, job_id: str, after_seq: int = 0, count: int | None = None) -> list[bytes]:
        """Event payloads with seq > `after_seq`, in order."""
        span = self._range_arguments(job_id, after_seq)
        return payloads(self.redis.xrange(*span, count=count))


class AsyncProtocol(_Base):
    """The protocol over a ``redis.asyncio`` connection; see `Protocol`."""

    def __init__(self, redis: redis.asyncio.Redis, keys: Keys) -> None:
        super().__init__(keys)
        self.redis = redis
        self._scripts: dict[str, AsyncScript] = {
            n: redis.register_script(script_text(n)) for n in NAMES
        }

    async def run(self, call: Call[T]) -> T:
        """Run one call."""
        raw = await self._scripts[call.script](args=self._prefixes + call.arguments)
        return self._parsed(call, raw)

    async def run_many(self, calls: Sequence[Call[T]]) -> list[T]:
        """Run calls in one round trip, outside a transaction: each is atomic by itself."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for call in calls:
                await self._scripts[call.script](args=self._prefixes + call.arguments, client=pipe)
            return [self._parsed(c, r) for c, r in zip(calls, await pipe.execute(), strict=True)]

    async def record(self, job_id: str) -> JobRecord | None:
        """The control hash, or None for an unknown job. Raises CorruptJob if it can't be read."""
        try:
            return parse_record(job_id, await self.redis.hgetall(self.keys.job(job_id)))
        except exceptions.ResponseError as error:
            raise _odd(job_id, error) from error

    async def read_events(
        self, job_id: str, after_seq: int = 0, count: int | None = None
    ) -> list[bytes]:
        """Event payloads with seq > `after_seq`, in order."""
        return payloads(
            await self.redis.xrange(*self._range_arguments(job_id, after_seq), count=count)
        )
