"""What a worker says of itself in Redis: a few short fields, none of them a secret."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from mlx_serving import __version__
from mlx_serving.common.queues import PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mlx_serving.worker.status.status import Snapshot

FIELD_CHARS: Final = 200  # of a fact: a device's name, what is native and why
TOKENS: Final = "generation_tokens"  # of `Measures`
RATE_SECONDS: Final = 10.0  # over which tokens/s are counted

FACTS: Final = (
    "model", "revision", "device", "acceleration", "memory_bytes", "batch_rows", "protocol",
    "version", "pid",
)  # fmt: skip
"""What changes at most with the models in memory; `model`: all that are served, comma between."""

NUMBERS: Final = (
    "state", "reasons", "held", "rows", "waiting", "parked", "kv_tokens_used",
    "kv_tokens_capacity", "tokens_per_second", "lease_age_ms", "lease_failing",
    "memory_active_bytes", "memory_limit_bytes", "resident", "loading", "unloadable", "capacities",
)  # fmt: skip
"""What does any time; `lease_age_ms` is empty where nothing is held.

`resident` are the models in memory that jobs are claimed for, `loading` is one on its way there,
`unloadable` has a line with a reason for each that failed, `capacities` the KV tokens of each that
was loaded, as `alias=tokens`.
"""


def memory_bytes() -> int:
    """This machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def machine_facts() -> dict[str, str]:
    """What this process knows by itself."""
    return {
        "memory_bytes": str(memory_bytes()), "protocol": str(PROTOCOL), "version": __version__,
        "pid": str(os.getpid()),
    }  # fmt: skip


def bounded(facts: Mapping[str, str]) -> dict[str, str]:
    """Known facts only, each cut to its length."""
    return {name: facts[name][:FIELD_CHARS] for name in FACTS if name in facts}


class Peer:
    """Another worker, as it describes itself. One of an older release has a single model."""

    def __init__(self, facts: Mapping[bytes, bytes]) -> None:
        self._facts = {k.decode(errors="replace"): v.decode(errors="replace")
                       for k, v in facts.items()}  # fmt: skip
        self.serving = self._facts.get("state", "serving") == "serving"
        self.batch_rows = int(self._facts.get("batch_rows") or 0)

    @property
    def resident(self) -> list[str]:
        """Models that it has in memory and claims for."""
        return _names(self._facts.get("resident", self._facts.get("model", "")))

    def capacity(self, model: str) -> int | None:
        """KV tokens that it has for the model; None: it has not loaded it yet, 0: it can't."""
        if model not in _names(self._facts.get("model", model)):
            return 0
        if "capacities" not in self._facts:
            return int(self._facts.get("kv_tokens_capacity") or 0)
        failed = {line.partition(":")[0] for line in self._facts["unloadable"].splitlines()}
        pairs = (pair.rpartition("=") for pair in _names(self._facts["capacities"]))
        known = {name: int(tokens) for name, _, tokens in pairs}
        return known.get(model, 0 if model in failed else None)


def _names(text: str) -> list[str]:
    return list(filter(None, text.split(",")))


class Presence:
    """The numbers, from snapshots of the worker; belongs to the main thread."""

    def __init__(
        self, snapshot: Callable[[], Snapshot], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._snapshot, self._clock = snapshot, clock
        self._decoded: deque[tuple[float, float]] = deque()  # at, tokens since the start

    def numbers(self) -> dict[str, str]:
        """All of `NUMBERS`."""
        now = self._snapshot()
        state = now.phase if now.phase != "serving" else "paused" if now.paused else "serving"
        reasons = [*now.paused, *(["memory_short"] if now.memory_short else [])]
        if now.recycling:
            reasons.append("recycling")
        values = {
            "state": state,
            "reasons": ",".join(reasons),
            "held": now.held,
            "rows": now.running,
            "waiting": now.waiting,
            "parked": now.parked,
            "kv_tokens_used": now.kv_used,
            "kv_tokens_capacity": now.kv_capacity,
            "tokens_per_second": round(self._rate(sum(now.counts.get(TOKENS, {}).values())), 1),
            "lease_age_ms": round(now.lease_age * 1000) if now.held else "",
            "lease_failing": int(now.redis_failing > 0),
            "memory_active_bytes": now.memory_active,
            "memory_limit_bytes": now.memory_limit,
            "resident": ",".join(now.resident),
            "loading": now.loading,
            "unloadable": "\n".join(f"{m}: {why}"[:FIELD_CHARS] for m, why in now.failures.items()),
            "capacities": ",".join(f"{m}={n}" for m, n in now.capacities.items()),
        }
        return {name: str(value) for name, value in values.items()}

    def _rate(self, tokens: float) -> float:
        """Tokens a second since the last look that is old enough."""
        now = self._clock()
        self._decoded.append((now, tokens))
        while len(self._decoded) > 1 and now - self._decoded[1][0] >= RATE_SECONDS:
            self._decoded.popleft()
        at, before = self._decoded[0]
        return (tokens - before) / (now - at) if now > at else 0.0
