"""Redis forgets events that consumers have (a lagging replica promoted, a snapshot restored): D2.

Every reader then has the events of one history, or was told by a `reset` to begin anew: live on
a connection of its own or on a shared one, or coming back at another gateway with a cursor.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import AsyncClient, Client, JobNotFound, StreamReset
from mlx_serving.common.events import decode
from mlx_serving.common.protocol.keys import Keys
from tests.support.forgetful_redis import PromotedReplica, RestoredSnapshot
from tests.support.helpers import wait_until
from tests.support.paths import ROOT
from tests.support.scripted_worker import Row, ScriptedWorker
from tests.support.worker_process import quick_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving import Event
    from mlx_serving.producer.handles import JobHandle
    from tests.support.forgetful_redis import Forgetful

WAYS = [RestoredSnapshot, PromotedReplica]
READERS = ["blocking", "async"]
OTHER_GATEWAY = """
import sys
from mlx_serving import Client
from mlx_serving.common.events import encode
url, job_id, cursor = sys.argv[1:]
with Client(url) as client:
    for event in client.stream(job_id, cursor):
        print(encode(event).decode())
"""


@pytest.fixture(params=WAYS)
def forgetful(request: pytest.FixtureRequest) -> Iterator[Forgetful]:
    with request.param() as forgetful:
        yield forgetful


@pytest.fixture
def client(forgetful: Forgetful) -> Iterator[Client]:
    with Client(settings=quick_settings(forgetful.url)) as client:
        yield client


@pytest.fixture
def worker(forgetful: Forgetful) -> Iterator[ScriptedWorker]:
    with forgetful.client() as connection:
        yield ScriptedWorker(connection, Keys())


def submit(client: Client, choices: int = 1) -> JobHandle:
    return client.submit(model="tally", prompt="count", temperature=1.0, n=choices, result_ttl=60)


class Reader:
    """Follows a job in a thread of its own, by either client."""

    def __init__(self, kind: str, url: str, job_id: str, after: str = "") -> None:
        self.events: list[Event] = []
        self.error: Exception | None = None
        read: Callable[[str, str, str], None] = getattr(self, f"_{kind}")
        self._thread = threading.Thread(target=self._run, args=(read, url, job_id, after))

    def _run(self, read: Callable[[str, str, str], None], *given: str) -> None:
        try:
            read(*given)
        except Exception as error:  # noqa: BLE001 -- a test looks at it
            self.error = error

    def _blocking(self, url: str, job_id: str, after: str) -> None:
        with Client(settings=quick_settings(url)) as client:
            for event in client.stream(job_id, after):
                self.events.append(event)

    def _async(self, url: str, job_id: str, after: str) -> None:
        async def follow() -> None:
            async with AsyncClient(settings=quick_settings(url)) as client:
                async for event in client.stream(job_id, after):
                    self.events.append(event)

        asyncio.run(follow())

    def start(self) -> None:
        self._thread.start()

    def join(self) -> list[Event]:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.events


@contextmanager
def following(kind: str, forgetful: Forgetful, job: JobHandle, count: int) -> Iterator[Reader]:
    """A live reader that has `count` events."""
    reader = Reader(kind, forgetful.url, job.id)
    reader.start()
    wait_until(lambda: len(reader.events) >= count or reader.error, what="the first events")
    yield reader
    reader.join()


def read(kind: str, forgetful: Forgetful, job: JobHandle, after: str = "") -> list[Event]:
    """What a reader gets that comes now."""
    reader = Reader(kind, forgetful.url, job.id, after)
    reader.start()
    events = reader.join()
    if reader.error:
        raise reader.error
    return events


def write(worker: ScriptedWorker, words: str, choices: int = 1) -> Row:
    """Claim the next job and write words of it."""
    row = worker.claim_one()
    for word in words.split():
        row.say(f"{word} ", choices=choices)
    return row


def go_on(row: Row, words: str, choices: int = 1) -> Row:
    """End the job by another attempt of the same worker: its own is behind what Redis knows."""
    record = row.worker.protocol.record(row.job.job_id)
    assert record is not None
    if record.state.value == "running":
        row.hand_back()
    again = write(row.worker, words, choices)
    again.end()
    return again


def kinds(events: list[Event]) -> list[str]:
    return [event.type for event in events]


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("kind", READERS)
def test_a_live_reader_is_told_and_has_the_new_history_whole(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker, kind: str, choices: int
) -> None:
    job = submit(client, choices)
    row = write(worker, "one two", choices)
    forgetful.keep()
    for word in ("three ", "four ", "five "):
        row.say(word, choices=choices)
    with following(kind, forgetful, job, 6) as reader:
        forgetful.forget()
        again = go_on(row, "drei vier fünf", choices)
    assert reader.error is None
    assert reader.events[:6] == row.written
    reset, *rest = reader.events[6:]
    assert (reset.type, reset.cursor) == ("reset", "")
    assert rest == [*row.written[:3], *again.written]
    assert rest == read(kind, forgetful, job)
    words = "".join(event.text for event in rest)
    assert words == "one two drei vier fünf "
    assert client.result(job.id).text == "drei vier fünf ", "the scripted worker's own words"


@pytest.mark.parametrize("kind", READERS)
def test_a_claim_that_was_forgotten_takes_back_everything(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker, kind: str
) -> None:
    """The same worker claims again: its attempt has the same number, and says the same at first."""
    job = submit(client)
    forgetful.keep()
    row = write(worker, "one two three")
    with following(kind, forgetful, job, 4) as reader:
        forgetful.forget()
        again = go_on(row, "one two other")
    assert again.epoch == row.epoch
    assert kinds(reader.events) == [*kinds(row.written), "reset", *kinds(again.written)]
    assert reader.events[5:] == again.written


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_of_what_was_kept_notices_nothing(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker, kind: str
) -> None:
    job = submit(client)
    row = write(worker, "one two")
    forgetful.keep()
    with following(kind, forgetful, job, 3) as reader:
        forgetful.forget()
        again = go_on(row, "three")
    assert reader.events == [*row.written, *again.written]


@pytest.mark.parametrize("kind", READERS)
def test_a_cursor_is_good_at_any_gateway_as_long_as_its_event_stands(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker, kind: str
) -> None:
    job = submit(client)
    row = write(worker, "one two")
    forgetful.keep()
    row.say("three ")
    row.say("four ")
    forgetful.forget()
    again = go_on(row, "drei vier fünf sechs")
    whole = [*row.written[:3], *again.written]
    for kept in row.written[:3]:
        assert read(kind, forgetful, job, kept.cursor) == whole[kept.seq :]
    for lost in row.written[3:]:
        assert whole[lost.seq - 1].seq == lost.seq, "another event stands there"
        reset, *rest = read(kind, forgetful, job, lost.cursor)
        assert (reset.type, reset.cursor, rest) == ("reset", "", whole)
    assert read(kind, forgetful, job, whole[-1].cursor) == []


def test_another_process_goes_on_by_cursor(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker
) -> None:
    job = submit(client)
    forgetful.keep()
    row = write(worker, "one two")
    lost = row.written[-1].cursor
    forgetful.forget()
    again = go_on(row, "eins zwei drei")
    assert elsewhere(forgetful, job, lost) == ["reset", *kinds(again.written)]
    assert elsewhere(forgetful, job, again.written[1].cursor) == kinds(again.written[2:])


def elsewhere(forgetful: Forgetful, job: JobHandle, cursor: str) -> list[str]:
    """Types of the events that a process of its own gets."""
    command = [sys.executable, "-c", OTHER_GATEWAY, forgetful.url, job.id, cursor]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return [decode(line.encode()).type for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", READERS)
def test_a_stream_that_is_shorter_for_now_is_a_reset_at_once(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker, kind: str
) -> None:
    """Nobody has the job yet; the reader is told before anybody goes on."""
    job = submit(client)
    forgetful.keep()
    row = write(worker, "one two three")
    forgetful.forget()
    reader = Reader(kind, forgetful.url, job.id, row.written[-1].cursor)
    reader.start()
    wait_until(lambda: reader.events or reader.error)
    assert kinds(reader.events) == ["reset"]
    again = go_on(row, "eins")
    assert reader.join()[1:] == again.written


@pytest.mark.parametrize("kind", READERS)
def test_an_end_that_was_forgotten_is_taken_back(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker, kind: str
) -> None:
    """Also one that a script wrote for a job without a worker: its number says nothing."""
    job, other = submit(client), submit(client)
    forgetful.keep()
    row = write(worker, "one")
    row.end()
    client.cancel(other.id)
    (cancelled,) = read(kind, forgetful, other)
    forgetful.forget()
    again = go_on(row, "one")
    assert len(again.written) == len(row.written)
    assert read(kind, forgetful, job, row.written[-1].cursor)[1:] == again.written
    client.cancel(other.id)
    reset, anew = read(kind, forgetful, other, cancelled.cursor)
    assert (reset.type, anew.type) == ("reset", "end")
    assert (anew.seq, anew.attempt) == (cancelled.seq, cancelled.attempt)


@pytest.mark.parametrize("kind", READERS)
def test_a_job_that_was_forgotten_is_not_found(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker, kind: str
) -> None:
    forgetful.keep()
    job = submit(client)
    row = write(worker, "one two")
    with following(kind, forgetful, job, 3) as reader:
        forgetful.forget()
    assert reader.events == row.written
    assert isinstance(reader.error, JobNotFound)
    with pytest.raises(JobNotFound, match=job.id):
        read(kind, forgetful, job, row.written[1].cursor)


def test_text_says_that_it_is_void_and_begins_anew(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker
) -> None:
    job = submit(client)
    forgetful.keep()
    row = write(worker, "one two")
    pieces = job.text()
    assert next(pieces) == "one "
    forgetful.forget()
    go_on(row, "eins zwei")
    with pytest.raises(StreamReset) as caught:
        list(pieces)
    anew = client.stream(job.id, caught.value.cursor, text=True)
    assert "".join(anew) == "eins zwei "


def test_who_waits_for_the_result_has_it(
    forgetful: Forgetful, client: Client, worker: ScriptedWorker
) -> None:
    job = submit(client)
    forgetful.keep()
    row = write(worker, "one two")
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(job.result(timeout=20)))
    with forgetful.client() as connection:
        thread.start()
        wait_until(connection.pubsub_channels)
    forgetful.forget()
    go_on(row, "eins zwei")
    thread.join(30)
    assert [result.text for result in results] == ["eins zwei "]


@pytest.mark.parametrize("kind", READERS)
def test_live_messages_of_the_old_primary_are_not_spliced(kind: str) -> None:
    """Nothing cuts the subscription: the old primary and the old attempt go on side by side."""
    with (
        PromotedReplica() as forgetful,
        Client(settings=quick_settings(forgetful.url)) as client,
        forgetful.client() as connection,
        forgetful.old.client() as old,
    ):
        job = submit(client)
        forgetful.keep()
        row = write(ScriptedWorker(connection, Keys()), "one two")
        zombie = ScriptedWorker(old, Keys())
        with following(kind, forgetful, job, 3) as reader:
            channel = client.keys.channel(job.id)
            wait_until(lambda: old.pubsub_numsub(channel)[0][1])
            forgetful.forget(kill=False)
            new = write(ScriptedWorker(forgetful.client(), Keys()), "eins")
            row.worker = zombie
            old.client_kill_filter(_type="normal", skipme=True)
            for word in ("three ", "four ", "five "):
                row.say(word)
                new.say(word)
            new.say("six ")
            assert row.seq == new.seq
            seen = wait_until(lambda: reader.events[-1] == new.written[-1] or reader.error)
            assert seen is True
            row.say("seven ")  # would come next, were it not the old attempt's
            new.end()
        at = kinds(reader.events).index("reset")
        assert reader.events[:at] == row.written[:at]
        assert reader.events[at + 1 :] == new.written
