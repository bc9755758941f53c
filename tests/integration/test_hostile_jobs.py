"""What a hostile hand may write into Redis: a job ends with a code, worker and batch go on.

`test_worker_payloads.py` has the payloads that do not even parse as a job.
"""

from __future__ import annotations

import json
import random
import resource
import string
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common import events
from mlx_serving.common.job.schema import JOB_FUNCTION
from mlx_serving.worker.delivery import sweeper
from tests.support.helpers import wait_until
from tests.support.protocol_driver import QUEUE, Driver, rq_fields
from tests.support.worker_process import InProcessWorker, check_answers, submit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis

GOOD: dict[str, Any] = {"v": 1, "model": "tally", "prompt": "x", "max_tokens": 3, "seed": 1}
DEEP = 30_000


@pytest.fixture
def worker(settled_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessWorker]:
    monkeypatch.setattr(sweeper, "RECONCILE_SECONDS", 0.5)  # what is left over goes sooner
    with InProcessWorker(settled_redis.url, rate=100) as worker:
        yield worker


def packed(wire: str | bytes, function: str = JOB_FUNCTION) -> bytes:
    """RQ's payload around a job's JSON, given as text: hostile text needs no encoder."""
    raw = wire if isinstance(wire, bytes) else wire.encode()
    return zlib.compress(b'["%s", null, [%s], {}]' % (function.encode(), raw))


def job(**fields: Any) -> bytes:
    return packed(json.dumps(GOOD | fields))


def raw_job(field: str, value: str | bytes) -> bytes:
    """Pack a good job with one more field, whose JSON is given as text."""
    head = json.dumps({k: v for k, v in GOOD.items() if k != field})[:-1].encode()
    tail = value if isinstance(value, bytes) else value.encode()
    return packed(head + b', "%s": %s}' % (field.encode(), tail))


def nested(opening: str, inner: str, closing: str) -> str:
    return opening * DEEP + inner + closing * DEEP


def noise(size: int) -> str:
    return "".join(random.Random(1).choices(string.ascii_letters, k=size))


