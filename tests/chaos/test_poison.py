"""D7 in figures: poison among innocents, and what a crash costs that no job is to blame for."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from mlx_serving import Client
from mlx_serving.common.redis.local import LocalRedis
from tests.support.figures import show
from tests.support.poison import POISON, Poison
from tests.support.worker_process import (
    Hacks,
    WorkerProcess,
    check_answers,
    quick_settings,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlx_serving.producer.handles import JobHandle

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

TOKENS = 40
LONG = " ".join(["word"] * 300)  # one prompt a chunk of prefill


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def client(server: LocalRedis) -> Iterator[Client]:
    with Client(settings=quick_settings(server.url)) as client:
        yield client


def mixed(client: Client, prompt: str) -> tuple[list[JobHandle], list[JobHandle]]:
    """Submit 400 jobs, every fiftieth of them poison; return the good and the bad."""
    good: list[JobHandle] = []
    bad: list[JobHandle] = []
    for _ in range(8):
        good += submit(client, 25, TOKENS, prompt=prompt)
        bad += submit(client, 1, TOKENS, prompt=f"{prompt} {POISON}")
        good += submit(client, 24, TOKENS, prompt=prompt)
    return good, bad


@pytest.mark.parametrize(
    ("what", "prompt", "after_tokens"),
    [
        ("in prefill, one prompt a chunk", LONG, None),
        ("in prefill, a batch of prompts", "x", None),
        ("in decode", "x", 10),
    ],
)
def test_8_poison_jobs_among_400_die_and_nobody_else(
    server: LocalRedis,
    client: Client,
    what: str,
    prompt: str,
    after_tokens: int | None,
) -> None:
    hacks = Hacks(poison=Poison("abort", after_tokens))
    started = time.monotonic()
    good, bad = mixed(client, prompt)
    with WorkerProcess(server.url, "w", 100, hacks, batch__max_rows=64, spawned=True) as worker:
        states = Counter(client.result(job.id, timeout=240).state.value for job in bad)
        check_answers(client, good, TOKENS)
        restarts = worker.whole_log().count("child_died")
    show(f"8 poison of 400, {what}: {time.monotonic() - started:.1f} s, {restarts} restarts")
    assert states == {"dead": 8}
    charged = Counter(client.status(job.id).attempts for job in good)
    show(f"    crashes that an innocent was in -> innocents: {sorted(charged.items())}")


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_a_benign_crash_of_a_full_batch_of_64_costs_at_most_twice_its_time(
    server: LocalRedis,
    client: Client,
    tmp_path: Path,
    fraction: float,
) -> None:
    rows, rate, tokens = 64, 50.0, 400
    crash = Poison("abort", int(tokens * fraction), once=str(tmp_path / "crashed"), rows=rows)
    took = {}
    for name, hacks in (("calm", Hacks()), ("crash", Hacks(poison=crash))):
        with WorkerProcess(
            server.url, name, rate, hacks, batch__max_rows=rows, spawned=True
        ) as worker:
            worker.serving()
            started = time.monotonic()
            handles = submit(client, rows, tokens)
            check_answers(client, handles, tokens)
            took[name] = time.monotonic() - started
    assert (tmp_path / "crashed").exists()
    assert {client.status(handle.id).attempts for handle in handles} == {1}
    show(
        f"benign crash of {rows} rows at {fraction:.0%}: {took['crash']:.1f} s, without "
        f"{took['calm']:.1f} s: x {took['crash'] / took['calm']:.2f}"
    )
    assert took["crash"] <= 2 * took["calm"]
