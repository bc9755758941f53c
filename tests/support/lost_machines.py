"""Time that passes for a job's losses and for the machines that they were on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_serving.common.protocol.fields import JobField

if TYPE_CHECKING:
    from tests.support.protocol_driver import Driver

LEASE_MS = 1_000


def go_back(driver: Driver, job_id: str, ms: int) -> None:
    """Let a job's losses, and all that its machines are known for, be older."""
    key = driver.keys.job(job_id)
    losses: Any = driver.redis.hget(key, JobField.LOSSES) or b""
    entries = [entry.split(",") for entry in losses.decode().split()]
    older = [
        ",".join([e[0], str(int(e[1]) - ms), str(max(int(e[2]) - ms, 0)), *e[3:]]) for e in entries
    ]
    driver.redis.hset(key, JobField.LOSSES, " ".join(older))
    for machine in {e[3] for e in entries}:
        value: Any = driver.redis.get(f"mlxs:machine:{machine}") or b"0,0"
        head, *owners = value.decode().split()
        moved = [f"{o.split(',')[0]},{int(o.split(',')[1]) - ms}" for o in owners]
        driver.redis.set(f"mlxs:machine:{machine}", " ".join([head, *moved]))


def awake(driver: Driver, machine: str, leases: int = 7) -> list[tuple[str, str]]:
    """Let a machine be seen for so many leases until now; returns what became of jobs."""
    seconds, micros = driver.redis.time()
    now = seconds * 1000 + micros // 1000
    key = f"mlxs:machine:{machine}"
    value: Any = driver.redis.get(key) or b"0,0"
    _, *owners = value.decode().split()
    head = f"{now - leases * LEASE_MS},{now - LEASE_MS}"
    driver.redis.set(key, " ".join([head, *owners]))
    return driver.reap(LEASE_MS, machine=machine).outcomes