PAYLOADS: dict[str, tuple[bytes, str]] = {
    "10 MB prompt": (job(prompt="x " * 5_000_000), "payload_too_large"),
    "10 MB prompt that does not pack": (job(prompt=noise(10_000_000)), "payload_too_large"),
    "10 MB in a field that is not known": (job(padding="x" * 10_000_000), "payload_too_large"),
    "zlib bomb": (zlib.compress(bytes(200_000_000), 9), "payload_too_large"),
    "zlib bomb behind a good job": (job() + zlib.compress(bytes(50_000_000)), "finished"),
    "30,000-deep lists": (raw_job("response_format", nested("[", "", "]")), "corrupt_job"),
    "30,000-deep objects": (raw_job("metadata", nested('{"a":', "1", "}")), "corrupt_job"),
    "30,000-deep JSON in a text": (
        job(prompt=None, messages=[{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": nested("[", "", "]")}}]}]), "invalid_job"),
    "30,000-deep schema": (raw_job("response_format", nested('{"type":', "1", "}")), "corrupt_job"),
    "33-deep, which parsers still read": (
        raw_job("chat_template_kwargs", '{"a":' * 33 + "1" + "}" * 33), "invalid_job"),
    "malformed UTF-8": (raw_job("prompt", b'"\xff\xfe"'), "corrupt_job"),
    "overlong UTF-8": (raw_job("prompt", b'"\xc0\x80"'), "corrupt_job"),
    "UTF-8 of a surrogate": (raw_job("prompt", b'"\xed\xa0\x80"'), "corrupt_job"),
    "lone surrogate, escaped": (raw_job("prompt", '"\\ud800"'), "corrupt_job"),
    "lone surrogate in a stop string": (raw_job("stop", '["\\udfff"]'), "corrupt_job"),
    "lone surrogate in a key": (raw_job("metadata", '{"\\ud800": "x"}'), "corrupt_job"),
    "UTF-16": (zlib.compress(json.dumps([GOOD]).encode("utf-16")), "corrupt_job"),
    "a NUL byte in the prompt": (job(prompt="a\0b"), "finished"),
    "Infinity": (raw_job("temperature", "Infinity"), "corrupt_job"),
    "1e999": (raw_job("temperature", "1e999"), "corrupt_job"),
    "4,500 digits": (raw_job("seed", "9" * 4500), "corrupt_job"),
    "40 digits": (raw_job("seed", "9" * 40), "invalid_job"),
    "seed of 2**64": (job(seed=2**64), "invalid_job"),
    "negative max_tokens": (job(max_tokens=-1), "invalid_job"),
    "n of a million": (job(n=1_000_000), "invalid_job"),
    "a million stop strings": (job(stop=["x"] * 1_000_000), "payload_too_large"),
    "a key twice, the second wrong": (
        raw_job("max_tokens", '3, "max_tokens": "many"'), "invalid_job"),
    "model is a path": (job(model="../../etc/passwd"), "invalid_job"),
    "model with a line break": (job(model="tally\nx"), "invalid_job"),
    "another function": (packed(json.dumps(GOOD), "os.system"), "foreign_function"),
    "the function with a blank": (packed(json.dumps(GOOD), JOB_FUNCTION + " "), "foreign_function"),
    "a sibling of the function": (
        packed(json.dumps(GOOD), "mlx_serving.worker.task.__import__"), "foreign_function"),
    "the function in other letters": (
        packed(json.dumps(GOOD), JOB_FUNCTION.upper()), "foreign_function"),
}  # fmt: skip


def test_payloads_end_with_their_code_while_the_batch_goes_on(
    worker: InProcessWorker, driver: Driver, client: Client
) -> None:
    mates = submit(client, 4, 400)
    wait_until(lambda: client.status(mates[0].id).seq >= 2)
    for number, (data, _) in enumerate(PAYLOADS.values()):
        driver.enqueue(f"hostile{number}", rq_fields=rq_fields() | {"data": data})
    codes = {}
    for number, name in enumerate(PAYLOADS):
        record = client.result(f"hostile{number}", timeout=30)
        codes[name] = record.error.code if record.error else record.state.value
        assert len(record.error.message if record.error else "") < 500, name
    assert codes == {name: code for name, (_, code) in PAYLOADS.items()}
    check_answers(client, mates, 400)
    check_answers(client, submit(client, 2, 5), 5)
    assert worker.child.runner.failure is None


FIELDS = [
    "success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks",
    "dependency_ids", "dependency_id", "repeats_left", "rate_limit_key",
]  # fmt: skip


@pytest.mark.usefixtures("worker")
def test_every_field_that_would_run_or_call_something_is_refused(
    driver: Driver, client: Client
) -> None:
    for field in FIELDS:
        fields = rq_fields() | {"data": job(), field: "os.system"}
        driver.enqueue(field, rq_fields=fields)
    mates = submit(client, 3, 50)
    for field in FIELDS:
        error = client.result(field, timeout=10).error
        assert error is not None
        assert (error.code, error.message.partition(":")[0]) == ("forbidden_field", field)
        assert driver.rq_status(field) == "failed"
    check_answers(client, mates, 50)


IDS: dict[str, bytes] = {
    "empty": b"",
    "a megabyte": b"a" * (1 << 20),
    "300 characters": b"a" * 300,
    "not UTF-8": b"\xff\xfe\x80",
    "a NUL": b"a\0b",
    "a line break": b'x\n{"event": "forged", "level": "info"}',
    "a carriage return": b"x\rforged",
    "terminal control": b"\x1b[2J\x1b]0;owned\x07",
    "a format string": b"%s%n{0.__class__}{job}",
    "another attempt's name": b"abc:1",
    "a glob": b"*",
    "a key of ours": b"../job:x",
    "Lua": b"'..redis.call('FLUSHALL')..'",
    "blanks": b"cancel everything",
    "a right-to-left mark": "a\u202eb".encode(),
}


@pytest.mark.may_leak(reason="hashes of ids that no script accepts, written by hand")
@pytest.mark.parametrize("place", ["only on the list", "with an RQ hash", "with a control hash"])
def test_ids_that_are_none(
    worker: InProcessWorker, driver: Driver, client: Client, place: str
) -> None:
    """They leave the lists and indexes, and stop neither claim, reaper nor reconciler."""
    connection = driver.redis
    mates = submit(client, 3, 100)
    for job_id in IDS.values():
        if place != "only on the list":
            connection.hset(b"rq:job:" + job_id, mapping=rq_fields() | {"data": job()})  # type: ignore[arg-type]
        if place == "with a control hash":
            numbers = ("ep", "seq", "at", "ma", "mp", "dl", "to", "ab", "ttl", "sm", "en", "nd")
            fields = dict.fromkeys(numbers, 60) | {
                "st": "running",
                "q": QUEUE,
                "ow": "dead",
                "ca": "",
            }
            connection.hset(b"mlxs:job:" + job_id, mapping=fields)  # type: ignore[arg-type]
            connection.zadd(f"mlxs:leases:{QUEUE}", {job_id: 1})
            connection.zadd("mlxs:deadlines", {job_id: 1})
        connection.zadd(f"mlxs:open:{QUEUE}", {job_id: 1})
        connection.rpush(f"rq:queue:{QUEUE}", job_id)
    mates += submit(client, 3, 100)
    check_answers(client, mates, 100)

    def left() -> set[Any]:
        found: set[Any] = {*connection.lrange(f"rq:queue:{QUEUE}", 0, -1)}
        for index in (f"mlxs:leases:{QUEUE}", f"mlxs:open:{QUEUE}", "mlxs:deadlines"):
            found |= {*connection.zrange(index, 0, -1)}
        return found & {*IDS.values()}

    wait_until(lambda: not left(), timeout=25, what=f"{place}: ids are still there")
    check_answers(client, submit(client, 2, 5), 5)
    assert worker.child.runner.failure is None


def forged(**fields: Any) -> Callable[[Driver], None]:
    values: dict[Any, Any] = fields

    def forge(driver: Driver) -> None:
        driver.redis.hset("mlxs:job:forged", mapping=values)

    return forge


def forged_events(*payloads: bytes, seq: int | None = None) -> Callable[[Driver], None]:
    def forge(driver: Driver) -> None:
        driver.redis.hset("mlxs:job:forged", "seq", len(payloads) if seq is None else seq)
        for number, payload in enumerate(payloads, 1):
            driver.redis.xadd("mlxs:ev:forged", {"e": payload}, id=f"{number}-0")

    return forge


def of_another_type(driver: Driver) -> None:
    driver.redis.set("mlxs:ev:forged", "x")


def of_another_field(driver: Driver) -> None:
    driver.redis.hset("mlxs:job:forged", "seq", 1)
    driver.redis.xadd("mlxs:ev:forged", {"other": "x", "a": "1", "t": "{"}, id="1-0")


def tokens(*ids: int, seq: int = 2) -> bytes:
    delta = events.ChoiceDelta(0, "x", list(ids))
    return events.encode(events.tokens_event(attempt=1, seq=seq, choices=[delta]))


ATTEMPT = events.encode(
    events.attempt_event(
        attempt=1, seq=1, worker="w", model="tally", model_revision="simulated",
        tokenizer_hash="simulated",
    )
)  # fmt: skip
OTHER_MODEL = ATTEMPT.replace(b'"simulated"', b'"other"')

FORGERIES: dict[str, tuple[Callable[[Driver], None], str]] = {
    "seq of a trillion": (forged(seq=10**12), "stream_gap"),
    "seq of 400 digits": (forged(seq="9" * 400), "corrupt_job"),
    "seq of 5,000 digits": (forged(seq="9" * 5000), "corrupt_job"),
    "seq is text": (forged(seq="%s"), "corrupt_job"),
    "seq is negative": (forged(seq="-1"), "corrupt_job"),
    "epoch is a float": (forged(ep="1e3"), "corrupt_job"),
    "epoch with a line break": (forged(ep="1\n2"), "corrupt_job"),
    "time to live is text": (forged(ttl="for ever"), "corrupt_job"),
    "deadline is NaN": (forged(dl="nan"), "corrupt_job"),
    "deadline is infinite": (forged(dl="inf"), "corrupt_job"),
    "state is not known": (forged(st="sleeping"), "corrupt_job"),
    "no number is one": (
        forged(**dict.fromkeys(("ep", "seq", "at", "ma", "mp", "dl", "to", "nd"), "x")),
        "corrupt_job",
    ),
    "cancel reason is no text": (forged(ca=b"\xff\xfe\n"), "cancelled"),
    "long ago": (forged(dl=1), "deadline_exceeded"),
    "no stream": (of_another_type, "corrupt_job"),
    "events of another form": (of_another_field, "corrupt_event"),
    "events that are no JSON": (forged_events(b"\x80\x04pickle"), "corrupt_event"),
    "events that are not UTF-8": (forged_events(b'{"v":1,"x":"\xff"}'), "corrupt_event"),
    "events that are 30,000 deep": (
        forged_events(b'{"v":1,"attempt":1,"seq":1,"type":"tokens","choices":' + b"[" * DEEP),
        "corrupt_event",
    ),
    "events of another seq": (forged_events(tokens(1, seq=7)), "stream_gap"),
    "one event too many": (
        forged_events(ATTEMPT, tokens(1), tokens(2, seq=3), seq=2), "corrupt_job"),
    "events of a job that has none": (forged_events(tokens(1, seq=1), seq=0), "corrupt_job"),
    "one event too few": (forged_events(ATTEMPT, seq=2), "stream_gap"),
    "tokens of another model": (forged_events(OTHER_MODEL, tokens(1)), "model_changed"),
    "tokens of no model": (forged_events(tokens(1, seq=1)), "model_changed"),
    "token beyond the vocabulary": (
        forged_events(ATTEMPT, tokens(10_000)), "token_out_of_vocabulary"),
    "token of 100 digits": (forged_events(ATTEMPT, tokens(10**18)), "token_out_of_vocabulary"),
    "negative token": (forged_events(ATTEMPT, tokens(-1)), "token_out_of_vocabulary"),
}  # fmt: skip


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("name", FORGERIES)
def test_forged_hashes_and_streams(driver: Driver, client: Client, name: str) -> None:
    forge, code = FORGERIES[name]
    mates = submit(client, 3, 60)
    driver.redis.set("rq:suspended", 1)
    driver.enqueue("forged", rq_fields=rq_fields() | {"data": job()})
    forge(driver)
    driver.redis.delete("rq:suspended")
    driver.redis.publish(driver.keys.wake(QUEUE), "")
    wait_until(lambda: driver.redis.hget("mlxs:job:forged", "fi"), timeout=10)
    assert driver.redis.hget("mlxs:job:forged", "err") == code.encode()
    check_answers(client, mates, 60)
    check_answers(client, submit(client, 1, 5), 5)


def test_a_job_with_the_fields_of_another_is_its_own_job(
    worker: InProcessWorker, driver: Driver, client: Client
) -> None:
    """Origin, status, worker and times in RQ's hash decide nothing: it is a view."""
    (victim,) = submit(client, 1, 200)
    wait_until(lambda: client.status(victim.id).seq >= 2)
    copy = driver.redis.hgetall(f"rq:job:{victim.id}")
    driver.enqueue("thief", rq_fields=copy | {b"origin": b"other:bulk", b"status": b"finished"})
    check_answers(client, [victim], 200)
    assert client.result("thief", timeout=10).id == "thief"
    assert driver.record("thief").queue == QUEUE
    assert client.result("thief").token_ids == client.result(victim.id).token_ids
    assert worker.child.runner.failure is None


@pytest.mark.usefixtures("worker")
@pytest.mark.may_leak(reason="keys of wrong types, written by hand")
def test_keys_of_wrong_types_in_other_queues_stop_nothing(driver: Driver, client: Client) -> None:
    for name in ("evil", "tally:interactive"):
        driver.redis.sadd("rq:queues", f"rq:queue:{name}", b"\xff\xfe", "no prefix")
        for key in (f"mlxs:leases:{name}", f"rq:queue:{name}"):
            driver.redis.set(key, "of another type")
    driver.start("lost", worker="dead", rq_fields=rq_fields() | {"data": job()})
    driver.lapse("lost")
    assert client.result("lost", timeout=20).text == "1 2 3"
    check_answers(client, submit(client, 3, 5), 5)


@pytest.mark.usefixtures("worker")
def test_a_bomb_and_a_forged_seq_cost_bounded_memory(driver: Driver, client: Client) -> None:
    """1 GB in 1 MB, 20 times, and a seq whose list would take 8 TB."""
    check_answers(client, submit(client, 2, 5), 5)
    bomb = zlib.compress(bytes(1_000_000_000), 9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(20):
        driver.enqueue(f"bomb{number}", rq_fields=rq_fields() | {"data": bomb})
    driver.enqueue("forged", rq_fields=rq_fields() | {"data": job()})
    driver.redis.hset("mlxs:job:forged", "seq", 10**12)
    errors = [client.result(f"bomb{number}", timeout=20).error for number in range(20)]
    assert {error and error.code for error in errors} == {"payload_too_large"}
    wait_until(lambda: driver.state("forged") == "failed")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"RSS grew by {grown / 1024:.1f} MiB")  # noqa: T201
    assert grown < 96 * 1024  # KiB: 20 compressed payloads at once, and one of 4 MiB unpacked
