"""A worker's record is made from snapshots: what it is, what it does, and no secret."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_serving import __version__
from mlx_serving.common.queues import PROTOCOL
from mlx_serving.worker.status.presence import Presence, memory_bytes
from mlx_serving.worker.status.status import Snapshot

if TYPE_CHECKING:
    from mlx_serving.common.worker_record import WorkerRecord


class Worker:
    """Snapshots at times of the test's choosing."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fields: dict[str, Any] = {"phase": "serving"}
        self.presence = Presence("w", ("tally", "big"), 64, self.snapshot, lambda: self.now)

    def snapshot(self) -> Snapshot:
        return Snapshot(**self.fields)

    def says(self, *, suspended: bool = False, **fields: Any) -> WorkerRecord:
        self.fields |= fields
        return self.presence.record(suspended=suspended)

    def decoded(self, tokens: int, *, after: float) -> float:
        self.now += after
        return self.says(counts={"generation_tokens": {"": float(tokens)}}).tokens_per_second


def test_every_number_is_there() -> None:
    said = Worker().says(
        held=3, running=2, waiting=1, parked=5, kv_used=40, kv_capacity=80, lease_age=0.25,
        redis_failing=0.0, memory_active=7, memory_limit=9,
    )  # fmt: skip
    assert (said.state, said.reasons) == ("serving", ())
    assert (said.held, said.rows, said.waiting, said.parked) == (3, 2, 1, 5)
    assert (said.kv_tokens_used, said.kv_tokens_capacity) == (40, 80)
    assert (said.lease_age_ms, said.lease_failing) == (250, False)
    assert (said.memory_active_bytes, said.memory_limit_bytes) == (7, 9)


def test_it_says_which_models_are_here_and_which_can_not_be() -> None:
    said = Worker().says(
        resident=("tally",), loading="third", failures={"big": "ValueError: torn"},
        capacities={"tally": 1000},
    )  # fmt: skip
    assert (said.models, said.resident, said.loading) == (["tally", "big"], ("tally",), "third")
    assert said.unloadable == ("big: ValueError: torn",)
    assert (said.able, said.capacities) == (["tally"], {"tally": 1000})


def test_who_holds_nothing_has_no_lease_to_age() -> None:
    said = Worker().says(held=0, lease_age=3600.0, redis_failing=2.0)
    assert (said.lease_age_ms, said.lease_failing) == (None, True)


def test_states() -> None:
    worker = Worker()
    assert worker.says(suspended=True).state == "suspended"
    assert worker.says(suspended=True, paused=("hot", "on_battery")).state == "paused"
    assert worker.says().reasons == ("hot", "on_battery")
    assert worker.says(suspended=True, phase="draining").state == "draining"


def test_what_it_is_short_of_and_what_it_is_replaced_for_are_reasons() -> None:
    said = Worker().says(paused=("hot",), memory_short=True, recycling="hours")
    assert said.reasons == ("hot", "memory_short", "recycling")


def test_tokens_a_second_are_of_the_last_ten_seconds() -> None:
    worker = Worker()
    assert worker.decoded(1000, after=0) == 0.0
    assert worker.decoded(1100, after=2) == 50.0
    assert worker.decoded(1400, after=3) == 80.0
    assert worker.decoded(1400, after=20) == 0.0


def test_it_takes_nothing_but_what_it_knows_of_what_the_engine_runs_on() -> None:
    info = {"device": "cpu", "revision": "abc", "redis_password": "secret"}
    said = Worker().says(info=info)
    assert (said.device, said.revision) == ("cpu", "abc")
    assert "secret" not in str(said)


def test_a_machine_knows_its_memory_and_its_version() -> None:
    said = Worker().says(pid=17)
    assert said.memory_bytes == memory_bytes() > 1 << 28
    assert (said.version, said.protocol, said.pid) == (__version__, PROTOCOL, 17)
    assert (said.name, said.batch_rows) == ("w", 64)
