"""What a worker says of itself in Redis: one hash a worker, written and read here alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

TEXT_CHARS: Final = 200  # a longer text is cut: a device's name, why a model can't be loaded
MODEL_CHARS: Final = 1000  # of all aliases; a worker can't be asked for one that is cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """A live worker, as it was at its last beat, a few seconds ago.

    The hash is at `Keys.worker(name)` and expires some time after the last beat. Its fields have
    the names below, all but `name`; none of them is a secret. A field that is missing reads as its
    default. The claim script reads `state`, `resident` and `batch_rows`.
    """

    name: str  # of the worker; it is in the key, and no field

    # What the worker is. It changes at most with the models in memory.
    model: str = ""  # aliases of all models that it serves, commas between them
    revision: str = ""  # of the model in memory; of several: `alias=revision`, ", " between them
    device: str = ""  # what the engine runs on
    acceleration: str = ""  # each accelerated piece: native or twin, and why
    memory_bytes: int = 0  # of the machine; 0: not known
    batch_rows: int = 0  # the most rows that its batch takes
    protocol: int = 0  # version of the job protocol
    version: str = ""  # of this package
    pid: int = 0  # process id of the engine's process
    life: str = ""  # `attempts.LIFE` of that process

    # What it does now.
    state: str = ""  # loading, serving, paused, suspended (by RQ, for all workers), draining
    reasons: tuple[str, ...] = ()  # why it is paused, admits nothing, or is about to be replaced
    held: int = 0  # jobs of which it holds the lease
    rows: int = 0  # in the decode batch
    waiting: int = 0  # rows claimed that are not in the batch yet
    parked: int = 0  # rows that left the batch in favour of others
    kv_tokens_used: int = 0  # KV tokens that admitted rows reserve, of all its models
    kv_tokens_capacity: int = 0  # KV tokens that rows may reserve, of all models in memory
    tokens_per_second: float = 0.0  # decoded, over the last ten seconds
    lease_age_ms: int | None = None  # since a lease was granted or renewed; None: it holds none
    lease_failing: bool = False  # whether calls to Redis fail
    memory_active_bytes: int = 0  # in the engine's arrays
    memory_limit_bytes: int = 0  # that may be active now
    resident: tuple[str, ...] = ()  # models in memory that it claims jobs for
    loading: str = ""  # the model that is being loaded; "": none
    unloadable: tuple[str, ...] = ()  # "alias: reason" of each model that could not be loaded
    capacities: Mapping[str, int] = field(default_factory=dict)  # KV tokens by alias, once known

    # What others ask of it

    @property
    def models(self) -> list[str]:
        """All models that it serves."""
        return _names(self.model)

    @property
    def able(self) -> list[str]:
        """The models that it serves, without those that it could not load."""
        failed = self._failed
        return [model for model in self.models if model not in failed]

    @property
    def is_serving(self) -> bool:
        """Whether it takes jobs."""
        return self.state == "serving"

    def kv_capacity(self, model: str) -> int | None:
        """KV tokens that it has for the model; 0: it can't serve it, None: it is not known yet."""
        if model not in self.models:
            return 0
        return self.capacities.get(model, 0 if model in self._failed else None)

    def could_hold(self, model: str, kv_tokens: int, rows: int) -> bool:
        """Whether so many rows and KV tokens of the model would fit, if nothing else was there.

        A worker that has not loaded the model yet could: it finds out when it does.
        """
        capacity = self.kv_capacity(model)
        fits = capacity is None or capacity >= kv_tokens
        return fits and (rows == 1 or self.batch_rows >= rows)

    @property
    def _failed(self) -> set[str]:
        return {line.partition(":")[0] for line in self.unloadable}

    # The hash

    def to_hash(self) -> dict[str, str]:
        """All fields as Redis keeps them."""
        return {
            "model": self.model[:MODEL_CHARS],
            "revision": self.revision[:TEXT_CHARS],
            "device": self.device[:TEXT_CHARS],
            "acceleration": self.acceleration[:TEXT_CHARS],
            "memory_bytes": str(self.memory_bytes),
            "batch_rows": str(self.batch_rows),
            "protocol": str(self.protocol),
            "version": self.version[:TEXT_CHARS],
            "pid": str(self.pid),
            "life": self.life,
            "state": self.state,
            "reasons": ",".join(self.reasons),
            "held": str(self.held),
            "rows": str(self.rows),
            "waiting": str(self.waiting),
            "parked": str(self.parked),
            "kv_tokens_used": str(self.kv_tokens_used),
            "kv_tokens_capacity": str(self.kv_tokens_capacity),
            "tokens_per_second": str(round(self.tokens_per_second, 1)),
            "lease_age_ms": "" if self.lease_age_ms is None else str(self.lease_age_ms),
            "lease_failing": str(int(self.lease_failing)),
            "memory_active_bytes": str(self.memory_active_bytes),
            "memory_limit_bytes": str(self.memory_limit_bytes),
            "resident": ",".join(self.resident),
            "loading": self.loading,
            "unloadable": "\n".join(line[:TEXT_CHARS] for line in self.unloadable),
            "capacities": ",".join(f"{model}={n}" for model, n in self.capacities.items()),
        }

    @classmethod
    def from_hash(cls, name: str, raw: Mapping[bytes, bytes]) -> Self | None:
        """Read the hash; None if it is empty: the worker is gone, or not up yet.

        Raises:
            ValueError: a number is none.

        """
        if not raw:
            return None
        text = {key.decode(errors="replace"): value.decode(errors="replace")
                for key, value in raw.items()}  # fmt: skip
        return cls(
            name=name,
            model=text.get("model", ""),
            revision=text.get("revision", ""),
            device=text.get("device", ""),
            acceleration=text.get("acceleration", ""),
            memory_bytes=_count(text, "memory_bytes"),
            batch_rows=_count(text, "batch_rows"),
            protocol=_count(text, "protocol"),
            version=text.get("version", ""),
            pid=_count(text, "pid"),
            life=text.get("life", ""),
            state=text.get("state", ""),
            reasons=tuple(_names(text.get("reasons", ""))),
            held=_count(text, "held"),
            rows=_count(text, "rows"),
            waiting=_count(text, "waiting"),
            parked=_count(text, "parked"),
            kv_tokens_used=_count(text, "kv_tokens_used"),
            kv_tokens_capacity=_count(text, "kv_tokens_capacity"),
            tokens_per_second=float(text.get("tokens_per_second") or 0),
            lease_age_ms=_count(text, "lease_age_ms") if text.get("lease_age_ms") else None,
            lease_failing=_count(text, "lease_failing") > 0,
            memory_active_bytes=_count(text, "memory_active_bytes"),
            memory_limit_bytes=_count(text, "memory_limit_bytes"),
            resident=tuple(_names(text.get("resident", ""))),
            loading=text.get("loading", ""),
            unloadable=tuple(text.get("unloadable", "").splitlines()),
            capacities=_capacities(text.get("capacities", "")),
        )


def _names(text: str) -> list[str]:
    return list(filter(None, text.split(",")))


def _count(fields: Mapping[str, str], name: str) -> int:
    return int(fields.get(name) or 0)


def _capacities(text: str) -> dict[str, int]:
    pairs = (pair.rpartition("=") for pair in _names(text))
    return {model: int(tokens) for model, _, tokens in pairs}
