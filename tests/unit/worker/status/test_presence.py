"""What a worker says of itself in Redis: known fields, short ones, and no secret."""

from __future__ import annotations

from typing import Any

from mlx_serving import __version__
from mlx_serving.common.queues import PROTOCOL
from mlx_serving.worker.status.presence import (
    FACTS,
    FIELD_CHARS,
    NUMBERS,
    Presence,
    bounded,
    machine_facts,
    memory_bytes,
)
from mlx_serving.worker.status.status import Snapshot

MOST_BYTES = 3 * 1024


class Worker:
    """Snapshots at times of the test's choosing."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fields: dict[str, Any] = {"phase": "serving"}
        self.presence = Presence(self.snapshot, lambda: self.now)

    def snapshot(self) -> Snapshot:
        return Snapshot(**self.fields)

    def says(self, **fields: Any) -> dict[str, str]:
        self.fields |= fields
        return self.presence.numbers()

    def decoded(self, tokens: int, *, after: float) -> float:
        self.now += after
        counts = {"generation_tokens": {"": float(tokens)}}
        return float(self.says(counts=counts)["tokens_per_second"])


def test_every_number_is_there() -> None:
    said = Worker().says(
        held=3, running=2, waiting=1, parked=5, kv_used=40, lease_age=0.25, redis_failing=0.0
    )
    assert tuple(said) == NUMBERS
    assert (said["state"], said["reasons"]) == ("serving", "")
    assert [said[n] for n in ("held", "rows", "waiting", "kv_tokens_used")] == ["3", "2", "1", "40"]
    assert said["parked"] == "5"
    assert (said["lease_age_ms"], said["lease_failing"]) == ("250", "0")


def test_who_holds_nothing_has_no_lease_to_age() -> None:
    said = Worker().says(held=0, lease_age=3600.0, redis_failing=2.0)
    assert (said["lease_age_ms"], said["lease_failing"]) == ("", "1")


def test_states() -> None:
    worker = Worker()
    assert worker.says(paused=("hot", "on_battery"))["state"] == "paused"
    assert worker.says()["reasons"] == "hot,on_battery"
    assert worker.says(phase="draining")["state"] == "draining"


def test_tokens_a_second_are_of_the_last_ten_seconds() -> None:
    worker = Worker()
    assert worker.decoded(1000, after=0) == 0.0
    assert worker.decoded(1100, after=2) == 50.0
    assert worker.decoded(1400, after=3) == 80.0
    assert worker.decoded(1400, after=20) == 0.0


def test_it_is_bounded_and_takes_no_other_field() -> None:
    told = dict.fromkeys(FACTS, "x" * 10_000) | {"redis_password": "secret"}
    facts = bounded(told)
    assert set(facts) == set(FACTS)
    assert max(map(len, facts.values())) == FIELD_CHARS
    whole = facts | Worker().says(held=10**9, running=10**9, paused=("outside_hours", "hot"))
    assert sum(len(name) + len(value) for name, value in whole.items()) <= MOST_BYTES


def test_a_machine_knows_its_memory_and_its_version() -> None:
    facts = machine_facts()
    assert set(facts) <= set(FACTS)
    assert memory_bytes() > 1 << 28
    assert (facts["version"], facts["protocol"]) == (__version__, str(PROTOCOL))
