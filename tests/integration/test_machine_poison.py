"""A job that takes the machine with it, and machines that only sleep (D7), with real workers."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import pytest

from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.redis.local import LocalRedis
from tests.support.figures import show
from tests.support.helpers import wait_until
from tests.support.poison import POISON, Poison
from tests.support.worker_process import (
    LEASE_SECONDS,
    Hacks,
    WorkerProcess,
    check_answers,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving import Client
    from mlx_serving.producer.handles import JobHandle

pytestmark = pytest.mark.chaos

REBOOT_SECONDS = 1.0


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


class Machine(threading.Thread):
    """Workers that live and die together; an init system starts them again after each death."""

    def __init__(
        self, url: str, number: int, workers: int, poison: Poison, **settings: Any
    ) -> None:
        super().__init__(daemon=True)
        self._url, self._name, self._settings = url, f"{number:08x}", settings
        self._count, self._hacks = workers, Hacks(poison=poison, machine=self._name)
        self._over = threading.Event()
        self.deaths = 0

    def run(self) -> None:
        while not self._over.is_set():
            with ExitStack() as stack:
                workers = [
                    stack.enter_context(
                        WorkerProcess(
                            self._url, f"{self._name}-{self.deaths}-{each}", 200, self._hacks,
                            **self._settings,
                        )
                    )
                    for each in range(self._count)
                ]  # fmt: skip
                while not self._over.wait(0.05):
                    if any(worker.process.poll() is not None for worker in workers):
                        self.deaths += 1
                        break
            self._over.wait(REBOOT_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(30)


def losses(connection: redis.Redis, handles: list[JobHandle]) -> list[object]:
    return [connection.hget(f"mlxs:job:{handle.id}", JobField.LOSSES) for handle in handles]


def ended_as(client: Client, handle: JobHandle) -> tuple[str, str]:
    result = client.result(handle.id, timeout=120)
    return result.state.value, result.error.code if result.error else ""


@pytest.mark.parametrize("after_tokens", [None, 6])
def test_a_job_that_takes_machines_with_it_is_dead_and_its_mates_end(
    server: LocalRedis, client: Client, after_tokens: int | None
) -> None:
    poison = Poison("machine", after_tokens)
    with ExitStack() as stack:
        machines = [stack.enter_context(Machine(server.url, n, 1, poison)) for n in range(3)]
        (bad,) = submit(client, 1, 60, prompt=POISON)
        good = submit(client, 12, 60)
        assert ended_as(client, bad) == ("dead", "poison")
        check_answers(client, good, 60)
        deaths = sum(machine.deaths for machine in machines)
        show(f"machines that died of it: {deaths}")
        assert deaths <= 6
        assert client.status(bad.id).message.count("machines were lost") == 1
        check_answers(client, submit(client, 3, 10), 10)


def test_on_the_only_machine_it_is_isolated_and_its_mates_end(
    server: LocalRedis, client: Client
) -> None:
    with (
        Machine(server.url, 7, 2, Poison("machine"), batch__max_rows=4) as machine,
        server.client() as connection,
    ):
        (bad,) = submit(client, 1, 40, prompt=POISON)
        good = submit(client, 12, 40)
        check_answers(client, good, 40)
        wait_until(lambda: connection.zcard("mlxs:isolated:tally:default"), timeout=90)
        deaths = machine.deaths
        check_answers(client, submit(client, 3, 10), 10)
        time.sleep(3 * LEASE_SECONDS)
        assert machine.deaths == deaths
        assert client.status(bad.id).state.value == "queued"
        show(f"deaths of the only machine: {deaths}")


def test_workers_that_sleep_again_and_again_charge_nobody(
    server: LocalRedis, client: Client
) -> None:
    tokens, naps = 600, 6
    with (
        WorkerProcess(server.url, "one", 30, Hacks(machine="0000000a")) as one,
        WorkerProcess(server.url, "two", 30, Hacks(machine="0000000b")) as two,
        server.client() as connection,
    ):
        handles = submit(client, 8, tokens, max_attempts=1)
        for nap in range(naps):
            wait_until_decoded(client, handles, 3 * (nap + 1))
            sleeper = (one, two)[nap % 2]
            sleeper.serving().signal(signal.SIGSTOP)
            time.sleep(LEASE_SECONDS + 1.5)
            sleeper.signal(signal.SIGCONT)
        check_answers(client, handles, tokens)
        assert [client.status(handle.id).attempts for handle in handles] == [0] * 8
        assert set(losses(connection, handles)) <= {None, b""}
        assert max(client.status(handle.id).epoch for handle in handles) > 2
